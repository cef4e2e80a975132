# SPDX-License-Identifier: Apache-2.0
"""Small calls of adapter_grad_lors for the mutants: see merge.py."""

from __future__ import annotations

from typing import Any

from bits import Operands

# (tokens, out_features, in_features, r), and the dtype.
CALLS = [
    ((160, 128, 192, 16), "bfloat16"),
    ((100, 72, 40, 5), "bfloat16"),
    ((96, 64, 128, 40), "float32"),
    ((2000, 72, 40, 16), "bfloat16"),  # ranges, and several slices of their partial sums
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
    ("adapter_grad_lors.cu", "terms[1 - i], vectors", "1, vectors"),
]


def check(sim: Any) -> None:
    for seed, ((T, N, K, r), dtype) in enumerate(CALLS):
        o = Operands(sim.Device(seed=seed, multiprocessors=40 if T > 1000 else 2), seed, dtype)
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
