# SPDX-License-Identifier: Apache-2.0
"""The CUDA merge of every layout, run on the simulator: against float64 and against each other, and what it moves."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from formats import compress, masked, pack_bitmap, sparse_weight
from numerics import DTYPES, download, empty, pack, random, upload
from tolerance import assert_close, assert_zero_off_mask, truncations

# By its file: the simulator's tests run without the package.
_SPEC = importlib.util.spec_from_file_location(
    "reference", Path(__file__).resolve().parents[2] / "python" / "lors_cuda" / "reference.py"
)
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

SCALING = 0.75
COMPRESSED = ("2:4", "bitmap", "2:4 values")  # the last: from 2:4 to 2:4
PATHS = ("dense", *COMPRESSED)
Types = tuple[str, str, str, str]  # of the weight, lora_A, lora_B and the result


def merge(
    sim: Any,
    device: Any,
    path: str,
    given: dict[str, Tensor],
    dtypes: Types,
    *,
    explicit: bool = True,
    misalign: int = 0,
    in_place: bool = False,
    noise: Tensor | None = None,
    **seeds: int,
) -> Tensor:
    """`misalign`: elements that every pointer lies past an aligned address; `explicit`: a dense weight has a mask;
    `noise` [N] and `seeds`: what is drawn."""
    weight, kept = given["weight"], given["kept"]
    (N, K), r = weight.shape, given["lora_A"].shape[0]
    shift = lambda dtype: misalign * DTYPES[dtype].itemsize  # noqa: E731
    stored: dict[str, Any] = dict(seeds)
    if noise is not None:
        stored["noise"] = device.upload("noise", noise.numpy())
    if path == "dense":
        values = weight
        if explicit:
            stored["mask"] = device.upload("mask", pack(kept))
    elif path == "bitmap":
        values, bits, offsets = pack_bitmap(weight, kept)
        stored |= {"mask": device.upload("mask", bits), "row_offsets": device.upload("row_offsets", offsets)}
    else:
        values, metadata = compress(weight, kept)
        stored |= {"metadata": device.upload("metadata", metadata, misalign)}
    if r > 0:
        for name, dtype in (("lora_A", dtypes[1]), ("lora_B", dtypes[2])):
            stored |= {name: upload(device, name, given[name], shift(dtype)), f"{name}_dtype": dtype}
    held = upload(device, "values", values if values.numel() else torch.zeros(1), shift(dtypes[0]))
    shape = (N, K // 2) if path == "2:4 values" else (N, K)
    merged = held if in_place else empty(device, "merged", shape, dtypes[3], shift(dtypes[3]))
    sim.merge(
        device,
        out_features=N,
        in_features=K,
        r=r,
        weight=held,
        weight_dtype=dtypes[0],
        scaling=SCALING,
        to_sparse24=path == "2:4 values",
        merged=merged,
        merged_dtype=dtypes[3],
        round_to=dtypes[3],
        **stored,
    )
    return download(device, merged, shape, dtypes[3])


def run(
    sim: Any,
    device: Any,
    path: str,
    shape: tuple[int, int],
    r: int,
    dtypes: Types,
    *,
    explicit: bool = False,
    seed: int = 0,
    **more: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result, and what went in."""
    N, K = shape
    weight, kept = sparse_weight(seed, N, K, dtypes[0], explicit=explicit, sparse24=path.startswith("2:4"))
    lora_A, lora_B = random(seed + 1, r, K, dtype=dtypes[1]), random(seed + 2, N, r, dtype=dtypes[2])
    given = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "kept": kept}
    return merge(sim, device, path, given, dtypes, explicit=explicit, **more), given


def check(merged: Tensor, given: dict[str, Tensor]) -> None:
    weight, lora_A, lora_B = (given[name].double() for name in ("weight", "lora_A", "lora_B"))
    kept = given["kept"]
    expected = torch.where(kept, weight + SCALING * (lora_B @ lora_A), 0.0)
    rms = (weight.square() + SCALING**2 * lora_B.square() @ lora_A.square()).sqrt() * kept
    truncated = truncations(len(lora_A), given["lora_A"].dtype, given["lora_B"].dtype)
    length = len(lora_A) + 1
    assert_close(merged, expected, rms=rms, length=length, dtype=merged.dtype, truncated=truncated, what="merged")
    assert_zero_off_mask(merged, kept)


