# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of layout 2:4, run on the simulator, against the format's own words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from formats import compress, masked, sparse_weight
from numerics import DTYPES, download, empty, pack, upload

SHAPES = [(1, 4), (3, 12), (17, 36), (5, 60), (4, 68), (33, 132), (9, 1028), (64, 256)]
NONE = 2**63 - 1


def report_of(device: Any, buffer: Any) -> list[int]:
    return device.download(buffer).view(np.int64).tolist()


@pytest.mark.parametrize("misalign", [0, 1])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(sim: Any, dtype: str, explicit: bool, misalign: int) -> None:
    for seed, (N, K) in enumerate(SHAPES):
        device = sim.Device(seed=seed, race=seed % 2 == 1)
        weight, kept = sparse_weight(seed, N, K, dtype, explicit=explicit, sparse24=True)
        expected_values, expected_metadata = compress(weight, kept)
        shift = misalign * DTYPES[dtype].itemsize
        sizes = {"out_features": N, "in_features": K}
        given = upload(device, "weight", weight, shift)
        mask = device.upload("mask", pack(kept)) if explicit else None
        values = empty(device, "values", (N, K // 2), dtype, shift)
        metadata = device.empty("metadata", expected_metadata.size, misalign)
        sim.sparse24_compress(
            device, **sizes, weight=given, weight_dtype=dtype, mask=mask, values=values, metadata=metadata
        )
        np.testing.assert_array_equal(device.download(metadata).reshape(N, -1), expected_metadata)
        got = download(device, values, (N, K // 2), dtype)
        assert torch.equal(got.view(torch.uint8), expected_values.view(torch.uint8))
        again = empty(device, "again", (N, K // 2), dtype, shift)
        sim.sparse24_compress(device, **sizes, weight=given, weight_dtype=dtype, mask=mask, values=again, metadata=None)
        assert torch.equal(download(device, again, (N, K // 2), dtype).view(torch.uint8), got.view(torch.uint8))

        back = empty(device, "back", (N, K), dtype, shift)
        sim.sparse24_decompress(device, **sizes, values=values, dtype=dtype, metadata=metadata, weight=back)
        dense = download(device, back, (N, K), dtype)
        assert torch.equal(dense.view(torch.uint8), masked(weight, kept).view(torch.uint8))

        bits = device.empty("bits", 4 * N * ((K + 31) // 32))
        sim.sparse24_mask(device, **sizes, metadata=metadata, mask=bits)
        np.testing.assert_array_equal(device.download(bits).view(np.uint32).reshape(N, -1), pack(kept))

        report = device.empty("report", 16)
        sim.sparse24_validate(device, **sizes, values=values, dtype=dtype, metadata=metadata, report=report)
        assert report_of(device, report) == [0, NONE]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inspection_finds_what_a_loop_finds(sim: Any, dtype: str, explicit: bool) -> None:
    for seed, (N, K) in enumerate(SHAPES):
        device = sim.Device(seed=seed)
        weight, kept = sparse_weight(seed, N, K, dtype, explicit=explicit, sparse24=False)
        along_k = kept.view(N, K // 4, 4).sum(-1).flatten() > 2
        along_n = torch.nn.functional.pad(kept.T, (0, -N % 4)).reshape(K, -1, 4).sum(-1) > 2
        report = device.empty("report", 24)
        sim.sparse24_inspect(
            device,
            out_features=N,
            in_features=K,
            weight=upload(device, "weight", weight),
            weight_dtype=dtype,
            mask=device.upload("mask", pack(kept)) if explicit else None,
            report=report,
        )
        first = int(along_k.nonzero()[0]) if along_k.any() else NONE
        assert report_of(device, report) == [int(along_k.sum()), first, int(along_n.sum())]


def validate(sim: Any, values: torch.Tensor, metadata: np.ndarray, dtype: str, seed: int = 0) -> list[int]:
    device = sim.Device(seed=seed)
    report = device.empty("report", 16)
    sim.sparse24_validate(
        device,
        out_features=values.shape[0],
        in_features=2 * values.shape[1],
        values=upload(device, "values", values),
        dtype=dtype,
        metadata=device.upload("metadata", metadata),
        report=report,
    )
    return report_of(device, report)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_every_filler(sim: Any, dtype: str) -> None:
    """Each code in each of seven groups of the second of three rows: the last byte's other half must be 0."""
    for code in range(16):
        for group in range(7):
            metadata = np.full((3, 4), 0x11, dtype=np.uint8)
            metadata[:, 3] = 0x01
            shift = 4 * (group % 2)
            metadata[1, group // 2] = metadata[1, group // 2] & ~np.uint8(15 << shift) | np.uint8(code << shift)
            good = (code & 3) <= code >> 2 or code == 1
            values = torch.zeros((3, 14), dtype=DTYPES[dtype])
            assert validate(sim, values, metadata, dtype) == ([0, NONE] if good else [1, 4 + group // 2])
            if not good:
                continue
            held = {0: (code & 3) < code >> 2 or (code & 3 == code >> 2 and code & 3 != 3)}
            held[1] = (code & 3) < code >> 2 or code == 15
            for slot in range(2):
                values = torch.zeros((3, 14), dtype=DTYPES[dtype])
                values[1, 2 * group + slot] = -0.0 if code % 2 else 1.0
                expected = [0, NONE] if held[slot] else [1, 4 + group // 2]
                assert validate(sim, values, metadata, dtype) == expected


def test_bits_beyond_the_last_group(sim: Any) -> None:
    assert validate(sim, torch.zeros((2, 2)), np.array([[0x11], [0x11]], dtype=np.uint8), "float32") == [2, 0]


def test_any_bytes_are_read_without_harm(sim: Any) -> None:
    random = np.random.default_rng(0)
    for seed in range(20):
        N, K = int(random.integers(1, 20)), 4 * int(random.integers(1, 60))
        metadata = random.integers(0, 256, (N, (K + 7) // 8), dtype=np.uint8)
        count, first = validate(sim, torch.randn(N, K // 2), metadata, "float32", seed)
        assert 0 < count <= metadata.size
        assert 0 <= first < metadata.size


def test_sizes_and_dtypes_that_are_refused(sim: Any) -> None:
    device = sim.Device()
    sizes = {"out_features": 2, "in_features": 6}
    with pytest.raises(sim.StatusError, match=r"\[2, 6\]; 2:4 needs in_features to be a multiple of 4"):
        sim.sparse24_mask(device, **sizes, metadata=None, mask=None)
    with pytest.raises(sim.StatusError, match=r"sparse24_decompress on CUDA .* was given float64"):
        sim.sparse24_decompress(device, out_features=2, in_features=8, dtype="float64")


def test_traffic_is_the_floor(sim: Any) -> None:
    N, K = 256, 1024
    device = sim.Device()
    weight, _ = sparse_weight(0, N, K, "bfloat16", explicit=False, sparse24=True)
    sizes = {"out_features": N, "in_features": K}
    values, metadata = empty(device, "values", (N, K // 2), "bfloat16"), device.empty("metadata", N * K // 8)
    given = upload(device, "weight", weight)
    sim.sparse24_compress(
        device, **sizes, weight=given, weight_dtype="bfloat16", mask=None, values=values, metadata=metadata
    )
    back = empty(device, "back", (N, K), "bfloat16")
    sim.sparse24_decompress(device, **sizes, values=values, dtype="bfloat16", metadata=metadata, weight=back)
    for counted in (device.stats()[name]["buffers"] for name in ("sparse24_compress", "sparse24_decompress")):
        moved = sum(of["sectors_read"] + of["sectors_written"] for of in counted.values())
        assert moved == N * K * 25 // 8 // 32
