# SPDX-License-Identifier: Apache-2.0
"""Proof that the checks can fail: implementations that are wrong in one way each, and each is caught.

Everything here is plain torch in float32 with the roundings of the real thing; the unharmed formula passes the checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cases import FLOATS, Case, make_case
from expectations import (
    check_adapter_grads,
    check_grad_bias,
    check_grad_input,
    check_linear,
    check_linear_backward,
    check_merge,
)
from tolerance import assert_close, assert_zero_off_mask


def truncate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Towards zero instead of to nearest, for bfloat16."""
    assert dtype == torch.bfloat16
    return (x.float().view(torch.int32) & -65536).view(torch.float32).to(dtype)


@dataclasses.dataclass
class Plain:
    """The formulas in plain torch, float32 (float64 for float64), rounded as the ops round."""

    case: Case
    round: Callable[[Tensor, torch.dtype], Tensor] = lambda x, dtype: x.to(dtype)
    round_merged: Callable[[Tensor, torch.dtype], Tensor] = lambda x, dtype: x.to(dtype)

    def acc(self, t: Tensor) -> Tensor:
        return t.double() if self.case.weight.dtype == torch.float64 else t.float()

    def delta(self) -> Tensor:
        return self.case.scaling * (self.acc(self.case.lora_B) @ self.acc(self.case.lora_A))

    def kept(self) -> Tensor:
        return self.case.kept

    def merged(self) -> Tensor:
        merged = torch.where(self.kept(), self.acc(self.case.weight) + self.delta(), 0.0)
        return self.round_merged(merged, self.case.weight.dtype)

    def linear(self) -> Tensor:
        Y = self.acc(self.case.input) @ self.acc(self.merged()).T
        return self.round(Y if self.case.bias is None else Y + self.acc(self.case.bias), self.case.input.dtype)

    def grads(self, gradient: str) -> tuple[Tensor, ...]:
        c, s = self.case, self.case.scaling
        dY, X, A, B = (self.acc(t) for t in (c.grad_output, c.input, c.lora_A, c.lora_B))
        if gradient == "exact":
            G = torch.where(self.kept(), dY.T @ X, 0.0)
            dA, dB = s * B.T @ G, s * G @ A.T
        else:
            dA, dB = s * (dY @ B).T @ X, s * dY.T @ (X @ A.T)
        dX = self.round(dY @ self.acc(self.merged()), c.input.dtype)
        return dX, dA.to(c.lora_A.dtype), dB.to(c.lora_B.dtype), dY.sum(0).to(c.bias.dtype)

    def check(self) -> None:
        check_merge(self.merged(), self.case)
        check_linear(self.linear(), self.case)
        for gradient in ("lors", "exact"):
            check_linear_backward(self.grads(gradient), self.case, gradient)