def check_path(sim: Any, device: Any, path: str, shape: tuple[int, int], r: int, dtypes: Types, **more: Any) -> None:
    """Against float64, and bit for bit against the dense merge."""
    merged, given = run(sim, device, path, shape, r, dtypes, **more)
    dense = merged if path == "dense" else merge(sim, device, "dense", given, dtypes)
    check(dense, given)
    expected = compress(dense, given["kept"])[0] if path == "2:4 values" else dense
    # Compressing turns a merged -0.0 to +0.0; so does adding zero.
    assert torch.equal((merged + 0.0).view(torch.uint8), (expected + 0.0).view(torch.uint8))
    if path != "2:4 values":
        assert_zero_off_mask(merged, given["kept"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_every_dtype(sim: Any, weight: str, out: str, path: str) -> None:
    if path == "2:4 values" and out != weight:
        pytest.skip("2:4 values keep their dtype")
    for index, (lora_A, lora_B) in enumerate(itertools.product(DTYPES, DTYPES)):
        for explicit in (False, True) if path == "dense" else (index % 2 == 1,):
            dtypes = (weight, lora_A, lora_B, out)
            check_path(sim, sim.Device(seed=index), path, (40, 264), 24, dtypes, explicit=explicit, seed=10 * index)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("r", [1, 3, 17, 64, 256, 300])
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (17, 36), (33, 260), (65, 8), (5, 1028)])
def test_awkward_shapes(sim: Any, shape: tuple[int, int], r: int, path: str) -> None:
    dtypes = ("bfloat16", "float32", "bfloat16", "bfloat16")
    for seed, explicit in enumerate((False, True)):
        device = sim.Device(seed=seed, cp="early" if explicit else "late")
        check_path(sim, device, path, shape, r, dtypes, explicit=explicit, seed=seed)
        if path in ("dense", "bitmap"):  # K need not be a multiple of 4
            check_path(sim, device, path, (shape[0], shape[1] - 3), r, dtypes, explicit=explicit, seed=seed)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_no_adapter_decompresses(sim: Any, weight: str, out: str, path: str) -> None:
    """r = 0: what is kept passes unchanged but for -0.0, NaN and infinity included; nothing is multiplied."""
    if path == "2:4 values" and out != weight:
        pytest.skip("2:4 values keep their dtype")
    N, K = 70, 264
    values, kept = sparse_weight(3, N, K, weight, explicit=True, sparse24=path.startswith("2:4"))
    values.view(-1)[::5] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0]).to(values.dtype).repeat(924)
    given = {"weight": values, "kept": kept, "lora_A": torch.empty(0, K), "lora_B": torch.empty(N, 0)}
    device = sim.Device(multiprocessors=1, race=True)
    merged = merge(sim, device, path, given, (weight, "bfloat16", "float32", out))
    expected = masked(values, kept).to(DTYPES[out])
    if path == "2:4 values":
        expected = compress(expected, kept)[0]
    assert torch.equal(merged.isnan(), expected.isnan())
    assert torch.equal(*(t.nan_to_num(0.0, torch.inf, -torch.inf).view(torch.uint8) for t in (merged, expected)))
    assert not any(counted["mma"] for counted in device.stats().values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 4, ("float16", "float16", "bfloat16", "float16")])
