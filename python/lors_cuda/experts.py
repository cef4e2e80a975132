# SPDX-License-Identifier: Apache-2.0
# Mixtures of experts as transformers 5 keeps them: a module, made by its use_experts_implementation, whose parameters
# are the weights of all experts of a layer, stacked. Everything that looks for such stacks finds them here.
"""The experts of a model: their stacked weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

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
