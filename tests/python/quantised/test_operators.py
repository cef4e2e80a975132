# SPDX-License-Identifier: Apache-2.0
"""The operators given quantised codes: against the float64 oracle of the weight that the codes stand for."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from quantised_cases import LAYOUTS, every_grid, every_layout, make, values_of
from torch import Tensor
from torch.autograd import forward_ad

from cases import Case, lors, make_case
from expectations import check_grad_bias, check_linear, check_linear_backward, check_merge
from lors_cuda import SparseWeight, reference
from lors_cuda._draws import NO_DRAWS
from lors_cuda._grid import NO_GRID, Grid
from lors_cuda._library import build_info
from tolerance import assert_zero_off_mask

INT4 = ("int4", 32, False)


def stored(weight: SparseWeight) -> tuple[Tensor | None, ...]:
    return weight.values, weight.mask_bits, weight.index


def problem(
    seed: int,
    grid: tuple[str, int | None, bool],
    layout: str,
    size: tuple[int, int, int, int] = (5, 13, 192, 3),
    dtype: torch.dtype = torch.float32,
    scales: torch.dtype = torch.float32,
) -> tuple[SparseWeight, Case]:
    """A quantised weight, and a case of activations of `dtype` whose weight is what the codes stand for."""
    T, N, K, r = size
    weight = make(seed, N, K, grid, layout, scales)
    case = make_case(seed, T, N, K, r, torch.float32, explicit_mask=True, bias=True, activation_dtype=dtype)
    return weight, case.replace(weight=values_of(weight), mask=weight.mask())


def on_grid(weight: SparseWeight, dither_seed: int = -1) -> Grid:
    return weight.quantization.arguments()._replace(requantize_steps=1, dither_seed=dither_seed)


def linear(weight: SparseWeight, case: Case, grid: Grid, merged: Tensor | None = None) -> Tensor:
    operands = (*stored(weight), case.lora_A, case.lora_B, case.bias, case.scaling, "lors", merged)
    return lors.linear(case.input, *operands, *NO_DRAWS, *grid)


def operand(weight: SparseWeight, case: Case, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    adapted = (*stored(weight), case.lora_A, case.lora_B, case.scaling)
    return lors.merged_operand(*adapted, dtype, 1 << 20, *NO_DRAWS, *grid)


@every_layout
@every_grid
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_its_backward(seed, grid, layout, scales):
    weight, case = problem(seed, grid, layout, scales=scales)
    arguments = weight.quantization.arguments()
    adapted = (*stored(weight), case.lora_A, case.lora_B, case.scaling)
    merged = lors.merge(*adapted, *NO_DRAWS, *arguments)
    assert merged.dtype == scales
    assert_zero_off_mask(merged, weight.mask())
    assert torch.equal(merged, operand(weight, case, arguments).to(scales))
    if scales == torch.float32:
        check_merge(merged, case)
    G = torch.randn(merged.shape).to(scales)
    of_codes = lors.merge_backward(G, *adapted, *arguments)
    of_values = lors.merge_backward(G.float(), case.weight, case.bits, None, *adapted[3:])
    for one, two in zip(of_codes, of_values, strict=True):
        assert torch.equal(one, two)


@every_layout
@every_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
def test_linear_and_its_backward(seed, grid, layout, dtype, tokens):
    weight, case = problem(seed, grid, layout, (tokens, 13, 192, 3), dtype, torch.bfloat16)
    arguments = weight.quantization.arguments()
    check_linear(linear(weight, case, arguments), case)
    for gradient in ("lors", "exact"):
        operands = (case.grad_output, case.input, *stored(weight), case.lora_A, case.lora_B, case.bias, case.scaling)
        grads = lors.linear_backward(*operands, gradient, True, True, True, None, *NO_DRAWS, *arguments)
        check_linear_backward(grads, case, gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [INT4, ("int8", None, True), ("e4m3", 32, True)])
def test_panels_of_the_weight_are_rows_of_the_requantised_whole(seed, grid, layout):
    # Of so many tokens the CPU merges 2 MiB of rows at a time: this weight has three such parts, the dither many rows.
    weight, case = problem(seed, grid, layout, (40, 2500, 256, 4), torch.bfloat16, torch.bfloat16)
    arguments = on_grid(weight, -1 if grid[0] == "e4m3" else 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output = linear(weight, case, arguments)
    finally:
        torch.set_num_threads(threads)
    merged = operand(weight, case, arguments)
    codes = reference.requantize(
        operand(weight, case, weight.quantization.arguments()),
        *(weight.quantization.scales, weight.quantization.zero_points, weight.mask(), grid[0]),
        dither_seed=None if grid[0] == "e4m3" else 3,
    )
    of_codes = reference.dequantize(codes, weight.quantization.scales, weight.quantization.zero_points, weight.mask())
    # BFloat16 adapters may be added in pairs where nothing is requantised, so that a code at a tie differs.
    assert (merged != of_codes).float().mean() <= 1e-4
    check_linear(output, case.replace(weight=merged, lora_B=torch.zeros_like(case.lora_B)))


@every_layout
@every_grid
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("steps", [0, 1])
def test_what_is_not_finite_in_an_adapter_stays_visible(seed, grid, layout, number, steps):
    weight, case = problem(seed, grid, layout)
    case.lora_B[5] = number
    merged = operand(weight, case, on_grid(weight) if steps else weight.quantization.arguments())
    kept = weight.mask()[5]
    assert kept.any()
    assert not merged[5][kept].isfinite().any()
    if steps:  # also an infinity, which would else be the last code
        assert merged[5][kept].isnan().all()
    assert_zero_off_mask(merged, weight.mask())
    assert merged[torch.arange(13) != 5].isfinite().all()


def test_codes_at_the_ends():
    # 7.5 steps are code 7 and -9 are -8; int8 reaches -128; e4m3 448; a half is rounded to the even code.
    mask = torch.ones(1, 32, dtype=torch.bool)
    moves = torch.tensor([7.5, -9.0, 127.5, -128.4, 0.5, 1.5, 2.5, -0.5, -1.5, 500.0, -17.0, 0.001])
    wanted = {
        "int4": [7, -8, 7, -8, 0, 2, 2, 0, -2, 7, -8, 0],
        "int8": [8, -9, 127, -128, 0, 2, 2, 0, -2, 127, -17, 0],
        "e4m3": [7.5, -9, 128, -128, 0.5, 1.5, 2.5, -0.5, -1.5, 448, -16, 0.001953125 * 1],
    }
    A = torch.zeros(1, 32)
    A[0, :12] = moves
    for kind, numbers in wanted.items():
        codes = torch.zeros(1, 32, dtype=torch.float8_e4m3fn if kind == "e4m3" else torch.int8)
        grid = make(1, 1, 32, (kind, None, True), "dense").quantization
        grid = type(grid)(kind, 32, torch.full((1, 1), 0.25))
        weight = SparseWeight.from_quantized(codes, grid, mask, "dense")
        adapted = (*stored(weight), A, torch.ones(1, 1), 0.25)
        merged = lors.merged_operand(*adapted, torch.float32, 9, *NO_DRAWS, *on_grid(weight))
        assert torch.equal(merged[0, :12] * 4, torch.tensor(numbers)), kind
        assert not merged[0, merged[0] == 0].signbit().any()


@every_layout
def test_forward_mode_and_backward(seed, layout):
    weight, case = problem(seed, INT4, layout, (5, 13, 192, 3), torch.float32)
    arguments = on_grid(weight, 3)
    tangents = [torch.randn_like(t) for t in (case.input, case.lora_A, case.lora_B)]
    merged = operand(weight, case, arguments).double()
    change = tangents[2].double() @ case.lora_A.double() + case.lora_B.double() @ tangents[1].double()
    moved = torch.where(weight.mask(), case.scaling * change, 0.0)
    with forward_ad.dual_level():
        input, A, B = (
            forward_ad.make_dual(t, u) for t, u in zip((case.input, case.lora_A, case.lora_B), tangents, strict=True)
        )
        output = linear(weight, case.replace(input=input, lora_A=A, lora_B=B), arguments)
        tangent = forward_ad.unpack_dual(output).tangent
        adapted = (*stored(weight), A, B, case.scaling)
        merged_tangent = forward_ad.unpack_dual(lors.merge(*adapted, *NO_DRAWS, *arguments)).tangent
    expected = tangents[0].double() @ merged.T + case.input.double() @ moved.T  # straight through the rounding
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged_tangent.double(), moved, rtol=1e-4, atol=1e-4)
    input, A, B, bias = (t.clone().requires_grad_() for t in (case.input, case.lora_A, case.lora_B, case.bias))
    linear(weight, case.replace(input=input, lora_A=A, lora_B=B, bias=bias), arguments).backward(case.grad_output)
    expected = case.grad_output.double() @ merged
    torch.testing.assert_close(input.grad.double(), expected, rtol=1e-4, atol=1e-3)
    check_grad_bias(bias.grad, case)


def test_the_operators_fake_kernels(seed):
    weight, case = problem(seed, INT4, "2:4", dtype=torch.bfloat16, scales=torch.float16)
    arguments = (*NO_DRAWS, *on_grid(weight, 3))
    adapted = (*stored(weight), case.lora_A, case.lora_B, case.scaling)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(lors.merge.default, (*adapted, *arguments), test_utils=checks)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(lors.merged_operand.default, (*adapted, dtype, 3, *arguments), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": "int5"}, "grid is 'int5'; it must be 'int8', 'int4' or 'e4m3'"),
        ({"grid": ""}, "were given without a grid"),
        ({"grid": "int8"}, "weight has a dtype that grid 'int8' does not go with; its codes must be int8."),
        ({"scales": None}, "grid is 'int4' and there are no scales."),
        ({"scales": torch.ones(13, 5)}, "scales has shape [13, 5]"),
        ({"scales": torch.ones(13, 6).double()}, "it must be float32, bfloat16 or float16"),
        ({"scales": torch.ones(13, 12)}, "for groups of 32, 64, 128 or all 192 columns."),
        ({"zero_points": torch.zeros(13, 5, dtype=torch.int8)}, "zero_points has shape [13, 5]"),
        ({"zero_points": torch.zeros(13, 6)}, "it must be int8 [13, 6], as scales."),
        ({"requantize_steps": 16}, "requantize_steps is 16; it must be 0, 1, or 16 for grid 'int8'."),
    ],
)
def test_what_is_refused(seed, change, message):
    weight, case = problem(seed, INT4, "dense")
    arguments = weight.quantization.arguments()._replace(**change)
    for call in (linear, operand):
        with pytest.raises(RuntimeError) as caught:
            call(weight, case, arguments)
        assert message in str(caught.value)
        assert str(caught.value).endswith(".")


def test_what_does_not_go_together_is_refused(seed):
    weight, case = problem(seed, INT4, "dense")
    adapter = (case.lora_A, case.lora_B, case.scaling)
    arguments = on_grid(weight)
    with pytest.raises(RuntimeError, match="given without a mask; its codes do not tell what is kept"):
        lors.merge(weight.values, None, None, *adapter, *NO_DRAWS, *arguments)
    with pytest.raises(RuntimeError, match="by chance or put on its grid, leave one of them out"):
        lors.merge(*stored(weight), *adapter, 1, None, 0, *arguments)
    with pytest.raises(RuntimeError, match="has a dtype that is not supported"):
        lors.merge(*stored(weight), *adapter, *NO_DRAWS, *NO_GRID)
    weight, case = problem(seed, ("e4m3", 32, True), "dense")
    with pytest.raises(RuntimeError, match="dither_seed was given for grid 'e4m3'"):
        operand(weight, case, on_grid(weight, 3))
    with pytest.raises(RuntimeError, match="zero_points was given for grid 'e4m3'"):
        operand(weight, case, weight.quantization.arguments()._replace(zero_points=torch.zeros(13, 6).char()))


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_each_instruction_set(capability):
    if "LORS_CPU_CAPABILITY" in os.environ:
        pytest.skip("LORS_CPU_CAPABILITY is set")
    order = ["baseline", "avx2", "avx512", "avx512_bf16"]
    if order.index(build_info()["cpu_capability"]) <= order.index(capability):
        pytest.skip("this processor does not have it, or had it in the other tests")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "bitmap or panels or ends",
        __file__,
    ]
    result = subprocess.run(
        command,
        env={**os.environ, "LORS_CPU_CAPABILITY": capability},
        cwd=pathlib.Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
