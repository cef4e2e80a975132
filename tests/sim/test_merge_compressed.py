# SPDX-License-Identifier: Apache-2.0
"""The CUDA merges from compressed weights, run on the simulator: the dense merge's bits, and what they move."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from formats import compress, masked, pack_bitmap, sparse_weight
from numerics import DTYPES, download, empty, pack, random, upload
from test_merge import check

SCALING = 0.75
PATHS = ("2:4", "bitmap", "2:4 values")


def run(
    sim: Any,
    device: Any,
    path: str,
    shape: tuple[int, int],
    r: int,
    dtypes: tuple[str, str, str, str],
    *,
    explicit: bool = False,
    seed: int = 0,
    misalign: int = 0,
    in_place: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Merge a compressed weight; the result, and what went in. dtypes: of the weight, lora_A, lora_B and the result."""
    N, K = shape
    weight, kept = sparse_weight(seed, N, K, dtypes[0], explicit=explicit, sparse24=path != "bitmap")
    lora_A, lora_B = random(seed + 1, r, K, dtype=dtypes[1]), random(seed + 2, N, r, dtype=dtypes[2])
    shift = lambda dtype: misalign * DTYPES[dtype].itemsize  # noqa: E731
    common = {
        "out_features": N,
        "in_features": K,
        "r": r,
        "lora_A": upload(device, "lora_A", lora_A, shift(dtypes[1])),
        "lora_A_dtype": dtypes[1],
        "lora_B": upload(device, "lora_B", lora_B, shift(dtypes[2])),
        "lora_B_dtype": dtypes[2],
        "scaling": SCALING,
    }
    given = {"weight": masked(weight, kept), "lora_A": lora_A, "lora_B": lora_B, "kept": kept}
    if path == "bitmap":
        values, bits, offsets = pack_bitmap(weight, kept)
        stored = {"mask": device.upload("mask", bits), "row_offsets": device.upload("row_offsets", offsets)}
    else:
        values, metadata = compress(weight, kept)
        stored = {"metadata": device.upload("metadata", metadata, misalign)}
    held = upload(device, "values", values if values.numel() else torch.zeros(1), shift(dtypes[0]))
    if path == "2:4 values":
        merged = held if in_place else empty(device, "merged", (N, K // 2), dtypes[0], shift(dtypes[0]))
        sim.sparse24_merge(device, **common, **stored, values=held, dtype=dtypes[0], merged_values=merged)
        return download(device, merged, (N, K // 2), dtypes[0]), given
    merged = empty(device, "merged", (N, K), dtypes[3], shift(dtypes[3]))
    result = {"merged": merged, "merged_dtype": dtypes[3], "round_to": dtypes[3]}
    sim.merge(device, **common, **stored, weight=held, weight_dtype=dtypes[0], **result)
    return download(device, merged, (N, K), dtypes[3]), given


def dense_merge(sim: Any, device: Any, given: dict[str, Tensor], dtypes: tuple[str, str, str, str]) -> Tensor:
    """The same by the kernel for dense weights, with the mask given."""
    N, K = given["weight"].shape
    merged = empty(device, "dense", (N, K), dtypes[3])
    sim.merge(
        device,
        out_features=N,
        in_features=K,
        r=given["lora_A"].shape[0],
        weight=upload(device, "weight", given["weight"]),
        weight_dtype=dtypes[0],
        mask=device.upload("bits", pack(given["kept"])),
        lora_A=upload(device, "A", given["lora_A"]),
        lora_A_dtype=dtypes[1],
        lora_B=upload(device, "B", given["lora_B"]),
        lora_B_dtype=dtypes[2],
        scaling=SCALING,
        merged=merged,
        merged_dtype=dtypes[3],
        round_to=dtypes[3],
    )
    return download(device, merged, (N, K), dtypes[3])


def check_path(
    sim: Any, device: Any, path: str, shape: tuple[int, int], r: int, dtypes: tuple[str, str, str, str], **more: Any
) -> None:
    """Against float64, and bit for bit against the dense merge."""
    merged, given = run(sim, device, path, shape, r, dtypes, **more)
    dense = dense_merge(sim, device, given, dtypes)
    check(dense, given)
    expected = compress(dense, given["kept"])[0] if path == "2:4 values" else dense
    # Compressing turns a merged -0.0 to +0.0; so does adding zero.
    assert torch.equal((merged + 0.0).view(torch.uint8), (expected + 0.0).view(torch.uint8))
    if path != "2:4 values":
        assert not merged[~given["kept"]].view(torch.uint8).any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_every_dtype(sim: Any, weight: str, out: str, path: str) -> None:
    out = weight if path == "2:4 values" else out
    for index, (lora_A, lora_B) in enumerate(itertools.product(DTYPES, DTYPES)):
        dtypes = (weight, lora_A, lora_B, out)
        check_path(sim, sim.Device(seed=index), path, (40, 264), 24, dtypes, explicit=index % 2 == 1, seed=10 * index)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("r", [1, 17, 64, 300])
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (17, 36), (33, 260), (65, 8), (5, 1028)])
def test_awkward_shapes(sim: Any, shape: tuple[int, int], r: int, path: str) -> None:
    dtypes = ("bfloat16", "float32", "bfloat16", "bfloat16")
    for seed, explicit in enumerate((False, True)):
        device = sim.Device(seed=seed, cp="early" if explicit else "late")
        check_path(sim, device, path, shape, r, dtypes, explicit=explicit, seed=seed)
    if path == "bitmap":
        check_path(sim, sim.Device(), path, (shape[0], shape[1] - 3), r, dtypes)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("misalign", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers_take_the_slow_path(sim: Any, dtype: str, misalign: int, path: str) -> None:
    check_path(sim, sim.Device(), path, (34, 64), 16, (dtype,) * 4, misalign=misalign)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shared_bytes", [80 * 1024, 100 * 1024])
def test_ranks_in_the_dense_merges_order_where_shared_memory_is_small(sim: Any, shared_bytes: int, path: str) -> None:
    for r in (100, 200):
        device = sim.Device(shared_bytes=shared_bytes)
        check_path(sim, device, path, (70, 300), r, ("float32",) * 4)
        assert max(launch["shared_bytes"] for launch in device.launches()) <= shared_bytes


@pytest.mark.parametrize("path", PATHS)
def test_several_panels_of_rows(sim: Any, path: str) -> None:
    for race in (False, True):
        device = sim.Device(multiprocessors=1, race=race, preempt=0.02 if race else 0)
        check_path(sim, device, path, (410, 300), 20, ("bfloat16", "bfloat16", "float32", "bfloat16"))
        assert device.launches()[-1]["grid"][0] == 1  # so one block walked down all rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_may_be_merged_in_place(sim: Any, dtype: str) -> None:
    apart, _ = run(sim, sim.Device(), "2:4 values", (70, 300), 16, (dtype,) * 4, explicit=True)
    in_place, _ = run(sim, sim.Device(), "2:4 values", (70, 300), 16, (dtype,) * 4, explicit=True, in_place=True)
    assert torch.equal(apart.view(torch.uint8), in_place.view(torch.uint8))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 4, ("float32", "bfloat16", "float16", "float32")])
@pytest.mark.parametrize("r", [16, 300])
def test_no_races(sim: Any, dtypes: tuple[str, str, str, str], r: int, path: str) -> None:
    for seed in range(3):
        device = sim.Device(seed=seed, race=True, preempt=0.02)
        check_path(sim, device, path, (40, 272), r, dtypes, explicit=seed % 2 == 1)


def test_float64_and_another_rounding_are_refused(sim: Any) -> None:
    sizes = {"out_features": 8, "in_features": 8, "r": 1}
    with pytest.raises(sim.StatusError, match=r"sparse24_merge on CUDA .* was given float64"):
        sim.sparse24_merge(sim.Device(), **sizes, dtype="float64")


@pytest.mark.parametrize(("path", "limit"), [("2:4", 1.05), ("2:4 values", 1.05), ("bitmap", 1.6)])
def test_traffic_is_near_the_floor(sim: Any, path: str, limit: float) -> None:
    """2:4: the weight and its result move exactly once; above the floor are the adapters, read again by each block.

    A bitmap's rows begin anywhere, so pieces of 64 columns share sectors at both ends, and its bits are read again.
    """
    N, K, r = 2048, 2048, 16
    device = sim.Device(multiprocessors=4)
    _, given = run(sim, device, path, (N, K), r, ("bfloat16",) * 4)
    counted: dict[str, int] = {}
    for kernel in device.stats().values():
        for name, of in kernel["buffers"].items():
            counted[name] = counted.get(name, 0) + 32 * (of["sectors_read"] + of["sectors_written"])
    floors = {"2:4": 3.125, "2:4 values": 2.125, "bitmap": 2.125 + 2 * given["kept"].double().mean().item()}
    if path != "bitmap":
        assert counted["values"] + counted["metadata"] + counted["merged"] == floors[path] * N * K
    floor = floors[path] * N * K + 2 * r * (N + K)
    assert sum(counted.values()) <= limit * floor, (sum(counted.values()) / floor, counted)


@pytest.mark.parametrize("path", ["2:4", "2:4 values"])  # a bitmap's values lie where its bits say
def test_no_bank_is_met_twice(sim: Any, path: str) -> None:
    device = sim.Device(multiprocessors=16)
    run(sim, device, path, (256, 1024), 16, ("bfloat16", "float32", "float32", "bfloat16"))
    for counted in device.stats().values():
        conflicts = {kind: count for kind, count in counted.items() if kind.endswith("_conflicts") and count}
        assert not conflicts, conflicts
