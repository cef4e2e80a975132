# SPDX-License-Identifier: Apache-2.0
"""The CUDA merge of quantised weights, simulated: the bits of merging what they stand for, requantised in torch."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import DTYPES, download, empty, pack, random, upload
from quantized import GRIDS, LAYOUTS, Quantized, quantized

# By its file: the simulator's tests run without the package.
_SPEC = importlib.util.spec_from_file_location(
    "reference", Path(__file__).resolve().parents[2] / "python" / "lors_cuda" / "reference.py"
)
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

SCALING = 0.75
# group (0: in_features), dtype of the scales, zero points
SCALES = [(0, "float32", False), (32, "bfloat16", True), (64, "float16", False), (128, "bfloat16", True)]
# requantize_steps, dither_seed
WAYS = [(0, -1), (1, -1), (1, 2**62 + 5), (16, 7)]


def dither(seed: int, first_row: int, shape: tuple[int, int]) -> Tensor:
    words = reference.random_words(seed, (first_row + shape[0], shape[1]))[first_row:]
    return ((words >> 8) - 2**23).float() * torch.tensor(0.998 / 2**24)


def adapters(seed: int, shape: tuple[int, int], r: int, dtype: str) -> dict[str, Tensor]:
    N, K = shape
    return {"lora_A": random(seed, r, K, dtype=dtype), "lora_B": random(seed + 1, N, r, dtype=dtype) * 0.5}


def call(
    sim: Any, device: Any, stored: dict[str, Any], given: dict[str, Tensor], out: str, misalign: int = 0
) -> Tensor:
    shape = (stored["out_features"], stored["in_features"])
    r = len(given["lora_A"])
    more = {name: upload(device, name, tensor) for name, tensor in given.items() if r > 0}
    more |= {f"{name}_dtype": str(tensor.dtype).removeprefix("torch.") for name, tensor in given.items()}
    merged = empty(device, "merged", shape, out, misalign * DTYPES[out].itemsize)
    result = {"merged": merged, "merged_dtype": out, "round_to": out}
    sim.merge(device, r=r, scaling=SCALING, **more, **stored, **result)
    return download(device, merged, shape, out)


def unquantized(sim: Any, weight: Quantized, given: dict[str, Tensor], out: str, **draws: Any) -> Tensor:
    """The merge of what the codes stand for, a float32 weight with a mask."""
    device = sim.Device()
    N, K = weight.codes.shape
    stored = {
        "out_features": N,
        "in_features": K,
        "weight": upload(device, "values", weight.dequantized()),
        "weight_dtype": "float32",
        "mask": device.upload("mask", pack(weight.kept)),
        **draws,
    }
    return call(sim, device, stored, given, out)


def check(
    sim: Any,
    device: Any,
    weight: Quantized,
    given: dict[str, Tensor],
    out: str,
    *,
    steps: int = 0,
    seed: int = -1,
    first_row: int = 0,
    misalign: int = 0,
) -> Tensor:
    stored = weight.uploaded(device, misalign)
    stored |= {"requantize_steps": steps, "dither_seed": seed, "first_row": first_row}
    merged = call(sim, device, stored, given, out, misalign)
    if steps == 0:
        expected = unquantized(sim, weight, given, out)
    else:
        unrounded = unquantized(sim, weight, given, "float32")
        u = None if seed < 0 else dither(seed, first_row, tuple(weight.codes.shape))
        expected = weight.requantized(unrounded, steps, u).to(DTYPES[out])
    same = merged.view(torch.uint8) == expected.view(torch.uint8)
    assert same.all(), (merged[merged != expected][:5], expected[merged != expected][:5], (merged != expected).sum())
    return merged


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("out", DTYPES)
def test_every_grid(sim: Any, out: str, grid: str, layout: str) -> None:
    shape = (37, 384)
    for seed, ((group, scale_dtype, zeros), (steps, dither_seed)) in enumerate(itertools.product(SCALES, WAYS)):
        if (grid == "e4m3" and (zeros or steps == 16)) or (grid == "int4" and steps == 16):
            continue
        weight = quantized(
            seed,
            layout,
            grid,
            shape,
            group or shape[1],
            scale_dtype=scale_dtype,
            zero_points=zeros,
            steps=steps,
        )
        given = adapters(seed, shape, 5 + 16 * (seed % 2), ("bfloat16", "float32")[seed // 2 % 2])
        merged = check(sim, sim.Device(seed=seed), weight, given, out, steps=steps, seed=dither_seed, first_row=seed)
        if steps:
            assert merged[weight.kept].unique().numel() > 10  # not all clamped


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_awkward_shapes(sim: Any, grid: str, layout: str) -> None:
    """One group for each row of any length; general and fast path, several panels of rows, ranks in chunks."""
    for seed, (shape, r) in enumerate(
        [((1, 4), 1), ((3, 12), 3), ((17, 36), 16), ((33, 264), 64), ((9, 1028), 20), ((410, 296), 8), ((20, 520), 300)]
    ):
        weight = quantized(seed, layout, grid, shape, shape[1], scale_dtype="float16", zero_points=grid != "e4m3")
        given = adapters(seed, shape, r, "bfloat16")
        for steps, misalign in ((0, 0), (1, 0), (1, 1)):
            device = sim.Device(seed=seed, multiprocessors=1, race=seed % 2 == 1)
            check(sim, device, weight, given, "bfloat16", steps=steps, seed=3, misalign=misalign)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_no_adapter_dequantizes(sim: Any, grid: str, layout: str) -> None:
    """r = 0: to the scale's own dtype, and what is requantised comes back, with a dither and without."""
    shape = (40, 256)
    for scale_dtype in DTYPES:
        weight = quantized(1, layout, grid, shape, 64, scale_dtype=scale_dtype, zero_points=grid != "e4m3")
        given = {"lora_A": torch.empty(0, shape[1]), "lora_B": torch.empty(shape[0], 0)}
        expected = torch.where(weight.kept, weight.dequantized() + 0.0, 0.0)
        for steps, seed in ((0, -1), (1, -1), (1, 9)):
            stored = weight.uploaded(device := sim.Device())
            stored |= {"requantize_steps": steps, "dither_seed": seed}
            merged = call(sim, device, stored, given, scale_dtype)
            assert torch.equal(merged.view(torch.uint8), expected.to(DTYPES[scale_dtype]).view(torch.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_fast_path_gives_the_general_kernels_bits(sim: Any, grid: str, layout: str) -> None:
    """Aligned and not; with sums that are infinite and NaN, and beyond the grid."""
    shape = (37, 512)
    for seed, ((steps, dither_seed), out) in enumerate(itertools.product(WAYS, ("bfloat16", "float16"))):
        if steps == 16 and grid != "int8":
            continue
        weight = quantized(seed, layout, grid, shape, 128, zero_points=grid != "e4m3", steps=steps)
        given = adapters(seed, shape, (16, 64)[seed % 2], "bfloat16")
        given["lora_B"][3, 0] = torch.inf
        given["lora_B"][5] *= 1e4
        results, threads = [], []
        for misalign in (0, 1):
            device = sim.Device(multiprocessors=1)
            stored = weight.uploaded(device, misalign)
            stored |= {"requantize_steps": steps, "dither_seed": dither_seed}
            results.append(call(sim, device, stored, given, out, misalign))
            threads.append(device.launches()[-1]["block"][0])
        assert threads == [256, 512]  # the fast path's, the general kernel's for so wide a weight
        finite = results[0].isfinite()
        assert torch.equal(results[0].isnan(), results[1].isnan())
        assert results[0].isnan().any() or steps == 0
        assert torch.equal(results[0][finite].view(torch.uint8), results[1][finite].view(torch.uint8))


def test_no_races(sim: Any) -> None:
    for layout, grid in itertools.product(LAYOUTS, GRIDS):
        weight = quantized(1, layout, grid, (70, 288), 32, zero_points=grid != "e4m3")
        given = adapters(1, (70, 288), 16, "bfloat16")
        for seed, out in enumerate(("bfloat16", "float32")):
            device = sim.Device(seed=seed, race=True, preempt=0.02, multiprocessors=1)
            check(sim, device, weight, given, out, steps=1, seed=4)


def test_draws_without_requantising(sim: Any) -> None:
    weight = quantized(1, "2:4", "int4", (40, 256), 64, zero_points=True)
    given = adapters(1, (40, 256), 8, "bfloat16")
    device = sim.Device()
    merged = call(sim, device, weight.uploaded(device) | {"rounding_seed": 5}, given, "bfloat16")
    assert torch.equal(merged, unquantized(sim, weight, given, "bfloat16", rounding_seed=5))


def test_what_it_does_not_take_is_refused_with_a_sentence(sim: Any) -> None:
    weight = quantized(1, "2:4", "int4", (8, 64), 64)
    for more, sentence in (
        ({"to_sparse24": True}, "dense weight of what quantised codes"),
        ({"requantize_steps": 1, "rounding_seed": 1}, "either requantises or draws random numbers"),
        ({"requantize_steps": 2}, "steps of 1 or 16"),
        ({"group": 48}, "groups of 32, 64 or 128 columns, or of whole rows, which they divide"),
    ):
        device = sim.Device()
        stored = weight.uploaded(device) | more
        with pytest.raises(sim.StatusError, match=sentence):
            sim.merge(device, **stored)
    device = sim.Device()
    stored = weight.uploaded(device)
    del stored["metadata"]
    with pytest.raises(sim.StatusError, match="mask bits"):
        sim.merge(device, **stored)


@pytest.mark.parametrize("group", [32, 128, 2048])
@pytest.mark.parametrize("grid", ["int8", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_is_near_the_floor(sim: Any, layout: str, grid: str, group: int) -> None:
    """Above the floor are the adapters, read again by each block.

    Of groups of 128, a block's columns have fewer scales than a sector; a bitmap's bits are read twice.
    """
    N, K, r = 1024, 2048, 16
    weight = quantized(1, layout, grid, (N, K), group, zero_points=True)
    device = sim.Device(multiprocessors=4)
    call(sim, device, weight.uploaded(device) | {"requantize_steps": 1}, adapters(1, (N, K), r, "bfloat16"), "bfloat16")
    counted: dict[str, int] = {}
    for kernel in device.stats().values():
        for name, of in kernel["buffers"].items():
            counted[name] = counted.get(name, 0) + 32 * (of["sectors_read"] + of["sectors_written"])
        if layout != "bitmap":
            conflicts = {kind: count for kind, count in kernel.items() if kind.endswith("_conflicts") and count}
            assert not conflicts, conflicts
    codes = {"dense": 1.0, "2:4": 0.5, "bitmap": weight.kept.double().mean().item()}[layout]
    codes *= 0.5 if grid == "int4" else 1
    floor = N * K * (2 + codes + 1 / 8 + 3 / group) + 2 * r * (N + K)
    if layout != "bitmap":
        assert counted["values"] == codes * N * K
    limit = 1.15 if layout == "bitmap" else 1.07 if group == 128 else 1.05
    assert sum(counted.values()) <= limit * floor, (sum(counted.values()) / floor, counted)
