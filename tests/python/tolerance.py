# SPDX-License-Identifier: Apache-2.0
"""The one tolerance of all tests: from where a result is rounded and how long its sums are, not from what passes.

u(dtype) is the unit roundoff, half the distance from 1 to the next number. `rms` is the root of the sum of the squared
terms of an element's sum: with terms of random sign, the partial sums of n terms stay near rms, each addition errs by
at most u times that, and the n errors add up like a random walk: sqrt(n) u rms bounds their root mean square with room.

Tensor cores do not round the running sum, they cut it off: each instruction errs by up to 2 u |sum|, on average
u |sum|, always towards zero. These errors do not walk, they add up: t instructions give t u rms, which is added to the
above for the results of tensor cores alone, and to the limit of the signed bias. Before that they cut off the terms,
aligned to the largest, one bit below its last place: at most u rms for each of 9 terms of random sign, sqrt(3 t) u rms
in all, which is less than the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor

BIAS_FROM = 100  # elements below which a signed sum says nothing
BIAS_SAMPLE = 1 << 20  # elements that the signed sum looks at; finding equal values sorts them
# Products of bfloat16 terms that a product of two values becomes, by the wider of their dtypes (cuda/operands.cuh).
_PRODUCTS = {torch.bfloat16: 1, torch.float16: 4, torch.float32: 6}


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest in `dtype`: 2^-24, 2^-8, 2^-11, 2^-53."""
    return torch.finfo(dtype).eps / 2


def half_step(dtype: torch.dtype) -> float:
    """Largest error of rounding to a subnormal of `dtype`, whose spacing no longer shrinks with the value."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def truncations(length: int, *factors: torch.dtype) -> int:
    """How often tensor cores cut off a sum of `length` products of factors of these dtypes: after every 8 products of
    the bfloat16 terms that they are split into (compute capability 8; after 16 on 9)."""
    return max(_PRODUCTS[dtype] for dtype in factors) * -(-length // 8)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    rms: Tensor,
    length: int,
    dtype: torch.dtype,
    mid_dtype: torch.dtype | None = None,
    mid_rms: Tensor | None = None,
    acc_dtype: torch.dtype = torch.float32,
    truncated: int = 0,
    what: str = "result",
) -> None:
    """Compare `actual` (in `dtype`) with the float64 `expected`: by element, in relative L2 norm, and in signed bias.

    Args:
        rms: root of the sum of squared terms, per element.
        length: number of terms (stages add: an element of dY^T (X A^T) has tokens + in_features).
        mid_dtype: the dtype a factor of the terms was rounded to on the way (the merged weight's); None: none was.
        mid_rms: `rms` of the terms with that factor whole, where `rms` splits it further; default `rms`.
        acc_dtype: what the sums run in.
        truncated: `truncations` of a result of tensor cores; 0 for all others.
    """
    assert actual.dtype == dtype, f"{what} has dtype {actual.dtype}, expected {dtype}"
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert expected.dtype == torch.float64
    assert bool(expected.isfinite().all()), f"{what}: the expected values are not finite; compare them another way"
    if actual.numel() == 0:
        return
    value = actual.detach().double()
    assert bool(value.isfinite().all()), f"{what}: {int((~value.isfinite()).sum())} of {value.numel()} are not finite"

    # Where the result is: on a GPU, large ones are compared there.
    expected, rms = expected.detach().to(value.device), rms.detach().to(value.device)
    mid_rms = rms if mid_rms is None else mid_rms.detach().to(value.device)
    error, n = value - expected, value.numel()
    u_out = unit_roundoff(dtype)
    u_mid = 0.0 if mid_dtype is None else unit_roundoff(mid_dtype)
    # The oracle sums too, in float64: that is why its unit roundoff stands beside the result's own.
    u_sum = length**0.5 * (unit_roundoff(acc_dtype) + unit_roundoff(torch.float64))
    lean = truncated * unit_roundoff(acc_dtype) * rms  # towards zero
    spread = u_mid * mid_rms + u_sum * rms + lean
    bound = u_out * expected.abs() + 4 * spread + half_step(dtype)

    excess = (error.abs() - bound).max()
    if excess > 0:
        at = tuple(int(i) for i in torch.unravel_index((error.abs() / bound).argmax(), error.shape))
        count = int((error.abs() > bound).sum())
        raise AssertionError(
            f"{what}{list(at)} is {value[at].item():.9g}, expected {expected[at].item():.9g}: off by "
            f"{abs(error[at].item()):.3g}, at most {bound[at].item():.3g} is rounding; {count} of {n} elements are off"
        )
    # The norm of few errors scatters about its mean by 1/sqrt(n) and more; at n = 1 this is the element's own bound.
    norm_bound = u_out * expected.norm() + (1 + 3 / n**0.5) * spread.norm() + half_step(dtype) * n**0.5
    if error.norm() > norm_bound:
        raise AssertionError(
            f"{what}: the error's norm is {error.norm().item():.3g}, at most {norm_bound.item():.3g} is rounding"
        )
    # Rounding to nearest has no direction: n signed errors add up like a random walk. Truncation's do not. A value that
    # occurs often (a bias where a row of weights is empty) is one rounding and counts once.
    errors, bounds, leans, values = (t.flatten() for t in (error, bound, lean, expected))
    if n > BIAS_SAMPLE:
        some = torch.randint(n, (BIAS_SAMPLE,), generator=torch.Generator().manual_seed(n)).to(value.device)
        errors, bounds, leans, values = errors[some], bounds[some], leans[some], values[some]
    values, where = values.unique(return_inverse=True)
    if len(values) >= BIAS_FROM:
        one = where.new_empty(len(values)).scatter_(0, where, torch.arange(len(where), device=where.device))
        bias = (errors[one] * values.sign()).sum().abs()
        limit = 5 * bounds[one].norm() + leans[one].sum()
        if bias > limit:
            raise AssertionError(
                f"{what}: the errors lean one way by {bias.item():.3g}; rounding gives at most {limit.item():.3g}"
            )


def assert_zero_off_mask(merged: Tensor, kept: Tensor, what: str = "merged") -> None:
    """Exactly +0, every bit of it, wherever `kept` is False."""
    bits = merged.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[merged.element_size()])
    wrong = (bits != 0) & ~kept
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        value, count = merged[row, column].item(), int(wrong.sum())
        raise AssertionError(f"{what}[{row}, {column}] is {value!r}, not +0, and so are {count} off the mask")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error against a float64 `expected`."""
    return float((actual.detach().double() - expected.to(actual.device)).norm() / expected.norm())
