# SPDX-License-Identifier: Apache-2.0
"""The CUDA merge, run on the simulator, against float64; and what it moves, against the floor."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from numerics import DTYPES, download, empty, pack, random, upload
from tolerance import assert_close, assert_zero_off_mask

SCALING = 0.75


def run(
    sim: Any,
    device: Any,
    shape: tuple[int, int],
    r: int,
    dtypes: tuple[str, str, str, str],
    *,
    explicit: bool = False,
    seed: int = 0,
    misalign: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Merge on `device`; the result, and what went in. dtypes: of the weight, lora_A, lora_B and the result.

    `misalign`: elements that every pointer lies past an aligned address.
    """
    N, K = shape
    weight = random(seed, N, K, dtype=dtypes[0], density=0.5)
    lora_A, lora_B = random(seed + 1, r, K, dtype=dtypes[1]), random(seed + 2, N, r, dtype=dtypes[2])
    kept = random(seed + 3, N, K) > 0 if explicit else weight != 0
    shift = lambda dtype: misalign * DTYPES[dtype].itemsize  # noqa: E731
    merged = empty(device, "merged", (N, K), dtypes[3], shift(dtypes[3]))
    sim.merge(
        device,
        out_features=N,
        in_features=K,
        r=r,
        weight=upload(device, "weight", weight, shift(dtypes[0])),
        weight_dtype=dtypes[0],
        mask=device.upload("mask", pack(kept)) if explicit else None,
        lora_A=upload(device, "lora_A", lora_A, shift(dtypes[1])),
        lora_A_dtype=dtypes[1],
        lora_B=upload(device, "lora_B", lora_B, shift(dtypes[2])),
        lora_B_dtype=dtypes[2],
        scaling=SCALING,
        merged=merged,
        merged_dtype=dtypes[3],
        round_to=dtypes[3],
    )
    given = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "kept": kept}
    return download(device, merged, (N, K), dtypes[3]), given


def check(merged: Tensor, given: dict[str, Tensor]) -> None:
    weight, lora_A, lora_B = (given[name].double() for name in ("weight", "lora_A", "lora_B"))
    kept = given["kept"]
    expected = torch.where(kept, weight + SCALING * (lora_B @ lora_A), 0.0)
    rms = (weight.square() + SCALING**2 * lora_B.square() @ lora_A.square()).sqrt() * kept
    assert_close(merged, expected, rms=rms, length=lora_A.shape[0] + 1, dtype=merged.dtype, what="merged")
    assert_zero_off_mask(merged, kept)


ADAPTERS = list(itertools.product(DTYPES, DTYPES))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_every_dtype(sim: Any, weight: str, out: str, explicit: bool) -> None:
    for index, (lora_A, lora_B) in enumerate(ADAPTERS):
        device = sim.Device(seed=index)
        dtypes = (weight, lora_A, lora_B, out)
        check(*run(sim, device, (40, 264), 24, dtypes, explicit=explicit, seed=10 * index))


@pytest.mark.parametrize("r", [1, 3, 16, 17, 64, 256, 300])
@pytest.mark.parametrize("shape", [(1, 1), (1, 600), (33, 257), (65, 8)])
def test_awkward_shapes(sim: Any, shape: tuple[int, int], r: int) -> None:
    for seed, explicit in enumerate((False, True)):
        device = sim.Device(seed=seed, cp="early" if explicit else "late")
        check(
            *run(sim, device, shape, r, ("bfloat16", "float32", "bfloat16", "bfloat16"), explicit=explicit, seed=seed)
        )


