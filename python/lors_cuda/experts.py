# SPDX-License-Identifier: Apache-2.0
# Mixtures of experts as transformers 5 keeps them: a module, made by its use_experts_implementation, whose parameters
# are the weights of all experts of a layer, stacked. Everything that looks for such stacks finds them here. Stored they
# are one weight [E N, K], the experts' rows below each other.
"""The experts of a model: their stacked weights, and the layers with adapters in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._linears import is_linear
from .dense_view import dense_tensor
from .functional import layer_grouped_linear
from .linear import LoRSLinear
from .sparse_linear import SparseLinear
from .weight import SparseWeight

# What transformers' use_experts_implementation gives a module, beside its parameters.
_MARKS = ("num_experts", "is_transposed", "has_gate", "has_bias", "_apply_gate")


def is_experts(module: nn.Module) -> bool:
    """Whether the module is a layer's experts, of a class that transformers' ``use_experts_implementation`` made."""
    return all(hasattr(module, mark) for mark in _MARKS) and all(
        getattr(module._parameters.get(name), "ndim", 0) == 3 for name in stack_names(module)
    )


def stack_names(module: nn.Module) -> tuple[str, str]:
    """The names of the two stacks of a module that `is_experts`, in the order in which it multiplies by them."""
    experts: Any = module
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def expert_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every stack of experts' weights of a model, in the model's order; of a module with several names by its first.

    Yields:
        The path of the stack ("model.layers.0.mlp.experts.down_proj"), the module that has it as a parameter, and the
        parameter's name there.
    """
    for path, module in model.named_modules():
        if is_experts(module):
            for name in stack_names(module):
                yield f"{path}.{name}".lstrip("."), module, name


def stack_of(module: nn.Module, name: str) -> Tensor:
    """A stack as [E, N, K], E experts with N outputs and K inputs each: the parameter, or its transposed view where the
    family keeps [E, K, N] (gpt_oss). Writing to it in place writes to the model."""
    experts: Any = module
    stack: Tensor = getattr(experts, name).detach()
    return stack.transpose(1, 2) if experts.is_transposed else stack


def routers_of(model: nn.Module) -> dict[nn.Module, str]:
    """{linear: the name of the experts} of the linears that choose among a layer's experts: they are, or are inside,
    what is called "gate" or "router" beside experts of any class."""
    found: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        beside, _, called = path.rpartition(".")
        if called != "experts" and not is_experts(module) and not isinstance(module, LoRSExperts):
            continue
        for name in ("gate", "router"):
            router = getattr(model.get_submodule(beside), name, None)
            parts = router.modules() if isinstance(router, nn.Module) else ()
            found.update({part: path for part in parts if is_linear(part)})
    return found