@pytest.mark.parametrize("r", [5, 16, 64])
def test_the_fast_path_gives_the_general_kernels_bits(sim: Any, dtypes: Types, r: int, path: str) -> None:
    """Aligned and not: with NaN, infinities, both zeros and subnormals among the weights."""
    N, K = 37, 504
    for explicit in (False, True):
        weight, kept = sparse_weight(r, N, K, dtypes[0], explicit=explicit, sparse24=path.startswith("2:4"))
        special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 1e-7, -1e-7]).to(weight.dtype)
        weight.view(-1)[::11] = special.repeat(-(-N * K // 77))[: -(-N * K // 11)]
        if not explicit and path in ("dense", "bitmap"):
            kept = weight != 0
        adapters = {"lora_A": random(1, r, K, dtype=dtypes[1]), "lora_B": random(2, N, r, dtype=dtypes[2])}
        given = {"weight": weight, "kept": kept, **adapters}
        results, threads = [], []
        for misalign in (0, 1):
            device = sim.Device(multiprocessors=1)
            merged = merge(sim, device, path, given, dtypes, explicit=explicit, misalign=misalign)
            results.append((merged.nan_to_num(0.0, torch.inf, -torch.inf).view(torch.uint8), merged.isnan()))
            threads.append(device.launches()[-1]["block"][0])
        assert threads == [256, 512]  # the fast path's, the general kernel's for so wide a weight
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("misalign", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers_take_the_slow_path(sim: Any, dtype: str, misalign: int, path: str) -> None:
    check_path(sim, sim.Device(), path, (34, 64), 16, (dtype,) * 4, misalign=misalign)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shared_bytes", [80 * 1024, 100 * 1024])
def test_ranks_in_the_same_chunks_where_shared_memory_is_small(sim: Any, shared_bytes: int, path: str) -> None:
    for r in (100, 200):
        device = sim.Device(shared_bytes=shared_bytes)
        check_path(sim, device, path, (70, 300), r, ("float32",) * 4)
        assert max(launch["shared_bytes"] for launch in device.launches()) <= shared_bytes


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_panels_of_rows(sim: Any, dtype: str, path: str) -> None:
    for race in (False, True):
        device = sim.Device(multiprocessors=1, race=race, preempt=0.02 if race else 0)
        check_path(sim, device, path, (410, 300), 20, (dtype, "bfloat16", "float32", dtype))
        assert device.launches()[-1]["grid"][0] == 1  # so one block walked down all rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_may_be_merged_in_place(sim: Any, dtype: str) -> None:
    apart, in_place = (
        run(sim, sim.Device(), "2:4 values", (70, 300), 16, (dtype,) * 4, explicit=True, in_place=in_place)[0]
        for in_place in (False, True)
    )
    assert torch.equal(apart.view(torch.uint8), in_place.view(torch.uint8))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("path", ["dense", "2:4", "bitmap"])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_draws_are_those_of_the_reference(sim: Any, weight: str, out: str, path: str, explicit: bool) -> None:
    """Of the merge in float32, bit for bit: noise where a weight is kept, and one of two neighbours."""
    shape, r, seed = (40, 264), 20, 2**62 + 12345
    dtypes = (weight, "bfloat16", "float32", out)
    unrounded, given = run(sim, sim.Device(), path, shape, r, (*dtypes[:3], "float32"), explicit=explicit)
    kept, deviation = given["kept"], torch.linspace(0, 0.3, shape[0])
    noisy = (unrounded.double() + reference.noise(deviation, 77, kept)).float()

    def drawn(**more: Any) -> Tensor:
        return merge(sim, sim.Device(), path, given, dtypes, explicit=explicit, **more)

    def chosen(values: Tensor) -> Tensor:
        dtype = DTYPES[out]
        return values if dtype.itemsize == 4 else reference.round_by_chance(values, seed, dtype)

    for merged, expected in (
        (drawn(rounding_seed=seed), chosen(unrounded)),
        (drawn(noise=deviation, noise_seed=77), noisy.to(DTYPES[out])),
        (drawn(rounding_seed=seed, noise=deviation, noise_seed=77), chosen(noisy)),
    ):
        assert torch.equal(merged.view(torch.uint8), expected.view(torch.uint8))
        assert_zero_off_mask(merged, kept)
    if out != "float32":
        assert not torch.equal(drawn(rounding_seed=seed + 1), drawn(rounding_seed=seed))


def test_what_it_does_not_take_is_refused_with_a_sentence(sim: Any) -> None:
    with pytest.raises(sim.StatusError, match=r"\[8, 8\].*1024 bytes of shared memory"):
        run(sim, sim.Device(shared_bytes=1024), "dense", (8, 8), 4, ("bfloat16",) * 4)
    sizes = {"out_features": 8, "in_features": 8, "r": 1}
    with pytest.raises(sim.StatusError, match=r"merge on CUDA .* was given float64"):
        sim.merge(sim.Device(), **sizes, weight_dtype="float64")
    with pytest.raises(sim.StatusError, match="same round_to and merged_dtype"):
        sim.merge(sim.Device(), **sizes, round_to="bfloat16")
    with pytest.raises(sim.StatusError, match="values in the weight's own layout and dtype"):
        sim.merge(sim.Device(), **sizes, to_sparse24=True)
    device = sim.Device()
    offsets = device.upload("row_offsets", torch.zeros(9, dtype=torch.int64).numpy())
    with pytest.raises(sim.StatusError, match="dense weight or 2:4 values, and was asked for a bitmap's"):
        sim.merge(device, **sizes, row_offsets=offsets, to_bitmap=True)
    with pytest.raises(sim.StatusError, match="draws random numbers for a dense result only"):
        sim.merge(device, **sizes, metadata=offsets, to_sparse24=True, rounding_seed=1)


@pytest.mark.parametrize("seed", range(3))
def test_scheduling_changes_nothing(sim: Any, seed: int) -> None:
    dtypes = ("bfloat16", "float32", "bfloat16", "bfloat16")
    first, _ = run(sim, sim.Device(seed=1), "dense", (70, 300), 16, dtypes)
    again, _ = run(sim, sim.Device(seed=seed + 2, preempt=0.05), "dense", (70, 300), 16, dtypes)
    assert torch.equal(first.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 4, ("float32", "bfloat16", "float16", "float32")])
@pytest.mark.parametrize("r", [16, 300])
def test_no_races(sim: Any, dtypes: Types, r: int, path: str) -> None:
    for seed in range(3):
        device = sim.Device(seed=seed, race=True, preempt=0.02)
        check_path(sim, device, path, (40, 272), r, dtypes, explicit=seed % 2 == 1)


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


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_of_a_dense_weight_is_the_floor(sim: Any, dtype: str, explicit: bool) -> None:
    if explicit and dtype == "float32":
        pytest.skip("the general path reads mask words one by one")
    N, K, r = 2048, 2048, 16
    device = sim.Device(multiprocessors=8)
    run(sim, device, "dense", (N, K), r, (dtype, "bfloat16", "bfloat16", dtype), explicit=explicit)
    counted = device.stats()["merge"]
    buffers = counted["buffers"]
    weight = N * K * DTYPES[dtype].itemsize // 32
    assert buffers["values"]["sectors_read"] == buffers["values"]["unique_sectors_read"] == weight
    assert buffers["merged"]["sectors_written"] == buffers["merged"]["unique_sectors_written"] == weight
    floor = 2 * weight + (N + K) * r * 2 // 32 + explicit * N * K // 8 // 32
    moved = sum(of["sectors_read"] + of["sectors_written"] for of in buffers.values())
    assert moved <= 1.03 * floor, f"{moved} sectors, {moved / floor:.3f} of the floor"


@pytest.mark.parametrize(("path", "limit"), [("2:4", 1.03), ("2:4 values", 1.05), ("bitmap", 1.11)])
def test_traffic_of_a_compressed_weight_is_near_the_floor(sim: Any, path: str, limit: float) -> None:
    """2:4: the weight and its result move exactly once; above the floor are the adapters, read again by each block.

    A bitmap's rows begin anywhere, so the rows of a block share sectors at both ends, and its bits are read again.
    """
    N, K, r = 2048, 2048, 16
    device = sim.Device(multiprocessors=8)
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


@pytest.mark.parametrize("path", ["dense", "2:4", "2:4 values"])  # a bitmap's values lie where its bits say
def test_no_bank_is_met_twice_and_dense_accesses_are_wide(sim: Any, path: str) -> None:
    device = sim.Device(multiprocessors=16)
    run(sim, device, path, (256, 1024), 16, ("bfloat16", "float32", "float32", "bfloat16"))
    for counted in device.stats().values():
        conflicts = {kind: count for kind, count in counted.items() if kind.endswith("_conflicts") and count}
        assert not conflicts, conflicts
        widths = {w: counted["loads_by_width"][w] + counted["stores_by_width"][w] for w in (1, 2, 4, 8, 16)}
        assert path != "dense" or widths[16] >= 0.95 * sum(widths.values()), widths
