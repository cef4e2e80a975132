# SPDX-License-Identifier: Apache-2.0
"""Products of up to eight tokens with stored values as they are: frozen layers, disabled adapters, merge caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import make_case
from lors_cuda import SparseWeight
from lors_cuda._merged_weight import MergedWeight
from lors_cuda.functional import lors_linear, sparse_linear
from tolerance import assert_close

LAYOUTS = ("dense", "2:4", "bitmap")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Sides that no row pair, unit of 32 columns, or chunk of 512 divides, and some that all do.
SHAPES = ((1, 4), (3, 36), (7, 520), (5, 1060), (33, 512), (2, 32))


def check(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    X, W = input.double(), weight.double()
    b = 0.0 if bias is None else bias.double()
    assert_close(
        output, X @ W.T + b, rms=(X**2 @ (W**2).T + b**2 * 1.0).sqrt(), length=W.shape[1] + 1, dtype=input.dtype
    )


@every_layout
@every_dtype
@pytest.mark.parametrize("tokens", range(1, 9))
def test_every_count_of_tokens_and_shape(seed, dtype, layout, tokens):
    for N, K in SHAPES:
        case = make_case(seed + N, tokens, N, K, 1, dtype, layout=layout, bias=True)
        weight = SparseWeight.from_dense(case.weight, layout)
        check(sparse_linear(case.input, weight, case.bias), case.input, case.weight, case.bias)


@every_dtype
@pytest.mark.parametrize("K", [1, 31, 33, 77, 543])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9, 1.0])
def test_bitmaps_of_any_width_and_density(seed, dtype, K, density):
    case = make_case(seed, 3, 11, K, 1, dtype, layout="bitmap", density=density)
    weight = SparseWeight.from_dense(case.weight, "bitmap")
    check(sparse_linear(case.input, weight), case.input, case.weight)


# bfloat16 has float32's exponents: products and sums of these leave float32's normal numbers, or the factors do.
@every_layout
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [(-130, 0), (-130, 100), (0, -130), (100, -131), (-70, -60), (-63, -63), (-60, -50), (-130, -130), (-50, 60)],
)
def test_numbers_of_any_magnitude(seed, layout, tokens, weights, activations):
    if layout == "dense" and tokens > 1:
        pytest.skip("torch's own product, which takes subnormal bfloat16 numbers for zero on some processors")
    generator = torch.Generator().manual_seed(seed)
    case = make_case(seed, tokens, 9, 292, 1, torch.float64, layout=layout)
    spread = 2.0 ** torch.randint(-4, 4, case.weight.shape, generator=generator).double()
    weight = (case.weight * spread * 2.0**weights).bfloat16()
    input = (case.input * 2.0**activations).bfloat16()
    assert bool((weight != 0).any())
    assert bool((input != 0).any())
    check(sparse_linear(input, SparseWeight.from_dense(weight, layout)), input, weight)
    # Some subnormal numbers among others.
    weight[:, ::3] = case.weight[:, ::3].bfloat16()
    check(sparse_linear(input, SparseWeight.from_dense(weight, layout)), input, weight)
    input[:, ::5] = case.input[:, ::5].bfloat16()
    check(sparse_linear(input, SparseWeight.from_dense(weight, layout)), input, weight)


@every_layout
@every_dtype
def test_infinity_and_nan_spread_as_in_the_dense_product(seed, dtype, layout):
    case = make_case(seed, 5, 6, 100, 1, dtype, layout=layout)
    case.input[0, 7], case.input[1, 98], case.input[2, 3] = float("inf"), float("nan"), float("-inf")
    case.input[4, 50:53] = float("inf")  # NaN where one of them meets a zero, though another gives infinity
    weight = SparseWeight.from_dense(case.weight, layout)
    for input in (case.input, case.input[:2], case.input[1:3], *case.input.split(1)):
        output = sparse_linear(input, weight).double()
        expected = input.double() @ case.weight.double().T
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(output.isposinf(), expected.isposinf())
        assert torch.equal(output.isneginf(), expected.isneginf())
    check(sparse_linear(case.input[3:4], weight), case.input[3:4], case.weight)


# With fewer tokens a 2:4 weight's slots may be multiplied without the zeros between them, in another order.
@every_dtype
@pytest.mark.parametrize("tokens", [3, 8])
def test_compressed_layouts_give_the_same_bits(seed, dtype, tokens):
    case = make_case(seed, tokens, 21, 1060, 1, dtype, layout="2:4")
    outputs = [sparse_linear(case.input, SparseWeight.from_dense(case.weight, layout)) for layout in ("2:4", "bitmap")]
    assert torch.equal(*outputs)


@every_layout
@every_dtype
def test_a_cache_is_good_for_many_tokens_and_for_few(seed, dtype, layout):
    case = make_case(seed, 40, 31, 72, 5, dtype, layout=layout)
    weight = SparseWeight.from_dense(case.weight, layout)
    adapted, cache = (weight, case.lora_A, case.lora_B, case.scaling), MergedWeight()
    merged = weight.merge(*adapted[1:])
    few = case.input[:2]
    for input, is_stored in ((case.input, None), (few, True), (case.input, True), (few, True)):
        output = lors_linear(input, *adapted, cache=cache)
        check(output, input, merged.to_dense())
        operand = cache.operand(*adapted, input)
        assert operand is cache.operand(*adapted, input)
        if is_stored:
            assert operand.dtype == (dtype if layout != "dense" else operand.dtype)
            assert layout == "dense" or torch.equal(operand, merged.values)
    expected = lors_linear(case.input, *adapted)
    lors_linear(case.input, *adapted, cache=cache)
    check(expected, case.input, merged.to_dense())


@every_dtype
@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
def test_expanded_zeros_have_no_sign(seed, dtype, layout):
    case = make_case(seed, 1, 5, 1060, 1, dtype, layout=layout)
    weight = SparseWeight.from_dense(case.weight, layout)
    values = torch.where(
        torch.rand(weight.values.shape) < 0.5, -0.0, weight.values.detach()
    )  # as other writers have them
    none = values.new_zeros(0, 1060), values.new_zeros(5, 0)
    dense = torch.ops.lors.merge(values, weight.mask_bits, weight.index, *none, 1.0)
    assert bool((dense[weight.mask()] == 0).any())
    assert not bool(dense[dense == 0].signbit().any())
