# SPDX-License-Identifier: Apache-2.0
"""The one tolerance of all tests: from where a result is rounded and how long its sums are, not from what passes.

u(dtype) is the unit roundoff, half the distance from 1 to the next number. `rms` is the root of the sum of the squared
terms of an element's sum: with terms of random sign, the partial sums of n terms stay near rms, each addition errs by
at most u times that, and the n errors add up like a random walk: sqrt(n) u rms bounds their root mean square with room.
"""

from __future__ import annotations

import torch
from torch import Tensor

BIAS_FROM = 100  # elements below which a signed sum says nothing


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest in `dtype`: 2^-24, 2^-8, 2^-11, 2^-53."""
    return torch.finfo(dtype).eps / 2


def half_step(dtype: torch.dtype) -> float:
    """Largest error of rounding to a subnormal of `dtype`, whose spacing no longer shrinks with the value."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


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
    what: str = "result",
) -> None:
    """Compare `actual` (in `dtype`) with the float64 `expected`: by element, in relative L2 norm, and in signed bias.

    Args:
        rms: root of the sum of squared terms, per element.
        length: number of terms (stages add: an element of dY^T (X A^T) has tokens + in_features).
        mid_dtype: the dtype a factor of the terms was rounded to on the way (the merged weight's); None: none was.
        mid_rms: `rms` of the terms with that factor whole, where `rms` splits it further; default `rms`.
        acc_dtype: what the sums run in.
    """
    assert actual.dtype == dtype, f"{what} has dtype {actual.dtype}, expected {dtype}"
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert expected.dtype == torch.float64
    assert bool(expected.isfinite().all()), f"{what}: the expected values are not finite; compare them another way"
    if actual.numel() == 0:
        return
    value = actual.detach().cpu().double()
    assert bool(value.isfinite().all()), f"{what}: {int((~value.isfinite()).sum())} of {value.numel()} are not finite"

    expected, rms = expected.detach().cpu(), rms.detach().cpu()
    mid_rms = rms if mid_rms is None else mid_rms.detach().cpu()
    error, n = value - expected, value.numel()
    u_out = unit_roundoff(dtype)
    u_mid = 0.0 if mid_dtype is None else unit_roundoff(mid_dtype)
    # The oracle sums too, in float64: that is why its unit roundoff stands beside the result's own.
    u_sum = length**0.5 * (unit_roundoff(acc_dtype) + unit_roundoff(torch.float64))
    spread = u_mid * mid_rms + u_sum * rms
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
    values, where = expected.flatten().unique(return_inverse=True)
    if len(values) >= BIAS_FROM:
        one = torch.empty(len(values), dtype=torch.long).scatter_(0, where, torch.arange(n))
        bias, limit = (error.flatten()[one] * values.sign()).sum().abs(), 5 * bound.flatten()[one].norm()
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
    return float((actual.detach().cpu().double() - expected).norm() / expected.norm())
