# SPDX-License-Identifier: Apache-2.0
"""Small calls of fused_linear for the mutants: see merge.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from bits import Operands, loaded, stored

# (tokens, out_features, in_features, r), the dtype and the device's multiprocessors; each forward and backward.
CALLS = [
    ((64, 256, 320, 16), "bfloat16", 2),
    ((7, 72, 200, 5), "bfloat16", 2),
    ((33, 128, 192, 300), "bfloat16", 2),
    ((16, 64, 192, 8), "float32", 2),
    ((16, 64, 1024, 8), "float32", 12),  # more parts of a sum than one thread adds up
    ((520, 128, 128, 16), "bfloat16", 2),  # the wide token tile
]
# Ends of the rows of five experts, of 40 rows, gathered from seven in the forward pass.
ENDS = (3, 3, 20, 20, 37)
PLANTED = [
    ("fused_linear_tiles.cuh", "fmaf(p.scaling, low_rank, v)", "low_rank + v"),
    ("fused_linear_tiles.cuh", "v != 0.f;", "v == v;"),
    ("fused_linear_tiles.cuh", "sum[2 * half + 1], a[j], b[2], b[3]);", "sum[2 * half + 1], a[j], b[3], b[2]);"),
    # Another expert's weight; a tile of the wrong rows; rows of no expert.
    ("fused_linear.cuh", "tile.expert * rows * p.in_features * size", "0 * rows * p.in_features * size"),
    ("experts.cuh", "index - (before + sum - tiles)", "index - before"),
    ("fused_linear.cuh", "tile.expert == p.experts.count", "tile.expert > p.experts.count"),
]


def check(sim: Any) -> None:
    for seed, (((T, N, K, r), dtype, multiprocessors), backward) in enumerate(
        (call, b) for call in CALLS for b in (False, True)
    ):
        o = Operands(sim.Device(seed=seed, multiprocessors=multiprocessors), seed, dtype)
        o.add("activation", T, N if backward else K)
        o.add("weight", N, K, density=0.5)
        o.add("lora_A", r, K)
        o.add("lora_B", N, r)
        if not backward:
            o.add("bias", N)
        o.result("output", T, K if backward else N)
        sizes = {"tokens": T, "out_features": N, "in_features": K, "r": r}
        sim.fused_linear(o.device, input_gradient=backward, scaling=0.125, round_to=dtype, **sizes, **o.fields)
        v = o.values
        merged = np.where(v["weight"] != 0, v["weight"] + 0.125 * v["lora_B"] @ v["lora_A"], 0)
        merged = loaded(stored(merged, dtype), dtype).reshape(N, K).astype(np.float64)
        o.check("output", v["activation"] @ merged if backward else v["activation"] @ merged.T + v["bias"])
    check_experts(sim, 76)  # not for the fast path, whose rows are of whole 16 bytes


def check_experts(sim: Any, K: int) -> None:
    E, S, T, N, r, dtype = len(ENDS), 40, 7, 40, 5, "bfloat16"
    for seed, backward in enumerate((False, True)):
        o = Operands(sim.Device(seed=seed, multiprocessors=2), seed, dtype)
        o.add("activation", S if backward else T, N if backward else K)
        o.add("weight", E, N, K, density=0.5)
        o.add("lora_A", E, r, K)
        o.add("lora_B", E, N, r)
        rows = np.arange(S) if backward else np.arange(S) * 3 % T
        if not backward:
            o.add("bias", E, N)
            o.fields["rows"] = o.device.upload("rows", rows.astype(np.int32))
        o.result("output", S, K if backward else N)
        o.fields["offsets"] = o.device.upload("offsets", np.array(ENDS, dtype=np.int32))
        sizes = {"tokens": S, "out_features": N, "in_features": K, "r": r, "experts": E}
        sim.fused_linear(o.device, input_gradient=backward, scaling=0.125, round_to=dtype, **sizes, **o.fields)
        v = o.values
        want = np.zeros((S, K if backward else N))
        for e, (begin, end) in enumerate(zip((0, *ENDS), ENDS, strict=False)):
            merged = np.where(v["weight"][e] != 0, v["weight"][e] + 0.125 * v["lora_B"][e] @ v["lora_A"][e], 0)
            merged = loaded(stored(merged, dtype), dtype).reshape(N, K).astype(np.float64)
            x = v["activation"][rows[begin:end]]
            want[begin:end] = x @ merged if backward else x @ merged.T + v["bias"][e]
        o.check("output", want)
