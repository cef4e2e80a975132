# SPDX-License-Identifier: Apache-2.0
"""Small calls of masked_contract for the mutants: see merge.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from bits import Operands

PLANTED = [
    ("masked_contract_tile.cuh", "bits >> (2 * i + 1) & 1 ?", "bits >> (2 * i) & 1 ?"),
    ("masked_contract.cuh", "a[i], b[2], b[3]);", "a[i], b[3], b[2]);"),
]


def check(sim: Any) -> None:
    for seed, ((rows, K, r), dtype) in enumerate(
        [((128, 192, 16), "bfloat16"), ((72, 40, 100), "float32"), ((600, 72, 4), "bfloat16")]
    ):
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
