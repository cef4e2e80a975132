# SPDX-License-Identifier: Apache-2.0
"""The smallest calls of merge that reach every barrier: for the mutants.

Each mutant runs them in a process of its own. NumPy alone, because importing torch takes longer than all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# (out_features, in_features, r), the shared memory of the device: with little of it, the ranks come in chunks; and its
# multiprocessors: with one, a block takes several panels of rows.
SHAPES = [
    ((64, 128, 16), 227 * 1024, 2),
    ((40, 72, 5), 227 * 1024, 2),
    ((33, 136, 150), 100 * 1024, 2),
    ((300, 264, 5), 227 * 1024, 1),
]

PLANTED = [
    ("merge_tile.cuh", "ptx::ldmatrix_x4_trans(a,", "ptx::ldmatrix_x4(a,"),
    ("merge_tile.cuh", "b, a[2], a[3]);", "b, a[3], a[2]);"),
    ("merge.cuh", "if (n >= p.out_features) continue;", "if (n > p.out_features) continue;"),
    ("merge.cuh", "n < p.out_features ? p.in_features : 0", "n <= p.out_features ? p.in_features : 0"),
    (
        "merge.cuh",
        "fmaf(p.scaling, sum[c][i / 2][2 * h + i % 2], values[i])",
        "sum[c][i / 2][2 * h + i % 2] + values[i]",
    ),
    ("merge.cuh", "kept >> i & 1 ?", "kept >> (i ^ 1) & 1 ?"),
]


def check(sim: Any) -> None:
    for seed, ((N, K, r), shared_bytes, multiprocessors) in enumerate(SHAPES):
        random = np.random.default_rng(seed)
        weight = random.standard_normal((N, K)).astype(np.float32) * (random.random((N, K)) < 0.5)
        lora_A, lora_B = (random.standard_normal(shape).astype(np.float32) for shape in ((r, K), (N, r)))
        device = sim.Device(seed=seed, shared_bytes=shared_bytes, multiprocessors=multiprocessors)
        merged = device.empty("merged", 4 * N * K)
        sim.merge(
            device,
            out_features=N,
            in_features=K,
            r=r,
            weight=device.upload("weight", weight),
            lora_A=device.upload("lora_A", lora_A),
            lora_B=device.upload("lora_B", lora_B),
            scaling=0.5,
            merged=merged,
        )
        product = 0.5 * (lora_B.astype(np.float64) @ lora_A)
        want = np.where(weight != 0, weight + product, 0)
        got = device.download(merged).view(np.float32).reshape(N, K)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
