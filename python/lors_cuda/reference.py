# SPDX-License-Identifier: Apache-2.0
"""The mathematics of LoRS on one screen, in plain torch: every backend is tested against it.

Everything is evaluated in float64, whatever the dtypes of the inputs. Shapes: ``input`` [..., K], ``weight`` [N, K],
``mask`` bool [N, K] or None (kept where the weight is not zero), ``lora_A`` [r, K], ``lora_B`` [N, r], ``bias`` [N].
Source: Hu et al., "LoRS", arXiv 2501.08582.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mask M as bool [N, K]; -0.0 counts as zero."""
    return weight != 0 if mask is None else mask


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """W~ = W + s M o (B A), and exactly +0 where M is 0. Float64 [N, K]."""
    merged = weight.double() + scaling * (lora_B.double() @ lora_A.double())
    return torch.where(kept(weight, mask), merged, 0.0)


# ---- quantised weights, in float32, whose bits every backend has: lors/quantization.h has the formulas ---------------


def dequantize(codes: Tensor, scales: Tensor, zero_points: Tensor | None, mask: Tensor) -> Tensor:
    """w = (q - z) s, and +0 where the mask is False. Float32 [N, K].

    Args:
        codes: q, int8 or float8_e4m3fn [N, K].
        scales: s, [N, K / group].
        zero_points: z, int8 likewise; None: 0.
        mask: bool [N, K].
    """
    group = codes.shape[1] // scales.shape[1]
    z = torch.zeros_like(scales, dtype=torch.int8) if zero_points is None else zero_points
    w = (codes.float() - z.float().repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)
    return torch.where(mask, w, 0.0)


def requantize(
    merged: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    mask: Tensor,
    kind: str,
    steps: int = 1,
    dither_seed: int | None = None,
) -> Tensor:
    """The codes q' of a merged weight [N, K], on the grid of scale ``steps s`` and zero point ``z / steps``.

    ``clamp(rint(fma(v, 1 / (steps s), u)) + z', lo, hi)``, u the dither; e4m3: ``v (1 / s)`` as that type, saturated.
    With ``steps`` 16 the codes are int4 whatever ``kind`` is. int8 or float8_e4m3fn [N, K], z' off the mask.
    """
    group = merged.shape[1] // scales.shape[1]
    inverse = (steps * scales.float()).reciprocal().repeat_interleave(group, 1)
    if kind == "e4m3":
        q = (merged.float() * inverse).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
        return torch.where(mask & (q != 0), q, 0.0).to(torch.float8_e4m3fn)
    z = torch.zeros_like(scales) if zero_points is None else zero_points.float() / steps
    z = z.repeat_interleave(group, 1)
    u = 0.0 if dither_seed is None else dither(dither_seed, (merged.shape[0], merged.shape[1])).double()
    nearest = (merged.float().double() * inverse.double() + u).float().round()  # float64 holds the product exactly
    low, high = (-8, 7) if steps != 1 or kind == "int4" else (-128, 127)
    return torch.where(mask, (nearest + z).clamp(low, high), z).to(torch.int8)


def dither(seed: int, shape: tuple[int, int]) -> Tensor:
    """A fixed number in [-0.499, 0.499] for each entry of a weight [N, K], of 24 random bits. Float32 [N, K]."""
    fraction = ((random_words(seed, shape) >> 8) - (1 << 23)).float() * 2.0**-24
    return fraction * torch.tensor(0.998, dtype=torch.float32)


# ---- the merge's random numbers: csrc/core/include/lors/random.h has the formulas -----------------------------------

_GOLDEN, _WORD, _LONG = 0x9E3779B97F4A7C15, (1 << 32) - 1, (1 << 64) - 1
NORMAL_UNIT = 1 / math.sqrt(8 * (256**2 - 1) / 12)


