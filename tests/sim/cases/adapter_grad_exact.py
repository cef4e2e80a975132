# SPDX-License-Identifier: Apache-2.0
"""Small calls of adapter_grad_exact for the mutants: see merge.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from bits import Operands

# (tokens, out_features, in_features, r), and the dtype.
CALLS = [
    ((160, 128, 192, 16), "bfloat16"),
    ((100, 72, 40, 5), "bfloat16"),
    ((96, 64, 128, 100), "float32"),
]
PLANTED = [
    ("reduce.cuh", "sum[i] *= p.scale;", ""),
    ("adapter_grad_exact_tiles.cuh", "a[m], b[2], b[3]);", "a[m], b[3], b[2]);"),
    ("adapter_grad_exact_tiles.cuh", "kRows < end_token();", "kRows <= end_token();"),
    ("adapter_grad_exact_tiles.cuh", "bits >> (kNext * i + 1) & 1 ?", "bits >> (kNext * i) & 1 ?"),
]


def check(sim: Any) -> None:
    gradients(sim)
    contract(sim)


def gradients(sim: Any) -> None:
    for seed, ((T, N, K, r), dtype) in enumerate(CALLS):
        o = Operands(sim.Device(seed=seed, multiprocessors=2), seed, dtype)
        o.add("grad_output", T, N)
        o.add("input", T, K)
        o.add("weight", N, K, density=0.5)
        o.add("lora_A", r, K)
        o.add("lora_B", N, r)
        o.result("lora_A_grad", r, K)
        o.result("lora_B_grad", N, r)
        fields = {name: value for name, value in o.fields.items() if not name.endswith("_grad_dtype")}
        sim.adapter_grad_exact(o.device, tokens=T, out_features=N, in_features=K, r=r, scaling=0.5, **fields)
        v = o.values
        G = (v["weight"] != 0) * (v["grad_output"].T @ v["input"])
        o.check("lora_A_grad", 0.5 * v["lora_B"].T @ G)
        o.check("lora_B_grad", 0.5 * G @ v["lora_A"].T)


def contract(sim: Any) -> None:
    """masked_contract, the other kernel of the family."""
    for seed, ((rows, K, r), dtype) in enumerate([((128, 192, 16), "bfloat16"), ((72, 40, 100), "float32")]):
        o = Operands(sim.Device(seed=seed, multiprocessors=2), seed, dtype)
        o.add("grad_weight", rows, K)
        o.add("weight", rows, K, density=0.5)
        o.add("lora_A", r, K)
        o.add("lora_B", rows, r)
        o.result("lora_B_grad", rows, r)
        o.add("lora_A_sum", K, r, dtype="float32")
        fields = {
            name: value for name, value in o.fields.items() if name not in ("lora_B_grad_dtype", "lora_A_sum_dtype")
        }
        sim.masked_contract(o.device, rows=rows, in_features=K, r=r, scaling=0.5, **fields)
        v = o.values
        G = (v["weight"] != 0) * v["grad_weight"]
        o.check("lora_B_grad", 0.5 * G @ v["lora_A"].T)
        want = v["lora_A_sum"] + 0.5 * G.T @ v["lora_B"]
        got = o.device.download(o.fields["lora_A_sum"])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
