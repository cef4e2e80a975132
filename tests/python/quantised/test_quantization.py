# SPDX-License-Identifier: Apache-2.0
"""Grids and codes: how they are chosen, stored, checked and read back."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from quantised_cases import GRIDS, dense_and_mask, every_grid, every_layout, make, same_codes, values_of

from lors_cuda import QuantizationGrid, SparseWeight, reference
from lors_cuda.codes import pack_nibbles, unpack_nibbles
from lors_cuda.formats import unpack_mask
from lors_cuda.quantization import (
    LIMITS,
    check_codes,
    check_requantization,
    choose_grid,
    quantize_codes,
    requantization,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_nibbles_hold_two_codes_the_first_in_the_low_half():
    codes = torch.tensor([[1, -8, 7, -1], [0, 3, -2, -7]], dtype=torch.int8)
    packed = pack_nibbles(codes)
    assert packed.tolist() == [[0x81, 0xF7], [0x30, 0x9E]]
    assert torch.equal(unpack_nibbles(packed), codes)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_nibbles(unpack_nibbles(every)), every)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@every_layout
@every_grid
@pytest.mark.parametrize("N", [1, 7])
def test_codes_go_in_and_out(device, seed, grid, layout, dtype, N):
    K = 192
    weight, mask = dense_and_mask(seed, N, K, layout, dtype)
    stored = make(seed, N, K, grid, layout, dtype, device)
    assert stored.layout == layout
    assert stored.shape == (N, K)
    assert stored.dtype == dtype
    assert torch.equal(stored.mask().cpu(), mask)
    codes = stored.codes()
    scales, z = stored.quantization.by_column()
    off = codes[~stored.mask()].float()
    assert torch.equal(off, (torch.zeros_like(scales) + z)[~stored.mask()].float())
    again = SparseWeight.from_quantized(codes, stored.quantization, stored.mask(), layout)
    assert torch.equal(again.values, stored.values)
    assert same_codes(again.codes(), codes)
    checked = SparseWeight.from_stored(stored.values, stored.mask_bits, stored.index, K, stored.quantization)
    assert same_codes(checked.codes(), codes)
    # Rounded to nearest: no code is farther from its weight than the next ones would be, but for the ends of the grid.
    kind = grid[0]
    low, high = LIMITS[kind]
    steps = (weight.float().to(device) / scales).double()
    inside = stored.mask() & (steps + z >= low) & (steps + z <= high)
    wanted = values_of(stored).double() / scales.double()
    limit = 0.5 if kind != "e4m3" else steps.abs().clamp_min(2.0**-6) * 2.0**-4
    assert bool(((wanted - steps).abs() <= limit + 1e-4)[inside].all())


@every_layout
@every_grid
def test_dense_form_is_the_rounded_float32_product(device, seed, grid, layout):
    for dtype in (FP32, BF16, FP16):
        stored = make(seed, 9, 128, grid, layout, dtype, device)
        dense = stored.to_dense()
        assert dense.dtype == dtype
        assert torch.equal(dense, values_of(stored).to(dtype))
        assert not torch.signbit(dense[~stored.mask()]).any()


@every_layout
@every_grid
def test_what_is_stored_comes_back_from_requantising_with_a_dither_and_without(seed, grid, layout):
    stored = make(seed, 33, 256, grid, layout, BF16)
    q = stored.quantization
    for dither_seed in (None,) if grid[0] == "e4m3" else (None, 0, 1 << 40):
        args = (q.scales, q.zero_points, stored.mask(), q.kind, 1, dither_seed)
        assert same_codes(reference.requantize(values_of(stored), *args), stored.codes())


def test_dither_is_fixed_even_and_within_its_bounds():
    u = reference.dither(7, (64, 4096))
    assert torch.equal(u, reference.dither(7, (64, 4096)))
    assert not torch.equal(u, reference.dither(8, (64, 4096)))
    assert torch.equal(u[:5, :9], reference.dither(7, (5, 9)))
    assert float(u.min()) >= -0.499 <= float(u.max()) <= 0.499
    assert abs(float(u.double().mean())) < 4 * 0.288 / u.numel() ** 0.5
    assert abs(float(u.double().std()) - 0.998 / 12**0.5) < 1e-3


def test_scales_are_those_of_compressed_tensors():
    w = torch.tensor([[1.0, -3.0] + [0.0] * 30 + [-2.0, 6.0] + [0.0] * 30])
    assert choose_grid(w, "int4", 32).scales.tolist() == torch.tensor([[3 / 7.5, 6 / 7.5]]).tolist()
    assert choose_grid(w, "int8").scales.tolist() == torch.tensor([[6 / 127.5]]).tolist()
    assert choose_grid(w, "e4m3").scales.tolist() == torch.tensor([[6 / 448]]).tolist()
    asymmetric = choose_grid(w, "int4", 32, symmetric=False)
    assert asymmetric.scales.tolist() == torch.tensor([[4 / 15, 8 / 15]]).tolist()
    assert asymmetric.zero_points.tolist() == [[-8 + 11, -8 + 4]]
    zeros = choose_grid(torch.zeros(1, 64), "int4", 32, symmetric=False)
    assert zeros.scales.tolist() == [[2.0**-23] * 2]
    assert zeros.zero_points.tolist() == [[-8, -8]]
    # The largest magnitude lies half a step beyond the last code on the positive side, and is the last code.
    assert quantize_codes(w, w != 0, choose_grid(w, "int4", 32))[0, [1, 33]].tolist() == [-8, 7]


def test_a_finer_grid_holds_sixteenths_and_its_coarser_one_is_int4_again():
    weight, mask = dense_and_mask(3, 16, 128, "bitmap")
    weight = torch.where(mask, weight, 0.0)
    coarse = choose_grid(weight, "int4", 32, symmetric=False, scale_dtype=BF16)
    fine = coarse.finer()
    assert fine.kind == "int8"
    back = fine.coarser(16)
    assert (back.kind, back.group) == ("int4", 32)
    assert torch.equal(back.scales, coarse.scales)
    assert torch.equal(back.zero_points, coarse.zero_points)
    stored = SparseWeight.from_quantized(quantize_codes(weight, mask, fine), fine, mask)
    scales, _ = coarse.by_column()
    inside = (weight / scales + coarse.by_column()[1] <= 7) & (weight / scales + coarse.by_column()[1] >= -8)
    assert bool(
        ((stored.to_dense().float() - weight).abs() <= scales / 16 * 0.51 + weight.abs() * 2.0**-8)[inside].all()
    )
    with pytest.raises(ValueError, match="only an int4 grid has a finer one"):
        fine.finer()


@every_layout
@every_grid
def test_size_density_fingerprint_copies(seed, grid, layout):
    N, K = 10, 128
    stored = make(seed, N, K, grid, layout)
    plain = SparseWeight.from_dense(torch.ones(N, K), layout, stored.mask())
    assert stored.density == plain.density == float(stored.mask().double().mean())
    assert stored.fingerprint() == plain.fingerprint()
    assert torch.equal(unpack_mask(stored.packed_mask(), K), stored.mask())
    parts = [stored.values, stored.mask_bits, stored.index, stored.quantization.scales, stored.quantization.zero_points]
    assert stored.nbytes == sum(t.numel() * t.itemsize for t in parts if t is not None)
    if grid[0] == "int4" and layout == "2:4":
        assert stored.values.nbytes == N * K // 4
    for twin in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored)), stored.to("cpu"), stored.to(FP16)):
        assert same_codes(twin.codes(), stored.codes())
        assert torch.equal(twin.digest(), stored.digest())
        assert twin.dtype == FP32
    kind, group, _ = grid
    assert f"quantization={kind} in groups of {group or K}" in repr(stored)
    assert stored.to("meta").has_digest(stored.digest())


@every_layout
def test_a_digest_is_that_of_codes_and_scales_and_a_fingerprint_of_the_mask(seed, layout):
    stored = make(seed, 6, 64, ("int8", 32, False), layout)
    for change in ("values", "scales", "zero_points"):
        other = copy.deepcopy(stored)
        tensor = other.values if change == "values" else getattr(other.quantization, change)
        flat = tensor.view(-1)
        flat[-1] = flat[-1] * 2 if change == "scales" else flat[-1] + 1
        assert not other.has_digest(stored.digest()), change
        assert other.fingerprint() == stored.fingerprint()


def test_old_pickles_have_no_grid():
    plain = SparseWeight.from_dense(torch.eye(4))
    state = dict(vars(plain))
    del state["quantization"]
    old = SparseWeight.__new__(SparseWeight)
    old.__setstate__(state)
    assert old.quantization is None
    assert torch.equal(old.to_dense(), torch.eye(4))


def test_a_corrupt_pickle_is_refused():
    stored = make(0, 6, 64, ("e4m3", 32, True), "dense")
    stored.values[2, int(stored.mask()[2].nonzero()[0])] = 0x7F
    data = pickle.dumps(stored)
    with pytest.raises(ValueError, match="1 of the e4m3 weight's codes are NaN or -0"):
        pickle.loads(data)


def test_auto_takes_the_smallest_layout():
    mask = torch.zeros(8, 64, dtype=torch.bool)
    mask[:, ::4] = True
    assert SparseWeight.quantize(torch.randn(8, 64), mask, "int4", 32).layout == "2:4"
    mask[:, 1:4] = True
    mask[:, 40:] = False
    assert SparseWeight.quantize(torch.randn(8, 64), mask, "int8", 32).layout == "bitmap"
    assert SparseWeight.quantize(torch.randn(8, 64), ~mask | mask, "int8", 32).layout == "dense"


def test_e4m3_is_bytes_and_has_no_negative_zero():
    weight = torch.tensor([[-1e-9, 1.0, -448.0, 900.0] + [1.0] * 28])
    stored = SparseWeight.quantize(weight, None, "e4m3", 32, scale_dtype=FP32)
    assert stored.values.dtype == torch.uint8
    assert stored.codes().dtype == torch.float8_e4m3fn
    codes = torch.zeros(1, 32).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[0, 3] = 0x80
    again = SparseWeight.from_quantized(codes, stored.quantization, torch.ones(1, 32, dtype=torch.bool))
    assert not again.values.any()
    assert stored.values[0, 0] == 0


# ---- refusals -------------------------------------------------------------------------------------------------------


def grid_of(kind="int8", group=32, N=4, K=64, scales=None, zero_points=None):
    return QuantizationGrid(kind, group, torch.ones(N, K // 32) if scales is None else scales, zero_points)


BAD_SCALES = [0.0, -1.0, float("nan"), float("inf"), 2.0**-118, 2.0**119]


@pytest.mark.parametrize("bad", BAD_SCALES)
def test_scales_out_of_range_are_refused_and_the_place_is_named(bad):
    scales = torch.ones(4, 2)
    scales[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 8 scales are out of range, first that of row 2, columns from 32"):
        grid_of(scales=scales).check()


def test_a_scale_that_float32_cannot_halve_would_not_be_a_scale():
    grid_of(scales=torch.full((4, 2), 2.0**-117)).check()
    grid_of(scales=torch.full((4, 2), 2.0**118)).check()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (grid_of(kind="int3"), "kind is 'int3'"),
        (grid_of(group=48), "group is 48; for in_features = 96"),
        (grid_of(group=True), "group is True"),
        (grid_of(scales=torch.ones(4, 2).double()), "scales have dtype torch.float64"),
        (grid_of(scales=torch.ones(8)), "scales have shape"),
        (grid_of(zero_points=torch.zeros(4, 2)), "zero_points are torch.float32 .* no whole number has no code for 0"),
        (grid_of(zero_points=torch.zeros(4, 1, dtype=torch.int8)), r"must be int8 \(4, 2\)"),
        (grid_of("e4m3", zero_points=torch.zeros(4, 2, dtype=torch.int8)), "e4m3 weight, whose codes are numbers"),
        (grid_of("int4", zero_points=torch.full((4, 2), 8, dtype=torch.int8)), "it is 8, and one of int4 is from -8"),
        (QuantizationGrid("int4", 33, torch.ones(4, 1)), "in_features is 33; int4 codes lie two in a byte"),
    ],
)
def test_what_is_no_grid_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        grid.check()


@pytest.mark.parametrize(
    ("codes", "kind", "message"),
    [
        (torch.zeros(4, 32, dtype=torch.int8), "int8", "codes are torch.int8 with shape"),
        (torch.zeros(4, 64), "int8", "they must be torch.int8"),
        (torch.zeros(4, 64, dtype=torch.int8), "e4m3", "they must be torch.float8_e4m3fn"),
        (torch.full((4, 64), 8, dtype=torch.int8), "int4", "256 of 256 codes are out of range, first that of row 0"),
        (torch.full((4, 64), float("nan")).to(torch.float8_e4m3fn), "e4m3", "it is nan, and a code of e4m3 is"),
    ],
)
def test_what_are_no_codes_is_refused(codes, kind, message):
    with pytest.raises(ValueError, match=message):
        check_codes(codes, grid_of(kind))
    with pytest.raises(ValueError, match=message):
        SparseWeight.from_quantized(codes, grid_of(kind), torch.ones(4, 64, dtype=torch.bool))


def test_weights_that_have_no_codes_are_refused():
    weight = torch.randn(4, 64)
    weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"weight\[1, 2\] is inf"):
        SparseWeight.quantize(weight)
    with pytest.raises(ValueError, match="kind is 'nf4'"):
        SparseWeight.quantize(torch.randn(4, 64), kind="nf4")
    with pytest.raises(ValueError, match="group is 16"):
        SparseWeight.quantize(torch.randn(4, 64), group=16)
    with pytest.raises(ValueError, match="e4m3', which has no zero points"):
        SparseWeight.quantize(torch.randn(4, 64), kind="e4m3", symmetric=False)
    with pytest.raises(ValueError, match="scale_dtype is torch"):
        SparseWeight.quantize(torch.randn(4, 64), scale_dtype=torch.float64)
    with pytest.raises(ValueError, match="has no codes, but"):
        SparseWeight.from_dense(torch.randn(4, 64)).codes()
    with pytest.raises(ValueError, match="meta device, where it has no values to compress"):
        make(0, 4, 64, GRIDS[0], "bitmap", device="meta")


def damaged(layout, grid, change):
    stored = make(1, 5, 64, grid, layout)
    parts = {"values": stored.values, "mask_bits": stored.mask_bits, "index": stored.index}
    change(parts)
    return (parts["values"], parts["mask_bits"], parts["index"], 64, stored.quantization)


def _first_off(parts):
    parts["values"].view(-1)[0] = 0x11  # row 0 keeps nothing


def _padding(parts):
    kept = unpack_mask(parts["mask_bits"], 64).sum(1)
    row = int((kept % 2 == 1).nonzero()[0])
    parts["values"][int(parts["index"][row + 1]) // 2 - 1] |= 0x10


def _unpadded(parts):
    parts["index"] = torch.nn.functional.pad(unpack_mask(parts["mask_bits"], 64).sum(1).cumsum(0), (1, 0))


DAMAGES = [
    ("dense", GRIDS[0], _first_off, "off the mask and must be 0"),
    ("dense", GRIDS[3], _first_off, "off the mask and must be 0"),
    ("2:4", GRIDS[0], _first_off, "belongs to no kept weight and must be 0"),
    ("bitmap", GRIDS[0], _padding, "int4 weight's codes belong to no kept weight"),
    ("bitmap", GRIDS[0], _unpadded, "row offsets, first in that of row"),
    ("bitmap", GRIDS[3], lambda p: p.update(values=p["values"][:-1]), "values, and"),
    ("dense", GRIDS[0], lambda p: p.update(mask_bits=None), "no weight_mask of a quantised weight"),
    ("dense", GRIDS[0], lambda p: p.update(values=p["values"][:, :-1]), "int4 codes of layout 'dense'"),
    ("2:4", GRIDS[3], lambda p: p.update(values=p["values"].view(torch.uint8)), "are torch.int8"),
    ("2:4", GRIDS[3], lambda p: p.update(index=p["index"][:, :-1]), "metadata is torch.uint8"),
    ("bitmap", GRIDS[3], lambda p: p.update(mask_bits=None), "row offsets of a bitmap .* but no bits"),
]


@pytest.mark.parametrize(("layout", "grid", "change", "message"), DAMAGES)
def test_damaged_tensors_are_refused(layout, grid, change, message):
    with pytest.raises(ValueError, match=message):
        SparseWeight.from_stored(*damaged(layout, grid, change))


def test_a_grid_of_another_width_is_refused():
    stored = make(1, 5, 64, GRIDS[0], "2:4")
    with pytest.raises(ValueError, match="in_features is 128, and the scales are those of 64"):
        SparseWeight.from_stored(stored.values, None, stored.index, 128, stored.quantization)


@pytest.mark.parametrize(
    ("options", "kind", "draws", "message"),
    [
        ((True, "none", 0), None, False, "holds values"),
        ((True, "none", 0), "int8", True, "rounded by chance"),
        ((True, "dither", 0), "e4m3", False, "dither of an e4m3 weight"),
        ((True, "stored", 0), "int4", False, "remainder is 'stored'"),
    ],
)
def test_requantising_that_cannot_be_is_refused(options, kind, draws, message):
    grid = None if kind is None else grid_of(kind)
    with pytest.raises(ValueError, match=message):
        check_requantization(requantization(*options), grid, draws)


def test_a_stored_remainder_needs_zero_points_of_the_coarser_grid():
    grid = grid_of("int8", zero_points=torch.full((4, 2), 8, dtype=torch.int8))
    with pytest.raises(ValueError, match="multiples of 16"):
        check_requantization(requantization(True, "stored", 0), grid, False)
    fine = dataclasses.replace(grid, zero_points=torch.full((4, 2), -32, dtype=torch.int8))
    check_requantization(requantization(True, "stored", 0), fine, False)
