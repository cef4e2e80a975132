# SPDX-License-Identifier: Apache-2.0
# As _autograd.py for lors::linear. Saved for backward: the input as it was given, not the rows gathered from it.
"""The derivatives of lors::grouped_linear, the linear layer of a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._autograd import (
    SECOND_DERIVATIVES,
    Differentiable,
    adapter_tangents,
    all_zero,
    not_differentiable,
    primals,
    refuse_tangents,
)
from ._grid import Grid
from ._library import lors

_INPUT, _WEIGHT, _LORA_A, _LORA_B, _BIAS, _MERGED, _SCALES = 0, 2, 5, 6, 7, 10, 12  # positions among the arguments
_ARGUMENTS = 17

grouped_linear_backward = not_differentiable("grouped_linear_backward", SECOND_DERIVATIVES)


def _save(ctx: Any, args: tuple[Any, ...]) -> None:
    input, offsets, weight, mask, index, lora_A, lora_B, bias, ctx.scaling, ctx.gradient, merged, rows = args[:_SCALES]
    scales, zero_points, *ctx.grid = args[_SCALES:]
    ctx.tokens = input.shape[0]
    needs = ctx.needs_input_grad
    ctx.save_for_backward(
        input if needs[_LORA_A] or needs[_LORA_B] else None,
        offsets,
        weight,
        mask,
        index,
        lora_A,
        lora_B,
        bias if needs[_BIAS] else None,
        merged if needs[_INPUT] else None,
        rows,
        scales,
        zero_points,
    )
    frozen = (offsets, weight, mask, index)
    ctx.save_for_forward(
        input, *frozen, lora_A, lora_B, bias, merged, rows, scales, zero_points
    )  # only until jvp has run
    ctx.set_materialize_grads(False)


def _by_token(by_row: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """The sum over each token's rows, of which all have equally many: in their order, so always with the same bits."""
    wide = torch.promote_types(by_row.dtype, torch.float32)
    total = by_row.new_zeros((tokens, by_row.shape[1]), dtype=wide)
    by_owner = rows.argsort(stable=True).view(tokens, rows.shape[0] // max(tokens, 1))
    if not by_row.is_cpu and not by_row.is_meta:  # on the CPU the operator has looked
        assert_equally_often(rows, by_owner)
    for of_each_token in by_owner.unbind(1):
        total = total + by_row.index_select(0, of_each_token)
    return total.to(by_row.dtype)


def assert_equally_often(rows: Tensor, by_owner: Tensor) -> None:
    """Fail, on the device and without waiting for it, where line t of ``by_owner`` is not all rows of token t."""
    tokens = torch.arange(by_owner.shape[0], dtype=rows.dtype, device=rows.device)
    owners = rows.index_select(0, by_owner.flatten()).view_as(by_owner)
    torch._assert_async((owners == tokens[:, None]).all(), "lors::grouped_linear: rows has some tokens more often")


def _backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * _ARGUMENTS
    input, offsets, weight, mask, index, lora_A, lora_B, bias, merged, rows, *steps = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs_input_grad, needs_lora_A_grad, needs_lora_B_grad = needs[_INPUT], needs[_LORA_A], needs[_LORA_B]
    grad_input, grad_lora_A, grad_lora_B, grad_bias = grouped_linear_backward(
        grad_output,
        input,
        offsets,
        weight,
        mask,
        index,
        lora_A,
        lora_B,
        bias,
        ctx.scaling,
        ctx.gradient,
        needs_input_grad,
        needs_lora_A_grad,
        needs_lora_B_grad,
        merged,
        rows,
        *steps,
        *ctx.grid,
    )
    if needs_input_grad and rows is not None:
        grad_input = _by_token(grad_input, rows, ctx.tokens)
    return (
        grad_input if needs_input_grad else None,
        *(None,) * 4,
        grad_lora_A if needs_lora_A_grad else None,
        grad_lora_B if needs_lora_B_grad else None,
        None if bias is None else grad_bias,
        *(None,) * (_ARGUMENTS - _BIAS - 1),
    )


def _bias_by_row(bias: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """bias [E, N] of each row's expert, zeros for the rows of none. [rows, N]."""
    expert = torch.searchsorted(offsets, torch.arange(rows, dtype=offsets.dtype, device=offsets.device), right=True)
    return torch.cat([bias, bias.new_zeros(1, bias.shape[1])])[expert]


def _jvp(ctx: Any, *tangents: Any) -> Tensor:
    """As that of lors::linear."""
    input, offsets, weight, mask, index, lora_A, lora_B, _, merged, rows, *steps = primals(ctx)
    refuse_tangents(weight=tangents[_WEIGHT], merged=tangents[_MERGED], scales=tangents[_SCALES])
    parts, grid = [], Grid(*steps, *ctx.grid)
    if tangents[_INPUT] is not None:
        adapted = (weight, mask, index, lora_A, lora_B, None, ctx.scaling, "exact", merged)
        parts.append(lors.grouped_linear(tangents[_INPUT], offsets, *adapted, rows, *grid))
    for adapter in adapter_tangents(grid, weight, mask, index, lora_A, lora_B, tangents[_LORA_A], tangents[_LORA_B]):
        call = (*adapter, None, ctx.scaling, "exact", None, rows)
        parts.append(lors.grouped_linear(input, offsets, *call, *all_zero(grid)))
    if tangents[_BIAS] is not None:
        S = (input if rows is None else rows).shape[0]
        parts.append(_bias_by_row(tangents[_BIAS].to(input.dtype), offsets, S))
    return sum(parts[1:], parts[0])


grouped_linear = Differentiable("grouped_linear", lors.grouped_linear, _save, _backward, _jvp)
