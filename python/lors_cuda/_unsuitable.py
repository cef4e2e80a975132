# SPDX-License-Identifier: Apache-2.0
# The reasons for which targets.py leaves out or refuses a module, each with what to do.
"""Why a module cannot be adapted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._checks import DTYPES, is_packed, listed
from ._distributed import is_offloaded, is_sharded, original_forward
from ._linears import computes_linear, is_linear
from ._weight_reads import weight_readers
from .experts import is_experts, routers_of, stack_names
from .sparse_linear import SparseLinear

# What libraries call the parts of a quantised weight: compressed-tensors, GPTQ and AWQ, fine-grained fp8, HQQ.
_CODE_NAMES = {"weight_packed", "weight_scale", "weight_scale_inv", "qweight", "W_q"}


class Places:
    """The place of each module and each parameter of a model, and so why a module cannot be adapted.

    Attributes:
        names_of: every name of each module.
        routers: `routers_of` the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._readers = weight_readers(model)
        self.names_of: dict[nn.Module, list[str]] = {}
        self._holders: dict[Tensor, list[nn.Module]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names_of.setdefault(module, []).append(name)
        for module in self.names_of:
            for parameter in module.parameters(recurse=False):
                self._holders.setdefault(parameter, []).append(module)
        self.routers = routers_of(model)

    def problem(self, module: nn.Module) -> str | None:
        """Why this module cannot be adapted; the words follow 'it'. None if it can."""
        is_stored = type(module) is SparseLinear
        reason = _stored_problem(module) if is_stored else _unsuitable(module)
        if reason is not None:
            return reason
        if module in self.routers:
            return (
                f"is the router of '{self.routers[module]}': the experts were trained on its choices. Name it in "
                "modules_to_save to train it whole, or leave it out"
            )
        if module in self._readers:
            return (
                f"has its weight read by {self._readers[module]}, always or on a faster path, instead of being called; "
                "an adapter would have no part in that. Leave it out"
            )
        return self._shared(module, module.weight_values if is_stored else module.weight)

    def stack_problem(self, module: nn.Module, stack: str) -> str | None:
        """The same of a stack of experts' weights."""
        return _unsuitable_stack(module, stack) or self._shared(module, module._parameters[stack])

    def _shared(self, module: nn.Module, weight: Any) -> str | None:
        others = [other for other in self._holders[weight] if other is not module]
        if others:
            return (
                f"shares its weight with '{self.names_of[others[0]][0]}' (tied weights): merging the adapter would "
                "untie them. Give it a weight of its own, or leave it out"
            )
        return None


def cannot_adapt(name: str, reason: str) -> str:
    """The sentence about a module that cannot be adapted."""
    return f"'{name}' cannot be adapted: it {reason} (exclude_modules=['{name}'] leaves it out)."


def _stored_problem(module: nn.Module) -> str | None:
    values: Any = module.weight_values
    return "is on the meta device, without values. Load the model's weights first" if values.is_meta else None


def is_quantized_elsewhere(module: nn.Module) -> bool:
    """Whether a layer holds codes, as another library made or loaded it."""
    scheme = getattr(module, "quantization_scheme", None)  # of compressed-tensors
    if getattr(scheme, "weights", None) is not None:
        return True
    own = {name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    return bool(own & _CODE_NAMES) or type(module).__module__.startswith("bitsandbytes.")


def _unsuitable(module: nn.Module) -> str | None:
    """Say why this module cannot be replaced by an adapted one, or None; the words follow 'it'."""
    kind = type(module).__name__
    if is_experts(module):
        named = [f"experts.{name}" for name in stack_names(module)]
        return f"is {article(kind)}, not one weight. Name its weights in target_parameters={named}, or leave it out"
    if is_quantized_elsewhere(module):
        return (
            f"is {article(kind)} whose weight another library has quantised. Load a compressed-tensors or GPTQ "
            "checkpoint with lors_cuda.load_sparse_checkpoint(directory, quantized='keep'), which keeps codes and "
            "mask, or load the model dequantised"
        )
    if not is_linear(module):
        return f"is {article(kind)}, and only nn.Linear can be adapted. Name linears in target_modules, or leave it out"
    weight = module._parameters.get("weight")
    if weight is None or hasattr(module, "parametrizations"):
        return (
            "computes its weight (torch.nn.utils.prune or parametrize). Make that permanent first: "
            "torch.nn.utils.prune.remove(module, 'weight') or parametrize.remove_parametrizations(module, 'weight')"
        )
    reason = not_loaded(module)
    if reason is not None:
        return reason
    if weight.dtype not in DTYPES:
        return f"has a weight of dtype {weight.dtype}, and a floating-point one is needed. Load the model unquantized"
    if weight.dim() != 2 or 0 in weight.shape:
        return f"has a weight of shape {tuple(weight.shape)}, and two dimensions of at least 1 are needed. Leave it out"
    semi_structured = torch.sparse.SparseSemiStructuredTensor  # which is converted
    if is_packed(weight) and not isinstance(weight, semi_structured) and not is_sharded(weight):
        return (
            f"has a weight of the class {type(weight).__name__}, which holds its values in packed tensors. Put "
            "weight.dequantize() in its place, or load the model unquantized"
        )
    if not computes_linear(module):
        return f"is {article(kind)} with a forward of its own, which would be lost. Use nn.Linear, or leave it out"
    return _lost_hooks(module)


def _unsuitable_stack(module: Any, name: str) -> str | None:
    """The same of a stack of experts' weights."""
    kind, stack = type(module).__name__, module._parameters[name]
    if module._is_expert_parallel:
        return (
            f"is {article(kind)} of which this process holds some experts (expert parallelism). Load the model "
            "without it, or leave it out"
        )
    reason = not_loaded(module, name)
    if reason is not None:
        return reason
    if stack.dtype not in DTYPES or is_packed(stack):
        return (
            f"is {article(kind)} whose weights are quantised ({stack.dtype}). Load the model dequantised "
            "(transformers: a quantization_config with dequantize=True), or leave it out"
        )
    biases = [f"{each}_bias" for each in stack_names(module) if module.has_bias]
    own = {key for key, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    others = sorted(own - {*stack_names(module), *biases})
    if others or 0 in stack.shape:
        what = f"has tensors of its own beside its weights ({listed(others)})" if others else "has no weights"
        return f"is {article(kind)} that {what}, which the layer in its place would not have. Leave it out"
    if original_forward(module) is not type(module).forward:
        return f"is {article(kind)} with a forward of its own, which would be lost. Leave it out"
    return _lost_hooks(module)


def _lost_hooks(module: nn.Module) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks, which would be lost. Remove them and register them on the converted module, or leave it out"
    return None


def not_loaded(module: nn.Module, parameter: str = "weight") -> str | None:
    """Why a module is not loaded as it must be, which loading the model otherwise mends; None if it is."""
    weight = module._parameters.get(parameter)
    if weight is not None and is_lazy(weight):
        return "has no shape yet (nn.LazyLinear). Run the model once before converting it"
    if is_offloaded(module):
        return (
            "has its weights offloaded by accelerate (device_map), which brings them for each forward only. Load the "
            "model without offloading to the CPU or the disk, or leave it out"
        )
    if weight is not None and weight.device.type == "meta":
        return "is on the meta device, without values. Load the model's weights first"
    return None


def article(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "AEIOU" else f"a {kind}"