def square(seed: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """in_features = out_features, so that wrong roles still have right shapes."""
    return make_case(seed, 65, 48, 48, 8, dtype, bias=True, **options)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_unharmed_formula_passes(seed, dtype, explicit):
    Plain(square(seed, dtype, explicit_mask=explicit)).check()


def caught(check: Callable[..., None], *args: object) -> None:
    with pytest.raises(AssertionError, match=r"off by|error's norm|lean one way|not \+0"):
        check(*args)


class NoScaling(Plain):
    def delta(self) -> Tensor:
        return super().delta() / self.case.scaling


class ScalingTwice(Plain):
    def delta(self) -> Tensor:
        return super().delta() * self.case.scaling


class SwappedRoles(Plain):
    def delta(self) -> Tensor:
        return super().delta().T


class OneRankLess(Plain):
    def delta(self) -> Tensor:
        A, B = self.acc(self.case.lora_A), self.acc(self.case.lora_B)
        return self.case.scaling * (B[:, :-1] @ A[:-1])


class OneBitFlippedOn(Plain):
    def kept(self) -> Tensor:
        kept = self.case.kept.clone()
        row, column = (~kept).nonzero()[7].tolist()
        kept[row, column] = True
        return kept


class OneBitFlippedOff(Plain):
    def kept(self) -> Tensor:
        kept = self.case.kept.clone()
        row, column = kept.nonzero()[7].tolist()
        kept[row, column] = False
        return kept


class MaskShiftedByOne(Plain):
    def kept(self) -> Tensor:
        return self.case.kept.roll(1, dims=1)


class LastColumnForgotten(Plain):
    def delta(self) -> Tensor:
        delta = super().delta().clone()
        delta[:, -1] = 0.0
        return delta


class LastRowFromTheOneBefore(Plain):
    def delta(self) -> Tensor:
        delta = super().delta().clone()
        delta[-1] = delta[-2]
        return delta


MERGES = [
    NoScaling,
    ScalingTwice,
    SwappedRoles,
    OneRankLess,
    OneBitFlippedOn,
    OneBitFlippedOff,
    MaskShiftedByOne,
    LastColumnForgotten,
    LastRowFromTheOneBefore,
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mutant", MERGES)
def test_wrong_merges_are_caught_everywhere(seed, mutant, dtype):
    case = square(seed, dtype)
    wrong = mutant(case)
    caught(check_merge, wrong.merged(), case)
    caught(check_linear, wrong.linear(), case)
    caught(check_grad_input, wrong.grads("lors")[0], case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mutant", [OneBitFlippedOn, OneBitFlippedOff, MaskShiftedByOne])
def test_wrong_masks_are_caught_in_the_exact_gradients(seed, mutant, dtype):
    case = square(seed, dtype)
    _, dA, dB, _ = mutant(case).grads("exact")
    caught(check_adapter_grads, dA, None, case, "exact")
    caught(check_adapter_grads, None, dB, case, "exact")


@pytest.mark.parametrize("dtype", FLOATS)
def test_each_gradient_is_told_from_the_other_and_from_its_neighbours(seed, dtype):
    case = square(seed, dtype)
    lors, exact = Plain(case).grads("lors"), Plain(case).grads("exact")
    for (_, dA, dB, db), other, name in ((lors, "exact", "lors"), (exact, "lors", "exact")):
        caught(check_adapter_grads, dA, None, case, other)
        caught(check_adapter_grads, None, dB, case, other)
        s = case.scaling
        caught(check_adapter_grads, dA / s, None, case, name)  # as in the authors' code
        caught(check_adapter_grads, None, dB / s, case, name)
        caught(check_adapter_grads, dB.T.contiguous(), None, case, name)
        caught(check_adapter_grads, None, dA.T.contiguous(), case, name)
        caught(check_grad_bias, db - case.grad_output[-1].to(db.dtype), case)  # one token less
    fewer = Plain(case.replace(input=case.input[:-1], grad_output=case.grad_output[:-1]))
    for gradient in ("lors", "exact"):
        _, dA, dB, db = fewer.grads(gradient)
        caught(check_adapter_grads, dA, None, case, gradient)
        caught(check_adapter_grads, None, dB, case, gradient)
    caught(check_grad_bias, db, case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_forgotten_or_added_twice(seed, dtype):
    case = square(seed, dtype)
    caught(check_linear, Plain(case.replace(bias=None)).linear(), case)
    caught(check_linear, Plain(case.replace(bias=2 * case.bias)).linear(), case)


def test_truncation_instead_of_rounding(seed):
    case = square(seed, torch.bfloat16)
    everywhere = Plain(case, round=truncate, round_merged=truncate)
    caught(check_merge, everywhere.merged(), case)
    caught(check_linear, everywhere.linear(), case)
    caught(check_grad_input, everywhere.grads("lors")[0], case)


@pytest.mark.parametrize("which", ["round", "round_merged"])
def test_truncation_in_one_place_only_leans(seed, which):
    """Within every element's bound and the norm's: only the signed bias sees it."""
    case = make_case(seed, 129, 96, 128, 8, torch.bfloat16)
    with pytest.raises(AssertionError, match="lean one way"):
        check_linear(Plain(case, **{which: truncate}).linear(), case)


def test_a_merged_value_rounded_twice_too_coarsely(seed):
    case = square(seed, torch.float16)
    coarse = Plain(case, round_merged=lambda x, dtype: x.bfloat16().to(dtype))
    caught(check_merge, coarse.merged(), case)
    caught(check_linear, coarse.linear(), case)


def test_sums_in_16_bits(seed):
    """Long sums kept in bfloat16 instead of float32."""
    case = make_case(seed, 65, 16, 640, 4, torch.bfloat16)
    X, W = case.input, Plain(case).merged()
    Y = torch.zeros(65, 16, dtype=torch.bfloat16)
    for k in range(640):
        Y += X[:, k : k + 1] * W[:, k]
    caught(check_linear, Y, case)


def test_a_float32_product_in_reduced_precision(seed):
    """Operands cut to TF32's ten bits."""
    case = square(seed)
    merged = Plain(case).merged()

    def tf32(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    caught(check_linear, tf32(case.input) @ tf32(merged).T + case.bias, case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_single_wrong_elements(seed, dtype):
    case = square(seed, dtype)
    for value in (float("nan"), float("inf"), 0.0):
        Y = Plain(case).linear()
        at = tuple(int(i) for i in torch.unravel_index(Y.abs().argmax(), Y.shape))
        Y[at] = value
        with pytest.raises(AssertionError, match=r"off by|not finite"):
            check_linear(Y, case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_that_are_not_quite(seed, dtype):
    case = square(seed, dtype)
    merged = Plain(case).merged()
    assert_zero_off_mask(merged, case.kept)
    row, column = (~case.kept).nonzero()[-1].tolist()
    for value in (-0.0, 2.0**-24, float("nan")):
        merged[row, column] = value
        with pytest.raises(AssertionError, match=rf"merged\[{row}, {column}\] is .*, not \+0"):
            assert_zero_off_mask(merged, case.kept)
    merged[row, column] = -0.0
    caught(check_merge, merged, case)


def test_wrong_dtypes_and_shapes(seed):
    case = square(seed, torch.bfloat16)
    Y = Plain(case).linear()
    with pytest.raises(AssertionError, match=r"has dtype torch\.float32"):
        check_linear(Y.float(), case)
    with pytest.raises(AssertionError, match="has shape"):
        check_linear(Y[:-1], case)
    with pytest.raises(AssertionError, match="has shape"):
        check_linear(Y.flatten(), case)


def test_an_expectation_that_is_not_finite_is_no_expectation():
    bad = torch.tensor([float("nan")], dtype=torch.float64)
    with pytest.raises(AssertionError, match="expected values are not finite"):
        assert_close(bad.float(), bad, rms=bad, length=1, dtype=torch.float32)
