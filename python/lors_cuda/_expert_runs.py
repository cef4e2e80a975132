# SPDX-License-Identifier: Apache-2.0
# A plain model's experts, run one after another, so that Wanda sees the rows of each and estimate_gradients forms one
# expert's gradient at a time. Sorting, gate and sum over each token's experts are `run_experts`.
"""Run a model's experts with products of one's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .experts import run_experts, stack_names, stack_of

# product(name of the stack, expert, its rows [T_e, K], the tokens they are of [T_e], T) -> [T_e, N], bias included
Product = Callable[[str, int, Tensor, Tensor, int], Tensor]


def expert_product(experts: Any, name: str, expert: int, input: Tensor) -> Tensor:
    """``input`` [T_e, K] times one expert's weight, bias included: [T_e, N]."""
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(input, stack_of(experts, name)[expert], bias)


@contextlib.contextmanager
def running_experts(experts: nn.Module, product: Product) -> Iterator[None]:
    """Let a module that `is_experts` multiply by ``product``, inside a `with` block, which is called for the experts
    that have rows. It computes what it did, in float32 sums of another order, if the product is `expert_product`."""
    own = vars(experts)
    before = own.get("forward")  # of accelerate, say

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _forward(experts, product, hidden_states, top_k_index, top_k_weights)

    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _forward(experts: nn.Module, product: Product, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    up_name, down_name = stack_names(experts)
    tokens: list[Tensor] = []

    def multiply(name: str, input: Tensor, offsets: Tensor) -> Tensor:
        parts, begin = [], 0
        for expert, end in enumerate(offsets.tolist()):
            if end > begin:
                parts.append(product(name, expert, input[begin:end], tokens[0][begin:end], hidden_states.shape[0]))
            begin = end
        # Rows of no expert.
        parts.append(input.new_zeros(input.shape[0] - begin, stack_of(experts, name).shape[1]))
        return torch.cat(parts)

    def up(states: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
        tokens.append(rows)
        return multiply(up_name, states.index_select(0, rows), offsets)

    def down(states: Tensor, offsets: Tensor) -> Tensor:
        return multiply(down_name, states, offsets)

    return run_experts(experts, up, down, hidden_states, index, weights)
