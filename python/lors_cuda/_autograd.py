# SPDX-License-Identifier: Apache-2.0
# Saved for backward: the input, and references to the parameters. The merged weight never is, unless it was given: then
# whoever gave it keeps it anyway.
"""The operators' derivatives: one set of formulas, run by eager calls, registered for torch.compile and export."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from ._draws import NO_DRAWS
from ._grid import Grid
from ._library import lors
from .formats import pack_mask

_registry = torch.library.Library("lors", "IMPL")  # what it registers lasts as long as it does


def is_transformed() -> bool:
    """Whether torch.func or forward mode may be at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_in_graph() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is making a graph of this code."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


class Prefetch(Protocol):
    """In the place of a merged weight: one that is asked for when it is used, in forward and again in backward."""

    def taken(self, in_backward: bool) -> AbstractContextManager[Tensor | None]:
        """The merged weight, or None. What reads it is queued inside the block."""


class Differentiable:
    """A computation by one operator, and the derivatives of both.

    Args:
        op: the operator's name.
        compute: the computation; it calls the operator.
        save: ``save(ctx, args)`` keeps what the formulas need.
        backward, jvp: as in torch.autograd.Function.
        vmap: as in torch.library.register_vmap; None: one call for each sample.
    """

    def __init__(
        self,
        op: str,
        compute: Callable[..., Any],
        save: Callable[..., None],
        backward: Callable[..., Any],
        jvp: Callable[..., Any],
        vmap: Callable[..., Any] | None = None,
    ) -> None:
        def below_autograd(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return compute(*args)

        def below_level(*args: Any) -> Any:
            # An autograd.Function switches both modes off, also for the outer levels of torch.func.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return below_autograd(*args)

        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = compute(*args)
            save(ctx, args)
            return output

        def nested_jvp(*args: Any) -> Any:
            # torch switches forward mode off around jvp, so that one inside another would silently give zero.
            with forward_ad._set_fwd_grad_enabled(True):
                return jvp(*args)

        self.compute = compute
        schema = getattr(lors, op).default._schema
        self.defaults = tuple(argument.default_value for argument in schema.arguments)
        formulas = {"backward": staticmethod(backward), "jvp": staticmethod(nested_jvp)}
        # Three classes of the same formulas. torch.func needs a forward without ctx, which costs every call 20 us more
        # (torch binds the arguments to its signature), so that plain eager calls have one with it. And where the
        # dispatcher calls, torch.func has taken its levels apart already, and one of them is asked for.
        name = f"lors_{op}"
        self.eager: Any = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), **formulas})
        formulas["setup_context"] = staticmethod(lambda ctx, inputs, output: save(ctx, inputs))
        formulas["vmap"] = staticmethod(vmap or self.each)
        transformed = {"forward": staticmethod(below_autograd), **formulas}
        self.transformed: Any = type(name, (torch.autograd.Function,), transformed)
        level = {"forward": staticmethod(below_level), **formulas}
        self.level: Any = type(name, (torch.autograd.function._SingleLevelFunction,), level)
        _registry.impl(op, self.kernel, "Autograd")
        torch.library.register_vmap(f"lors::{op}", vmap or self.each, lib=_registry)

    def __call__(self, *args: Any) -> Any:
        """The result; in a graph that torch.compile, torch.export or torch.jit.trace makes, the operator's own."""
        if is_in_graph():
            return self.compute(*args)
        args = (*args, *self.defaults[len(args) :])
        if torch._C._are_functorch_transforms_active():
            return self.transformed.apply(*args)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return self.eager.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.compute(*args)

    def kernel(self, *args: Any) -> Any:
        """The operator's kernel for autograd, which the dispatcher calls; under torch.func for one of its levels."""
        args = (*args, *self.defaults[len(args) :])  # the dispatcher leaves out defaults
        if not torch._C._are_functorch_transforms_active():
            return self.eager.apply(*args)
        with enable_single_level_autograd_function():
            return self.level.apply(*args)

    def each(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """The rule for torch.vmap that always holds: one call for each sample."""
        samples = [
            self.compute(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(results) for results in zip(*samples, strict=True)), (0,) * len(samples[0])


def not_differentiable(op: str, sentence: str, vmap: Callable[..., Any] | None = None) -> Differentiable:
    """``lors::op``, every derivative of which is refused."""

    def save(ctx: Any, args: tuple[Any, ...]) -> None:
        pass

    def refuse(ctx: Any, *args: Any) -> None:
        raise RuntimeError(sentence)

    return Differentiable(op, getattr(lors, op), save, refuse, refuse, vmap)


# ---- the gradients --------------------------------------------------------------------------------------------------

SECOND_DERIVATIVES = (
    "lors_cuda does not support double backward, nor forward mode over its gradients (torch.func.hessian): they are "
    "not themselves differentiable. Call backward without create_graph=True, or use lors_cuda.reference for second "
    "derivatives."
)


def _linear_backward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    grad_output, bias, needs = args[0], args[7], args[10:13]
    if needs != (True, False, False) or bias is not None or any(dim is not None for dim in in_dims[1:]):
        return linear_backward.each(info, in_dims, *args)
    tokens = grad_output.movedim(in_dims[0], 0)
    grad_input, *nothing = lors.linear_backward(tokens.flatten(0, 1), *args[1:])
    return (grad_input.view(*tokens.shape[:2], grad_input.shape[1]), *nothing), (0, None, None, None)


linear_backward = not_differentiable("linear_backward", SECOND_DERIVATIVES, _linear_backward_vmap)
merge_backward = not_differentiable("merge_backward", SECOND_DERIVATIVES)
for _op in ("merged_operand", "sparse24_merge", "compress"):
    not_differentiable(
        _op, f"lors::{_op} has no derivatives; use lors_cuda.merge or lors_cuda.lors_linear, or detach its arguments."
    )


# ---- forward mode ---------------------------------------------------------------------------------------------------


def primals(ctx: Any) -> list[Any]:
    """What was saved for jvp, without the tangents that are being propagated."""
    return [None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors]


def refuse_tangents(**frozen: Tensor | None) -> None:
    for name, tangent in frozen.items():
        if tangent is not None:
            raise RuntimeError(
                f"{name} has a tangent, but LoRS freezes it: there are no derivatives with respect to it. "
                "Differentiate with respect to the input, lora_A, lora_B and the bias alone."
            )


def all_zero(grid: Grid) -> Grid:
    """A grid on which the same codes all stand for zero; nothing is requantised to it."""
    if grid.scales is None:
        return grid
    return Grid(grid.scales.new_zeros(()).expand(grid.scales.shape), grid.zero_points, grid.grid)


def adapter_tangents(
    grid: Grid,
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_A_tangent: Tensor | None,
    lora_B_tangent: Tensor | None,
) -> list[tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]]:
    """``M o (B dA)`` and ``M o (dB A)``, as adapters of a weight of zeros with its mask, on ``grid`` if any."""
    candidates = ((lora_A_tangent, lora_B), (lora_A, lora_B_tangent))
    pairs = [(A, B) for A, B in candidates if A is not None and B is not None]
    if pairs and index is None and mask is None:
        mask = pack_mask(weight != 0)
    zeros = weight if grid.grid else weight.new_zeros(()).expand(weight.shape)  # codes are zeros by their scales
    return [(zeros, mask, index, A, B) for A, B in pairs]


# ---- linear: input [..., K] to [..., N] -----------------------------------------------------------------------------

_INPUT, _WEIGHT, _LORA_A, _LORA_B, _BIAS, _MERGED, _SCALES = 0, 1, 4, 5, 6, 9, 13  # positions among the arguments


def _as_prefetch(merged: Tensor | Prefetch | None = None) -> Prefetch | None:
    return None if merged is None or isinstance(merged, Tensor) else merged


def _linear(input: Tensor, *args: Any) -> Tensor:
    prefetch = _as_prefetch(*args[_MERGED - 1 : _MERGED])
    if prefetch is not None:
        with prefetch.taken(False) as merged:
            return _linear(input, *args[: _MERGED - 1], merged, *args[_MERGED:])
    if input.dim() == 2:
        output: Tensor = lors.linear(input, *args)
        return output
    output = lors.linear(input.reshape(-1, input.shape[-1]), *args)
    # As torch's own linear, not a view: what is written into a view of a fresh result costs autograd a copy of its
    # history, and fully_shard loses its hook on it.
    return torch.ops.aten._unsafe_view(output, (*input.shape[:-1], output.shape[1]))


def _save_linear(ctx: Any, args: tuple[Any, ...]) -> None:
    input, weight, mask, index, lora_A, lora_B, bias, ctx.scaling, ctx.gradient, merged, *ctx.draws = args[:_SCALES]
    scales, zero_points, *ctx.grid = args[_SCALES:]
    ctx.prefetch = _as_prefetch(merged)
    if ctx.prefetch is not None:
        merged = None
    # Indexed, not unpacked: torch may append entries of its own to needs_input_grad.
    needs = ctx.needs_input_grad
    ctx.save_for_backward(
        input if needs[_LORA_A] or needs[_LORA_B] else None,
        weight,
        mask,
        index,
        lora_A,
        lora_B,
        bias if needs[_BIAS] else None,
        merged if needs[_INPUT] else None,
        scales,
        zero_points,
    )
    # Only until jvp has run, at once.
    ctx.save_for_forward(input, weight, mask, index, lora_A, lora_B, bias, merged, scales, zero_points)
    ctx.set_materialize_grads(False)  # so that jvp sees what has no tangent


def _linear_backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 18
    input, weight, mask, index, lora_A, lora_B, bias, merged, *steps = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs_input_grad, needs_lora_A_grad, needs_lora_B_grad = needs[_INPUT], needs[_LORA_A], needs[_LORA_B]
    leading = None
    if grad_output.dim() != 2:
        leading = grad_output.shape[:-1]
        grad_output = grad_output.reshape(-1, lora_B.shape[0])
        input = None if input is None else input.reshape(-1, lora_A.shape[1])
    prefetch = ctx.prefetch if needs_input_grad else None  # without that there is no merge
    with nullcontext(merged) if prefetch is None else prefetch.taken(True) as merged:
        grad_input, grad_lora_A, grad_lora_B, grad_bias = linear_backward(
            grad_output,
            input,
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
            *ctx.draws,
            *steps,
            *ctx.grid,
        )
    if leading is not None and needs_input_grad:
        grad_input = grad_input.view(*leading, grad_input.shape[1])
    return (
        grad_input if needs_input_grad else None,
        None,
        None,
        None,
        grad_lora_A if needs_lora_A_grad else None,
        grad_lora_B if needs_lora_B_grad else None,
        None if bias is None else grad_bias,
        *(None,) * 11,
    )


def _linear_jvp(ctx: Any, *tangents: Any) -> Tensor:
    """``dY = dX W~^T + X (s M o (dB A + B dA))^T + dbias``: the derivative of the forward, whatever ``gradient`` says.

    Rounding is taken for the identity, by chance as to nearest.

    It is itself differentiable, with the exact gradients.
    """
    input, weight, mask, index, lora_A, lora_B, _, merged, *steps = primals(ctx)
    refuse_tangents(weight=tangents[_WEIGHT], merged=tangents[_MERGED], scales=tangents[_SCALES])
    parts, grid = [], Grid(*steps, *ctx.grid)
    if tangents[_INPUT] is not None:
        adapted = (weight, mask, index, lora_A, lora_B)
        parts.append(_linear(tangents[_INPUT], *adapted, None, ctx.scaling, "exact", merged, *ctx.draws, *grid))
    for adapter in adapter_tangents(grid, weight, mask, index, lora_A, lora_B, tangents[_LORA_A], tangents[_LORA_B]):
        parts.append(_linear(input, *adapter, None, ctx.scaling, "exact", None, *NO_DRAWS, *all_zero(grid)))
    if tangents[_BIAS] is not None:
        parts.append(tangents[_BIAS].to(input.dtype).expand(*input.shape[:-1], lora_B.shape[0]))
    return sum(parts[1:], parts[0])


def _linear_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in in_dims[1:]):
        return linear.each(info, in_dims, *args)
    return _linear(args[_INPUT].movedim(in_dims[_INPUT], 0), *args[1:]), 0  # more tokens


