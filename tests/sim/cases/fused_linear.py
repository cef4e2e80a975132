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
PLANTED = [
    ("fused_linear_tiles.cuh", "fmaf(p.scaling, low_rank, v)", "low_rank + v"),
    ("fused_linear_tiles.cuh", "v != 0.f;", "v == v;"),
    ("fused_linear_tiles.cuh", "sum[2 * half + 1], a[j], b[2], b[3]);", "sum[2 * half + 1], a[j], b[3], b[2]);"),
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
