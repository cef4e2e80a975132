# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking of masks on the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numerics import pack, random


def run(sim: Any, device: Any, shape: tuple[int, int], seed: int, misalign: int) -> None:
    N, K = shape
    kept = random(seed, N, K) > 0
    words = (K + 31) // 32
    bytes_ = kept.numpy().astype(np.uint8)
    bits = device.empty("bits", 4 * N * words)
    sim.mask_pack(device, out_features=N, in_features=K, mask=device.upload("mask", bytes_, misalign), bits=bits)
    packed = device.download(bits).view(np.uint32).reshape(N, words)
    np.testing.assert_array_equal(packed, pack(kept))
    back = device.empty("back", N * K, misalign)
    sim.mask_unpack(device, out_features=N, in_features=K, bits=bits, mask=back)
    np.testing.assert_array_equal(device.download(back).reshape(N, K), bytes_)


@pytest.mark.parametrize("misalign", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 32), (7, 100), (40, 256), (1, 4096)])
def test_there_and_back(sim: Any, shape: tuple[int, int], misalign: int) -> None:
    for seed in range(2):
        run(sim, sim.Device(seed=seed, race=seed == 1), shape, seed, misalign)


def test_traffic_is_the_floor(sim: Any) -> None:
    device = sim.Device()
    run(sim, device, (256, 1024), 0, 0)
    for name, buffers in (("mask_pack", ("mask", "bits")), ("mask_unpack", ("back", "bits"))):
        counted = device.stats()[name]["buffers"]
        big = counted[buffers[0]]
        assert big["sectors_read"] + big["sectors_written"] == 256 * 1024 // 32
        small = counted[buffers[1]]
        assert small["sectors_read"] + small["sectors_written"] == 256 * 1024 // 8 // 32