@pytest.mark.parametrize("misalign", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers_take_the_slow_path(sim: Any, dtype: str, misalign: int) -> None:
    check(*run(sim, sim.Device(), (34, 64), 16, (dtype,) * 4, misalign=misalign))


def test_ranks_in_chunks_where_shared_memory_is_small(sim: Any) -> None:
    device = sim.Device(shared_bytes=80 * 1024)
    check(*run(sim, device, (70, 300), 100, ("float32",) * 4))
    assert device.launches()[0]["shared_bytes"] <= 80 * 1024


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_panels_of_rows(sim: Any, dtype: str) -> None:
    for race in (False, True):
        device = sim.Device(multiprocessors=1, race=race, preempt=0.02 if race else 0)
        check(*run(sim, device, (410, 300), 20, (dtype, "bfloat16", "float32", dtype)))
        assert device.launches()[0]["grid"][0] == 1  # so one block walked down all rows


def test_a_device_too_small_is_refused_with_a_sentence(sim: Any) -> None:
    with pytest.raises(sim.StatusError, match=r"\[8, 8\].*1024 bytes of shared memory"):
        run(sim, sim.Device(shared_bytes=1024), (8, 8), 4, ("bfloat16",) * 4)


@pytest.mark.parametrize("seed", range(3))
def test_scheduling_changes_nothing(sim: Any, seed: int) -> None:
    dtypes = ("bfloat16", "float32", "bfloat16", "bfloat16")
    first, _ = run(sim, sim.Device(seed=1), (70, 300), 16, dtypes)
    again, _ = run(sim, sim.Device(seed=seed + 2, preempt=0.05), (70, 300), 16, dtypes)
    assert torch.equal(first.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 4, ("float32", "bfloat16", "float16", "float32")])
@pytest.mark.parametrize("r", [16, 300])
def test_no_races(sim: Any, dtypes: tuple[str, str, str, str], r: int) -> None:
    for seed in range(3):
        check(*run(sim, sim.Device(seed=seed, race=True, preempt=0.02), (40, 270), r, dtypes, explicit=seed % 2 == 1))


def test_beyond_31_bits_of_elements(sim: Any) -> None:
    """The end of a weight of more than 2^32 elements, in a buffer that is mostly never touched."""
    N, K, r = 70_000, 65_536, 1
    device = sim.Device(sample_blocks=3)
    weight = device.empty("weight", 2 * N * K, sparse=True)
    merged = device.empty("merged", 2 * N * K, sparse=True)
    row = random(5, 1, K, dtype="bfloat16", density=0.5)
    device.write(weight, 2 * (N - 1) * K, row.view(torch.int16).numpy())
    lora_A, lora_B = random(6, r, K, dtype="bfloat16"), random(7, N, r, dtype="bfloat16")
    sim.merge(
        device,
        out_features=N,
        in_features=K,
        r=r,
        weight=weight,
        weight_dtype="bfloat16",
        mask=None,
        lora_A=upload(device, "lora_A", lora_A),
        lora_A_dtype="bfloat16",
        lora_B=upload(device, "lora_B", lora_B),
        lora_B_dtype="bfloat16",
        scaling=SCALING,
        merged=merged,
        merged_dtype="bfloat16",
        round_to="bfloat16",
    )
    # The last block is always among the sampled ones; it has the last row's last columns.
    columns = device.launches()[0]["block"][0]
    raw = device.read(merged, 2 * (N * K - columns), 2 * columns).copy()
    end = row[:, -columns:]
    tail = {"weight": end, "lora_A": lora_A[:, -columns:], "lora_B": lora_B[-1:], "kept": end != 0}
    check(torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).reshape(1, columns), tail)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_traffic_is_the_floor(sim: Any, dtype: str) -> None:
    N, K, r = 1024, 2048, 16
    device = sim.Device(multiprocessors=16)
    run(sim, device, (N, K), r, (dtype, "bfloat16", "bfloat16", dtype))
    counted = device.stats()["merge"]
    buffers = counted["buffers"]
    weight = N * K * DTYPES[dtype].itemsize // 32
    assert buffers["weight"]["sectors_read"] == buffers["weight"]["unique_sectors_read"] == weight
    assert buffers["merged"]["sectors_written"] == buffers["merged"]["unique_sectors_written"] == weight
    floor = 2 * weight + (N + K) * r * 2 // 32
    moved = sum(of["sectors_read"] + of["sectors_written"] for of in buffers.values())
    assert moved <= 1.05 * floor, f"{moved} sectors, {moved / floor:.3f} of the floor"


def test_accesses_are_wide_and_meet_no_bank_twice(sim: Any) -> None:
    device = sim.Device(multiprocessors=16)
    run(sim, device, (1024, 1024), 16, ("bfloat16", "float32", "float32", "bfloat16"))
    counted = device.stats()["merge"]
    widths = {w: counted["loads_by_width"][w] + counted["stores_by_width"][w] for w in (1, 2, 4, 8, 16)}
    assert widths[16] >= 0.95 * sum(widths.values()), widths
    assert not any(counted[kind] for kind in counted if kind.endswith("_conflicts")), counted
