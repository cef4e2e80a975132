# SPDX-License-Identifier: Apache-2.0
"""The functional face of LoRS: :func:`lors_linear`, :func:`grouped_linear` and :func:`merge`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _autograd, _autograd_grouped
from ._checks import (
    GRADIENTS,
    check_adapters,
    check_choice,
    check_frozen,
    check_mask,
    check_tensor,
    check_weight,
    check_whole,
)
from ._draws import NO_DRAWS, Draws, rounding_draws
from ._grid import NOT_REQUANTIZED, Requantization
from ._merged_weight import GivesMergedWeight, MergedWeight
from .formats import pack_mask
from .quantization import SCALE_DTYPES
from .weight import SparseWeight


def lors_linear(
    input: Tensor,
    weight: Tensor | SparseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    gradient: str = "lors",
    cache: MergedWeight | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
) -> Tensor:
    """A linear layer with a masked low-rank adapter: ``Y = X (W + s M o (B A))^T + bias`` (arXiv 2501.08582, eq. 3).

    The merged weight is accumulated in float32 (float64 for float64), rounded once to the input's dtype, used and
    dropped; backward computes it again, so only ``input`` is saved beside references to the parameters.

    Args:
        input: [..., K] activations in the weight's dtype, of a quantised weight float32, bfloat16 or float16; under
            ``torch.autocast`` any floating dtype, cast to autocast's. Any strides, any number of leading dimensions,
            zero tokens included.
        weight: [N, K] frozen sparse weight with zeros, or a :class:`SparseWeight` of any layout. float32, bfloat16,
            float16, or float64 on the CPU. Its zeros off the mask may hold anything finite: they are read as zero.
        lora_A: [r, K] adapter in any of these dtypes; its gradient has its dtype.
        lora_B: [N, r] adapter in any of these dtypes; its gradient has its dtype.
        scaling: s, e.g. ``lora_alpha / r``. A 0-d tensor is read as a float; one that requires grad is refused.
        bias: [N] or None.
        mask: bool [N, K], True where the weight is kept, for a dense ``weight``. None: kept where ``weight != 0``.
        gradient: ``"lors"`` (the paper's adapter gradients: the mask is dropped and nothing N x K is formed) or
            ``"exact"`` (the true gradient of this function). The gradient of ``input`` is exact in both, and so is
            forward mode, which gives the derivative of this function whatever ``gradient`` says.
        cache: keeps the merged weight for the next call with the same tensors, see :func:`lors_cuda.merge_cache`.
        rounding: ``"nearest"``, or ``"stochastic"``: where the merged weight is of 16 bits, each value becomes one of
            its two neighbours, the likelier the nearer, so that the mean over seeds is the unrounded value and updates
            below half a step are not lost. What is representable stays as it is, zeros too. Backward draws the same.
        seed: of ``"stochastic"``, 0 to 2^63 - 1; the same seed gives the same bits.

    Returns:
        [..., N] in the dtype of ``input`` (autocast's under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes, dtypes or devices do not fit, ``weight`` requires grad, or ``gradient`` or ``rounding`` is
            unknown, or ``seed`` does not go with it.
        RuntimeError: no kernel of this build supports the device; or, in a second backward, that it is not supported.

    torch.func and forward mode: ``grad``, ``vjp``, ``jvp``, ``vmap``, ``jacrev``, ``jacfwd`` and ``linearize`` give
    derivatives with respect to ``input``, ``lora_A``, ``lora_B`` and ``bias``; derivatives of gradients (``hessian``, a
    backward with ``create_graph=True``) raise an error. A tangent of an adapter forms [N, K] tensors. ``vmap`` over the
    input alone is one call with more tokens, over other arguments and in per-sample gradients one call for each sample.
    """
    stored = _stored(weight, mask)
    check_adapters(stored, lora_A, lora_B)
    check_choice("gradient", gradient, GRADIENTS)
    scaling = _as_float(scaling)
    return _linear(input, stored, lora_A, lora_B, scaling, bias, gradient, cache, rounding_draws(rounding, seed))


def sparse_linear(input: Tensor, weight: SparseWeight, bias: Tensor | None = None) -> Tensor:
    """``Y = X W^T + bias``: :func:`lors_linear` without an adapter."""
    stored = _stored(weight, None)
    if stored.layout == "dense" and stored.quantization is None:
        stored = SparseWeight(stored.values)  # which are zero off the mask: it need not be read
    return _linear(input, stored, *stored.no_adapter(), 0.0, bias)


def layer_linear(
    input: Tensor,
    weight: SparseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    gradient: str,
    cache: GivesMergedWeight | None,
    draws: Draws,
    requantize: Requantization = NOT_REQUANTIZED,
) -> Tensor:
    """:func:`lors_linear` for a layer, which was checked when it was made: here Python checks what only it can see."""
    stored = _stored(weight, None)
    check_whole("lora_A", lora_A)
    check_whole("lora_B", lora_B)
    return _linear(input, stored, lora_A, lora_B, scaling, bias, gradient, cache, draws, requantize)


def _linear(
    input: Tensor,
    stored: SparseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    gradient: str = "lors",
    cache: GivesMergedWeight | None = None,
    draws: Draws = NO_DRAWS,
    requantize: Requantization = NOT_REQUANTIZED,
) -> Tensor:
    input = _checked_input(input, stored)
    _check_bias(bias, stored, stored.shape[:1])
    merged = None if cache is None else cache.operand(stored, lora_A, lora_B, scaling, input, draws, requantize)
    output: Tensor = _autograd.linear(
        input,
        stored.values,
        stored.mask_bits,
        stored.index,
        lora_A,
        lora_B,
        bias,
        scaling,
        gradient,
        merged,
        *draws,
        *stored.grid(requantize),
    )
    return output


def _checked_input(input: Tensor, stored: SparseWeight) -> Tensor:
    """``input`` [..., K] in the dtype that a call with this weight computes in."""
    check_tensor("input", input)
    device_type = stored.device.type
    # As torch does, autocast leaves float64 alone; it knows no meta device.
    if stored.dtype != torch.float64 and device_type != "meta" and torch.is_autocast_enabled(device_type):
        wanted = torch.get_autocast_dtype(device_type) if input.is_floating_point() else None
    elif stored.quantization is not None:
        wanted = input.dtype if input.dtype in SCALE_DTYPES else None
        if wanted is None:
            raise ValueError(
                f"input has dtype {input.dtype}; of a quantised weight it must be float32, bfloat16 or float16."
            )
    else:
        wanted = stored.dtype if input.dtype == stored.dtype else None
    if wanted is None:
        raise ValueError(
            f"input has dtype {input.dtype} and weight {stored.dtype}; convert one to the other, or run floating-point "
            "input under torch.autocast."
        )
    if input.dtype != wanted:
        input = input.to(wanted)
    if input.dim() == 0 or input.shape[-1] != stored.shape[1]:
        raise ValueError(
            f"input has shape {tuple(input.shape)}; its last dimension must be in_features = {stored.shape[1]} for a "
            f"weight of shape {tuple(stored.shape)}."
        )
    if input.device != stored.device:
        raise ValueError(f"input is on {input.device} and weight on {stored.device}; move them to the same device.")
    return input


def _check_bias(bias: Tensor | None, stored: SparseWeight, shape: tuple[int, ...]) -> None:
    if bias is None:
        return
    check_tensor("bias", bias)
    if bias.shape != shape:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; it must be {tuple(shape)} for a weight of shape "
            f"{tuple(stored.shape)}."
        )
    if bias.device != stored.device:
        raise ValueError(f"bias is on {bias.device} and weight on {stored.device}; move them to the same device.")


def grouped_linear(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor | SparseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    gradient: str = "lors",
    rows: Tensor | None = None,
) -> Tensor:
    """:func:`lors_linear` for the experts of a mixture: ``Y_e = X_e (W_e + s M_e o (B_e A_e))^T + bias_e``.

    The rows of an expert e follow each other, ``offsets[e - 1]`` to ``offsets[e]``. An expert without rows is not read,
    and its gradients are zeros.

    Args:
        input: [S, K] activations, sorted by expert, dtypes as in :func:`lors_linear`; or, with ``rows``, [T, K].
        offsets: int32 [E], where each expert's rows end, as torch.nn.functional.grouped_mm takes them: from 0 to S,
            none below the one before it. Rows beyond the last offset are of no expert: they and their gradients are
            zero. On the CPU the numbers are checked; on other devices that would wait for the device.
        weight: [E, N, K], or a :class:`SparseWeight` [E N, K] with the rows of expert e from ``e N`` on.
        lora_A: [E, r, K].
        lora_B: [E, N, r].
        scaling: s.
        bias: [E, N] or None.
        mask: bool [E, N, K] for a dense ``weight``. None: kept where ``weight != 0``.
        gradient: "lors" or "exact".
        rows: int32 [S]: row i is ``input[rows[i]]``, so that no copy for each of a token's experts is kept. Every row
            of ``input`` must be there equally often, as a router's choices are; its gradient is the sum over its rows,
            always in the same order.

    Returns:
        [S, N] in the dtype of ``input`` (autocast's under autocast).

    Raises:
        TypeError, ValueError: as :func:`lors_linear`.
        RuntimeError: the numbers in ``offsets`` or ``rows`` are not as said above (CPU; on a GPU rows that occur more
            often than others fail in backward, when the device is waited for); and as :func:`lors_linear`.

    Derivatives with respect to ``input``, ``lora_A``, ``lora_B`` and ``bias`` are those of :func:`lors_linear`;
    ``vmap`` is one call for each sample.
    """
    stored = _stored_experts(weight, mask)
    check_adapters(stored, lora_A, lora_B, experts=True)
    if isinstance(weight, Tensor) and weight.shape[0] != lora_A.shape[0]:
        raise ValueError(f"weight has {weight.shape[0]} experts and lora_A {lora_A.shape[0]}; they must be the same.")
    check_choice("gradient", gradient, GRADIENTS)
    return _grouped_linear(input, offsets, stored, lora_A, lora_B, _as_float(scaling), bias, gradient, rows=rows)


def layer_grouped_linear(
    input: Tensor,
    offsets: Tensor,
    weight: SparseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    gradient: str,
    cache: GivesMergedWeight | None,
    requantize: Requantization = NOT_REQUANTIZED,
    rows: Tensor | None = None,
) -> Tensor:
    """:func:`grouped_linear` for a layer, as :func:`layer_linear`."""
    stored = _stored(weight, None)
    check_whole("lora_A", lora_A)
    check_whole("lora_B", lora_B)
    return _grouped_linear(input, offsets, stored, lora_A, lora_B, scaling, bias, gradient, cache, requantize, rows)


def _grouped_linear(
    input: Tensor,
    offsets: Tensor,
    stored: SparseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    gradient: str,
    cache: GivesMergedWeight | None = None,
    requantize: Requantization = NOT_REQUANTIZED,
    rows: Tensor | None = None,
) -> Tensor:
    input = _checked_input(input, stored)
    if input.dim() != 2:
        raise ValueError(f"input has shape {tuple(input.shape)}; it must be [rows, in_features], flattened.")
    _check_bias(bias, stored, lora_B.shape[:2])
    merged = None if cache is None else cache.operand(stored, lora_A, lora_B, scaling, input, NO_DRAWS, requantize)
    output: Tensor = _autograd_grouped.grouped_linear(
        input,
        _whole_numbers("offsets", offsets, stored, lora_A.shape[0]),
        stored.values,
        stored.mask_bits,
        stored.index,
        lora_A,
        lora_B,
        bias,
        scaling,
        gradient,
        merged,
        None if rows is None else _whole_numbers("rows", rows, stored),
        *stored.grid(requantize),
    )
    return output


def _whole_numbers(name: str, numbers: Tensor, stored: SparseWeight, count: int | None = None) -> Tensor:
    """``offsets`` or ``rows``; what their numbers are is for the operator to see."""
    check_tensor(name, numbers)
    if numbers.dtype != torch.int32 or numbers.dim() != 1 or count not in (None, numbers.shape[0]):
        raise ValueError(
            f"{name} is {numbers.dtype} with shape {tuple(numbers.shape)}; it must be torch.int32 "
            f"[{'rows' if count is None else count}]."
        )
    if numbers.device != stored.device:
        raise ValueError(f"{name} is on {numbers.device} and weight on {stored.device}; move them to the same device.")
    return numbers


def merge(
    weight: Tensor | SparseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
) -> Tensor:
    """The merged weight ``W~ = W + s M o (B A)`` as a dense tensor, exactly +0 off the mask.

    Arguments as in :func:`lors_linear`. Accumulated in float32 (float64 for float64) and rounded once. Differentiable
    in ``lora_A`` and ``lora_B``, with the exact gradient, also in forward mode. Non-finite values propagate; nothing is
    synchronised.

    Returns:
        [N, K] in the weight's dtype; [E, N, K] of a stack of experts, with arguments as in :func:`grouped_linear`, for
        which ``rounding`` must be ``"nearest"``.
    """
    is_stack = isinstance(lora_A, Tensor) and lora_A.dim() == 3
    stored = _stored_experts(weight, mask) if is_stack else _stored(weight, mask)
    check_adapters(stored, lora_A, lora_B, experts=is_stack)
    return stored_merge(stored, lora_A, lora_B, _as_float(scaling), rounding_draws(rounding, seed))


def stored_merge(
    weight: SparseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    draws: Draws,
    requantize: Requantization = NOT_REQUANTIZED,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`merge` for a layer, of a quantised weight rounded once to ``dtype``."""
    grid = weight.grid(requantize, dtype)
    stored = (weight.values, weight.mask_bits, weight.index)
    merged: Tensor = _autograd.merge(*stored, lora_A, lora_B, scaling, *draws, *grid)
    if lora_B.dim() == 3:
        merged = merged.unflatten(0, lora_B.shape[:2])
    return merged if dtype is None else merged.to(dtype)


def _as_float(scaling: float | Tensor) -> float:
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0:
            raise ValueError(f"scaling has shape {tuple(scaling.shape)}; it must be a float or a 0-d tensor.")
        if scaling.requires_grad or (not torch.compiler.is_compiling() and _autograd.is_transformed()):
            raise ValueError(
                "scaling is a tensor that requires grad, or is used under torch.func or in forward mode; it is read as "
                "a number, which would lose its derivatives. Pass a float, or scaling 1.0 with lora_B * scaling, which "
                "is the same and differentiable."
            )
        scaling = scaling.item()
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling is a {type(scaling).__name__}; it must be a float or a 0-d tensor.")
    return float(scaling)


def _stored(weight: Tensor | SparseWeight, mask: Tensor | None) -> SparseWeight:
    """``weight`` as it is stored; a dense tensor is not looked at, only referenced."""
    if isinstance(weight, SparseWeight):
        if mask is not None:
            raise ValueError("mask was given together with a SparseWeight, which has its own; leave mask out.")
        check_whole("weight", weight.values)
        check_frozen(weight.values)
        return weight
    check_weight(weight)
    if mask is None:
        return SparseWeight(weight)
    check_mask(mask, weight)
    return SparseWeight(weight, pack_mask(mask))


def _stored_experts(weight: Tensor | SparseWeight, mask: Tensor | None) -> SparseWeight:
    """The same of a stack: [E, N, K], as [E N, K]."""
    if isinstance(weight, SparseWeight):
        return _stored(weight, mask)
    check_tensor("weight", weight)
    if weight.dim() != 3:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be [experts, out_features, in_features], or a "
            "SparseWeight."
        )
    if mask is not None:
        check_mask(mask, weight)
    return _stored(weight.flatten(0, 1), None if mask is None else mask.flatten(0, 1))