def _mix64(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _LONG
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _LONG
    return z ^ z >> 31


def random_words(seed: int, shape: tuple[int, int]) -> Tensor:
    """32 bits for each entry of a weight [N, K], a hash of the seed, its row and its column. Int64 [N, K]."""
    start = _mix64(seed + _GOLDEN & _LONG)
    keys = [_mix64(start + n * _GOLDEN & _LONG) for n in range(shape[0])]
    low, high = (torch.tensor([key >> by & _WORD for key in keys]).unsqueeze(1) for by in (0, 32))
    return _mix32(torch.arange(shape[1]) ^ low, high)


def _mix32(h: Tensor, middle: Tensor | int = 0) -> Tensor:
    h = (h ^ h >> 16) * 0x7FEB352D & _WORD ^ middle
    h = (h ^ h >> 15) * 0x846CA68B & _WORD
    return h ^ h >> 16


def random_normal(seed: int, shape: tuple[int, int]) -> Tensor:
    """Numbers near the standard normal distribution: eight random bytes, summed and standardised. Float64 [N, K]."""
    first = random_words(seed, shape)
    words = torch.stack([first, _mix32(first + 0x9E3779B9 & _WORD)])
    total = torch.stack([words >> by & 255 for by in (0, 8, 16, 24)]).sum((0, 1))
    return (total - 1020) * NORMAL_UNIT


def noise(deviation: Tensor, seed: int, kept: Tensor) -> Tensor:
    """What Flat-LoRA adds: ``M o (deviation[n] normal(n, k))`` for row deviations [N] (arXiv 2409.14396). Float64.

    The factor of the whole numbers that :func:`random_normal` counts has 14 significant bits, so that float32 products
    are exact.
    """
    factor = deviation.float() * torch.tensor(NORMAL_UNIT, dtype=torch.float32)
    factor = (factor.view(torch.int32) & ~0x3FF).view(torch.float32).double().unsqueeze(1)
    return torch.where(kept, factor * (random_normal(seed, (kept.shape[0], kept.shape[1])) / NORMAL_UNIT).round(), 0.0)


def round_by_chance(x: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """``x`` [N, K] rounded to one of its two neighbours in a 16-bit type, each the likelier the nearer: the mean over
    seeds is x. Up, away from zero, if the fraction of the step that is dropped exceeds 32 random bits.

    Rounded to nearest where there is no other finite neighbour: beyond the type's largest number, infinities, NaN.
    """
    value = x.float().double()
    limits = torch.finfo(dtype)
    exponent = torch.frexp(value).exponent - 1
    lowest = round(math.log2(limits.smallest_normal))
    step = torch.ldexp(torch.full_like(value, limits.eps), exponent.clamp_min(lowest))
    below = (value.abs() / step).floor()
    up = torch.floor((value.abs() / step - below) * 2.0**32) > random_words(seed, (x.shape[0], x.shape[1]))
    chosen = torch.copysign((below + up) * step, value)
    return torch.where(value.abs() > limits.max, value, torch.where(value.isfinite(), chosen, value)).to(dtype)


def linear(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Y = X W~^T + bias. Float64 [..., N]."""
    output = input.double() @ merge(weight, lora_A, lora_B, scaling, mask).T
    return output if bias is None else output + bias.double()


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    gradient: str = "lors",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dX [..., K], dA [r, K], dB [N, r], dbias [N]) in float64.

    ``gradient="exact"`` is the derivative of :func:`linear`; ``"lors"`` drops the mask from dA and dB and reorders the
    matmuls, so that no [N, K] result is formed (section 3.2 of the paper, with s included).
    """
    dY, X = grad_output.double().flatten(0, -2), input.double().flatten(0, -2)
    A, B = lora_A.double(), lora_B.double()
    grad_input = grad_output.double() @ merge(weight, lora_A, lora_B, scaling, mask)
    if gradient == "exact":
        masked = torch.where(kept(weight, mask), dY.T @ X, 0.0)
        grad_lora_B, grad_lora_A = scaling * masked @ A.T, scaling * B.T @ masked
    else:
        grad_lora_B, grad_lora_A = scaling * dY.T @ (X @ A.T), scaling * (dY @ B).T @ X
    return grad_input, grad_lora_A, grad_lora_B, dY.sum(0)


# ---- mixtures of experts: each expert is a linear layer, with the rows that are its own ------------------------------


def _groups(offsets: Tensor) -> list[tuple[int, slice]]:
    """Each expert and its rows; ``offsets`` [E] are their ends."""
    ends = offsets.tolist()
    return [(e, slice(begin, end)) for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))]


def grouped_linear(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Y_e = X_e W~_e^T + bias_e for the rows of each expert e, zeros in the rows of none. Float64 [S, N].

    Args:
        input: [S, K]; or [T, K] with ``rows`` [S], then row i is ``input[rows[i]]``.
        offsets: [E], where each expert's rows end.
        weight, mask: [E, N, K]; lora_A: [E, r, K]; lora_B: [E, N, r]; bias: [E, N].
    """
    X = (input if rows is None else input[rows]).double()
    output = X.new_zeros(X.shape[0], weight.shape[1])
    for e, own in _groups(offsets):
        of_expert = (None if t is None else t[e] for t in (bias, mask))
        output[own] = linear(X[own], weight[e], lora_A[e], lora_B[e], scaling, *of_expert)
    return output


def grouped_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    gradient: str = "lors",
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dX, dA [E, r, K], dB [E, N, r], dbias [E, N]) in float64, as :func:`linear_backward` for each expert.

    dX is that of ``input``: with ``rows`` each token's is the sum over its rows. An expert without rows gets zeros.
    """
    X = (input if rows is None else input[rows]).double()
    by_row = torch.zeros_like(X)
    grads = [torch.zeros_like(t, dtype=torch.float64) for t in (lora_A, lora_B, weight[..., 0])]
    for e, own in _groups(offsets):
        arguments = (weight[e], lora_A[e], lora_B[e], scaling, None if mask is None else mask[e], gradient)
        by_row[own], *of_expert = linear_backward(grad_output[own], X[own], *arguments)
        for all_experts, one in zip(grads, of_expert, strict=True):
            all_experts[e] = one
    if rows is None:
        return by_row, grads[0], grads[1], grads[2]
    return torch.zeros_like(input, dtype=torch.float64).index_add_(0, rows, by_row), grads[0], grads[1], grads[2]
