# SPDX-License-Identifier: Apache-2.0
"""Small calls of adapter_grad_lors for the mutants: see merge.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from bits import Operands

# (tokens, out_features, in_features, r), the dtype, and the architecture.
CALLS = [
    ((160, 128, 192, 16), "bfloat16", 80),
    ((100, 72, 40, 5), "bfloat16", 80),
    ((96, 64, 128, 40), "float32", 80),
    ((2000, 72, 40, 16), "bfloat16", 80),  # ranges, and several slices of their partial sums
    ((1300, 72, 40, 16), "bfloat16", 90),  # ranges, in clusters
]
PLANTED = [
    (
        "adapter_grad_lors.cu",
        "sums[0].scale = sums[1].scale = static_cast<float>(args.scaling);",
        "sums[0].scale = sums[1].scale = 1.f;",
    ),
    ("adapter_grad_lors.cuh", "a[i], b[j][2], b[j][3]);", "a[i], b[j][3], b[j][2]);"),
    ("adapter_grad_lors.cuh", "row < left_rows &&", "row <= left_rows &&"),
    ("adapter_grad_lors.cu", "of_side[1 - i],", "of_side[i],"),
    # The cluster's: sums of one block only, a wrong range, a wrong tile, too few bytes announced, the parity of another
    # stage, a row beyond the last token.
    ("adapter_grad_lors_cluster.cuh", "ptx::shared_address(at.from), of)", "ptx::shared_address(at.from), 0)"),
    ("adapter_grad_lors_cluster.cuh", "set_place(static_cast<int>(ptx::cluster_rank()), ", "set_place(0, "),
    ("adapter_grad_lors_cluster.cuh", "block / ptx::cluster_size());", "block % ptx::cluster_size());"),
    ("adapter_grad_lors_cluster.cuh", "mine * (z_bytes + ", "mine * (z_bytes - 16 + "),
    ("adapter_grad_lors_cluster.cuh", "static_cast<uint32_t>(step / kStages % 2)", "static_cast<uint32_t>(step % 2)"),
    ("adapter_grad_lors_cluster.cuh", "int row = rows + lane;", "int row = rows + 1 + lane;"),
    ("adapter_grad_lors.cu", "terms[1 - i], vectors,", "2, vectors,"),
    # All gradients to the first expert.
    (
        "adapter_grad_lors.cuh",
        "store_result(side.sums, expert * side.expert_rows + at.row",
        "store_result(side.sums, at.row",
    ),
]


def check(sim: Any) -> None:
    for seed, ((T, N, K, r), dtype, architecture) in enumerate(CALLS):
        multiprocessors = 2 if T < 1000 else 40 if architecture == 80 else 6
        o = Operands(sim.Device(seed=seed, multiprocessors=multiprocessors, architecture=architecture), seed, dtype)
        o.add("grad_output", T, N)
        o.add("input", T, K)
        o.add("lora_A", r, K)
        o.add("lora_B", N, r)
        o.result("lora_A_grad", r, K)
        o.result("lora_B_grad", N, r)
        fields = {name: value for name, value in o.fields.items() if not name.endswith("_grad_dtype")}
        sim.adapter_grad_lors(o.device, tokens=T, out_features=N, in_features=K, r=r, scaling=0.5, **fields)
        v = o.values
        o.check("lora_A_grad", 0.5 * (v["grad_output"] @ v["lora_B"]).T @ v["input"])
        o.check("lora_B_grad", 0.5 * v["grad_output"].T @ (v["input"] @ v["lora_A"].T))
    ends, (E, S, T, N, K, r) = (3, 3, 20, 37), (4, 40, 7, 72, 40, 5)
    for seed, architecture in enumerate((80, 90)):
        o = Operands(sim.Device(seed=seed, multiprocessors=2, architecture=architecture), seed, "bfloat16")
        o.add("grad_output", S, N)
        o.add("input", T, K)
        o.add("lora_A", E, r, K)
        o.add("lora_B", E, N, r)
        o.result("lora_A_grad", E, r, K)
        o.result("lora_B_grad", E, N, r)
        rows = np.arange(S) * 3 % T
        fields = {name: value for name, value in o.fields.items() if not name.endswith("_grad_dtype")}
        fields["offsets"] = o.device.upload("offsets", np.array(ends, dtype=np.int32))
        fields["rows"] = o.device.upload("rows", rows.astype(np.int32))
        sizes = {"tokens": S, "out_features": N, "in_features": K, "r": r, "experts": E}
        sim.adapter_grad_lors(o.device, scaling=0.5, **sizes, **fields)
        v = o.values
        spans = [slice(*pair) for pair in zip((0, *ends), ends, strict=False)]
        Y, X = v["grad_output"], v["input"][rows]
        grad_A = [0.5 * (Y[own] @ B).T @ X[own] for own, B in zip(spans, v["lora_B"], strict=True)]
        grad_B = [0.5 * Y[own].T @ (X[own] @ A.T) for own, A in zip(spans, v["lora_A"], strict=True)]
        o.check("lora_A_grad", np.stack(grad_A))
        o.check("lora_B_grad", np.stack(grad_B))
