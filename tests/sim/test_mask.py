# SPDX-License-Identifier: Apache-2.0
"""The mask of 2:4 metadata as bits, on the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from formats import compress, sparse_weight
from numerics import pack


def mask_of(sim: Any, device: Any, metadata: np.ndarray, K: int, misalign: int = 0) -> np.ndarray:
    N, words = len(metadata), (K + 31) // 32
    mask = device.empty("mask", 4 * N * words)
    given = device.upload("metadata", metadata, misalign)
    sim.sparse24_mask(device, out_features=N, in_features=K, metadata=given, mask=mask)
    return device.download(mask).view(np.uint32).reshape(N, words)


def test_of_valid_metadata(sim: Any) -> None:
    for seed, (N, K) in enumerate([(1, 4), (3, 12), (17, 36), (5, 60), (4, 68), (33, 132), (9, 1028), (64, 256)]):
        weight, kept = sparse_weight(seed, N, K, "float32", explicit=True, sparse24=True)
        _, metadata = compress(weight, kept)
        device = sim.Device(seed=seed, race=seed % 2 == 1)
        np.testing.assert_array_equal(mask_of(sim, device, metadata, K, misalign=seed % 2), pack(kept))
        np.testing.assert_array_equal(mask_of(sim, sim.Device(), metadata, K), pack(kept))


def test_any_bytes_are_read_without_harm(sim: Any) -> None:
    random = np.random.default_rng(0)
    for seed in range(20):
        N, K = int(random.integers(1, 20)), 4 * int(random.integers(1, 60))
        metadata = random.integers(0, 256, (N, (K + 7) // 8), dtype=np.uint8)
        mask = mask_of(sim, sim.Device(seed=seed), metadata, K)
        assert K % 32 == 0 or not (mask[:, -1] >> (K % 32)).any()


def test_traffic_is_the_floor(sim: Any) -> None:
    N, K = 256, 1024
    device = sim.Device()
    mask_of(sim, device, np.full((N, K // 8), 0x44, dtype=np.uint8), K)
    buffers = device.stats()["sparse24_mask"]["buffers"]
    assert buffers["metadata"]["sectors_read"] == buffers["mask"]["sectors_written"] == N * K // 8 // 32