class _Linear(Differentiable):
    def kernel(self, input: Tensor, *args: Any) -> Any:
        if not isinstance(input, Tensor) or input.dim() != 2:
            with torch._C._AutoDispatchBelowAutograd():
                return lors.linear(input, *args)  # which refuses it in a sentence
        return super().kernel(input, *args)


linear = _Linear("linear", _linear, _save_linear, _linear_backward, _linear_jvp, _linear_vmap)


# ---- merge ----------------------------------------------------------------------------------------------------------


def _save_merge(ctx: Any, args: tuple[Any, ...]) -> None:
    *adapted, ctx.scaling = args[:6]
    scales, zero_points, *ctx.grid = args[9:]
    ctx.save_for_backward(*adapted, scales, zero_points)
    ctx.save_for_forward(*adapted, scales, zero_points)
    ctx.set_materialize_grads(False)


def _merge_backward(ctx: Any, grad_merged: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_merged is None:
        return (None,) * 14
    *adapted, scales, zero_points = ctx.saved_tensors
    grads = merge_backward(grad_merged, *adapted, ctx.scaling, scales, zero_points, *ctx.grid)
    return None, None, None, *grads, *(None,) * 9


def _merge_jvp(ctx: Any, *tangents: Any) -> Tensor:
    weight_tangent, _, _, *factor_tangents = tangents[:5]
    refuse_tangents(weight=weight_tangent, scales=tangents[9])
    *adapted, scales, zero_points = primals(ctx)
    grid = Grid(scales, zero_points, *ctx.grid)
    adapters = adapter_tangents(grid, *adapted, *factor_tangents)
    parts = [lors.merge(*adapter, ctx.scaling, *NO_DRAWS, *all_zero(grid)) for adapter in adapters]
    return sum(parts[1:], parts[0])


merge = Differentiable("merge", lors.merge, _save_merge, _merge_backward, _merge_jvp)
