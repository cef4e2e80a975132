# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of layout bitmap, run on the simulator, against the format's own words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from formats import masked, pack_bitmap, sparse_weight
from numerics import DTYPES, download, empty, pack, upload

SHAPES = [(1, 1), (3, 31), (17, 32), (5, 33), (70, 68), (33, 132), (9, 1028), (40, 256)]
NONE = 2**63 - 1


@pytest.mark.parametrize("misalign", [0, 1])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(sim: Any, dtype: str, explicit: bool, misalign: int) -> None:
    for seed, (N, K) in enumerate(SHAPES):
        device = sim.Device(seed=seed, race=seed % 2 == 1)
        weight, kept = sparse_weight(seed, N, K, dtype, explicit=explicit, sparse24=False)
        expected, bits, offsets = pack_bitmap(weight, kept)
        shift = misalign * DTYPES[dtype].itemsize
        sizes = {"out_features": N, "in_features": K}
        given = upload(device, "weight", weight, shift)
        packed = device.upload("bits", bits)
        if not explicit:
            own = device.empty("own", bits.nbytes)
            sim.mask_nonzero(device, **sizes, weight=given, dtype=dtype, bits=own)
            np.testing.assert_array_equal(device.download(own).view(np.uint32).reshape(N, -1), pack(kept))
        row_offsets = device.empty("row_offsets", 8 * (N + 1))
        sim.bitmap_offsets(device, **sizes, bits=packed, row_offsets=row_offsets)
        np.testing.assert_array_equal(device.download(row_offsets).view(np.int64), offsets)

        values = empty(device, "values", (max(len(expected), 1),), dtype, shift)
        common = {**sizes, "dtype": dtype, "bits": packed, "row_offsets": row_offsets, "values": values}
        sim.bitmap_compress(device, weight=given, **common)
        got = download(device, values, (max(len(expected), 1),), dtype)[: len(expected)]
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))

        back = empty(device, "back", (N, K), dtype, shift)
        sim.bitmap_decompress(device, weight=back, **common)
        dense = download(device, back, (N, K), dtype)
        assert torch.equal(dense.view(torch.uint8), masked(weight, kept).view(torch.uint8))
        assert validate(sim, bits, offsets, len(expected), K) == [0, NONE]


def validate(sim: Any, bits: np.ndarray, offsets: np.ndarray, count: int, K: int, seed: int = 0) -> list[int]:
    device = sim.Device(seed=seed)
    report = device.empty("report", 16)
    sim.bitmap_validate(
        device,
        out_features=len(offsets) - 1,
        in_features=K,
        count=count,
        bits=device.upload("bits", bits),
        row_offsets=device.upload("row_offsets", offsets),
        report=report,
    )
    return device.download(report).view(np.int64).tolist()


@pytest.mark.parametrize(
    ("change", "report"),
    [
        (lambda b, o: b[1].__setitem__(0, b[1, 0] ^ 4), [1, 1]),
        (lambda b, o: b[2].__setitem__(1, b[2, 1] | 1 << 20), [1, 2]),  # beyond in_features
        (lambda b, o: o.__setitem__(2, o[2] + 1), [2, 1]),
        (lambda b, o: o.__setitem__(0, -1), [1, 0]),
        (lambda b, o: o.__setitem__(40, o[40] + 1), [1, 39]),
        (lambda b, o: o.__iadd__(1), [2, 0]),  # every length is right, and all are shifted
        (lambda b, o: o.__setitem__(7, 2**62), [2, 6]),
        (lambda b, o: o.__setitem__(7, -(2**63)), [2, 6]),
    ],
)
def test_bits_and_offsets_that_disagree(sim: Any, change: Any, report: list[int]) -> None:
    _, kept = sparse_weight(3, 40, 50, "float32", explicit=True, sparse24=False)
    _, bits, offsets = pack_bitmap(torch.zeros(kept.shape), kept)
    count = int(offsets[-1])
    change(bits, offsets)
    assert validate(sim, bits, offsets, count, 50) == report


def test_any_bytes_are_read_without_harm(sim: Any) -> None:
    random = np.random.default_rng(1)
    for seed in range(20):
        N, K = int(random.integers(1, 40)), int(random.integers(1, 200))
        bits = random.integers(0, 2**32, (N, (K + 31) // 32), dtype=np.uint32)
        offsets = random.integers(-(2**63), 2**63 - 1, N + 1, dtype=np.int64)
        count, first = validate(sim, bits, offsets, int(random.integers(0, 1000)), K, seed)
        assert 0 < count <= N
        assert 0 <= first < N