def run_experts(
    experts: nn.Module,
    up: Callable[[Tensor, Tensor, Tensor], Tensor],
    down: Callable[[Tensor, Tensor], Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What a module that `is_experts` computes, with its two products given; no shape depends on the routing.

    Args:
        experts: the module, whose gate, activation and norm are used.
        up: up(hidden_states, offsets int32 [E], rows int32 [S]): row i is the product, bias included, of
            hidden_states[rows[i]] with the expert that owns it, expert e owning rows [offsets[e - 1], offsets[e]). Rows
            beyond the last belong to none (an index of E or more, which some families give to mean no expert) and are
            zero.
        down: down(states [S, I], offsets), likewise.
        hidden_states: [T, H].
        top_k_index: [T, k], the experts of each token. S is T k.
        top_k_weights: [T, k], their routing weights.

    Returns:
        [T, H]: the sum over each token's experts, in float32 at least, in the dtype of hidden_states.
    """
    module: Any = experts
    k = top_k_index.shape[-1]
    expert_of_row, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(module.num_experts, device=order.device, dtype=expert_of_row.dtype)
    offsets = torch.searchsorted(expert_of_row, numbers, right=True, out_int32=True)
    states = up(hidden_states, offsets, (order // k).int())
    states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
    states = down(states, offsets)
    if getattr(module, "has_post_expert_norm", False):
        states = module.post_expert_norm(states)
    # index_select, whose gradient adds once to each place: the same bits in every run, also on CUDA.
    states = states * top_k_weights.reshape(-1).index_select(0, order)[:, None]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    by_token = states.index_select(0, places).unflatten(0, (-1, k))
    return by_token.sum(dim=1).to(hidden_states.dtype)


class SparseExpertWeight(SparseLinear):
    """The frozen weights of a layer's experts, stacked: a :class:`SparseLinear` of :class:`LoRSExperts` that is not
    adapted. Made by :func:`lors_cuda.get_lors_model`; see :class:`LoRSExpertWeight`."""

    num_experts: int

    def forward(self, input: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """As :meth:`LoRSExpertWeight.forward`, without adapters."""
        weight = self.check_mask()
        none = weight.values.new_empty(0, dtype=weight.dtype)
        lora_A = none.view(self.num_experts, 0, self.in_features)
        lora_B = none.view(self.num_experts, self.out_features, 0)
        return layer_grouped_linear(input, offsets, weight, lora_A, lora_B, 0.0, self.bias, "lors", None, rows=rows)

    def merge(self) -> Tensor:
        """The frozen stack [E, N, K], dense."""
        self.check_mask(always=True)
        return self._as_before(dense_tensor(self).detach())


class LoRSExpertWeight(LoRSLinear):
    """The frozen sparse weights of a layer's experts with one masked low-rank adapter each: of expert e
    ``Y_e = X_e (W_e + s M_e o (B_e A_e))^T + bias_e``.

    A :class:`LoRSLinear` (LoRS, arXiv 2501.08582) with one dimension more, which holds the weights of all experts below
    each other, so that what goes through a model's LoRS layers finds it. E is the number of experts, N and K are
    ``out_features`` and ``in_features`` of each. Its rounding is always to nearest.

    Attributes:
        num_experts: E.
        sparse_weight: [E N, K], rows e N to (e + 1) N those of expert e.
        lora_A: Parameter [E, r, K], Kaiming-uniform at first.
        lora_B: Parameter [E, N, r], zero at first.
        bias: frozen Parameter [E, N] or None.
        weight: [E, N, K], dense.
    """

    num_experts: int

    def forward(self, input: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The products of the rows of all experts, [S, N].

        Args:
            input: [S, K], sorted by expert; with ``rows`` any [T, K].
            offsets: int32 [E], the number of rows of experts 0 to e together. Rows beyond the last are zero.
            rows: int32 [S]: row i of the product is of input[rows[i]]. Each row of input must occur equally often.
        """
        if not self.adapter_enabled:
            return SparseExpertWeight.forward(self, input, offsets, rows)  # type: ignore[arg-type]
        return layer_grouped_linear(
            input,
            offsets,
            self.check_mask(),
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.bias,
            self.gradient,
            self.merged_weight,
            self.requantization,
            rows=rows,
        )

    def merge(self) -> Tensor:  # type: ignore[override]
        """The stack [E, N, K] with the adapters merged in, dense: the masks preserved, exact zeros off them.

        Raises:
            ValueError: as :meth:`LoRSLinear.merge`.
        """
        return self._as_before(self._checked_merge())


class LoRSExperts(nn.Module):
    """A layer's experts, stored sparse, with masked adapters: in the place of the module of transformers.

    Made by :func:`lors_cuda.get_lors_model`. It runs on its own kernels, whatever ``config._experts_implementation``
    says. Its children are called as the parameters were, ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, beside
    the children of the module before.

    Args:
        experts: a module that `is_experts`. It is kept, and emptied of its parameters, for what is not a product: the
            gate, the activation, the order of dimensions.
        layout: how the stacks are stored, see :meth:`SparseWeight.from_dense`.
        adapters: {parameter: the options of :class:`LoRSLinear`} of the stacks that are adapted; the other one is
            stored frozen.

    Raises:
        ValueError: a stack does not fit the layout, or the rank; the module is unchanged.
    """

    def __init__(self, experts: nn.Module, layout: str, adapters: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._before = (experts,)  # not a child: what is left of it has no tensors of its own
        self.num_experts = int(vars(experts)["num_experts"])
        layers: dict[str, SparseLinear] = {}
        for name in stack_names(experts):
            weight = SparseWeight.from_dense(stack_of(experts, name).flatten(0, 1), layout)
            bias = _bias_of(experts, name)
            if name in adapters:
                layers[name] = LoRSExpertWeight(weight, bias, num_experts=self.num_experts, **adapters[name])
            else:
                layers[name] = SparseExpertWeight(weight, bias, num_experts=self.num_experts)
        for name, layer in layers.items():
            self.add_module(name, layer)
            for key in (name, f"{name}_bias"):
                if key in experts._parameters:
                    experts._parameters[key] = None
        for name, child in experts.named_children():
            self.add_module(name, child)
        self.train(experts.training)

    @property
    def before(self) -> nn.Module:
        """The module in whose place this one is."""
        return self._before[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] to [T, H], as the module before; ``top_k_index`` and ``top_k_weights`` [T, k]."""
        up, down = (self.get_submodule(name) for name in stack_names(self.before))
        return run_experts(self.before, up, down, hidden_states, top_k_index, top_k_weights)

    def merge(self) -> nn.Module:
        """The module before, with the adapters merged into its parameters, frozen, in its own order of dimensions.

        Raises:
            ValueError: as :meth:`LoRSLinear.merge`; nothing was changed.
        """
        return self._restored({name: layer.merge() for name, layer in self._stacks()})

    def without_adapters(self) -> nn.Module:
        """The module before, with its own weights."""
        return self._restored({name: SparseExpertWeight.merge(layer.storage) for name, layer in self._stacks()})

    def _stacks(self) -> Iterator[tuple[str, Any]]:
        for name in stack_names(self.before):
            yield name, self.get_submodule(name)

    def _restored(self, stacks: dict[str, Tensor]) -> nn.Module:
        experts = self.before
        transposed = vars(experts)["is_transposed"]
        for name, stack in stacks.items():
            kept = stack.transpose(1, 2).contiguous() if transposed else stack
            experts._parameters[name] = nn.Parameter(kept, requires_grad=False)
            if f"{name}_bias" in experts._parameters:
                layer: Any = self.get_submodule(name)
                experts._parameters[f"{name}_bias"] = layer.storage.bias
        return experts.train(self.training)

    def extra_repr(self) -> str:
        return f"in the place of {type(self.before).__name__}"


def _bias_of(experts: nn.Module, name: str) -> Tensor | None:
    return experts._parameters[f"{name}_bias"] if vars(experts)["has_bias"] else None
