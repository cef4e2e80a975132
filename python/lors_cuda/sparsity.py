# SPDX-License-Identifier: Apache-2.0
# The weights of a model and how many of them are zero: its linears, its experts, and all of it. Any model is measured;
# which modules can be adapted is another question (targets.py). Called by pruning, the command line and the callback.
"""How sparse a model is: the share of zeros of its linears, and of the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._checks import check_whole, is_packed, listed
from ._linears import is_conv1d, is_linear, plain
from .config import ALL_LINEAR, LoRSConfig, selects
from .experts import is_experts, routers_of, stack_names, stack_of
from .sparse_linear import SparseLinear
from .targets import Target, output_heads

LINEAR, ROUTER, EXPERTS, HEAD, EMBEDDING, OTHER = "linear", "router", "experts", "output head", "embedding", "other"


@dataclass(frozen=True)
class Weight:
    """A weight of a model with two dimensions or more; vectors (norms, biases) are none.

    Attributes:
        name: of the linear that it belongs to; of the parameter itself, where that is no linear's.
        names: all names of the module that holds it, and ``name``.
        module: that module.
        values: as stored; of a sparse layer its stored values.
        shape: dense: (N, K) of a linear, also of transformers' Conv1D, which stores it as [K, N]; (E, N, K) of a stack
            of experts' weights, also of one that is stored transposed.
        kind: "linear", "router" (one that chooses among experts), "experts", "output head", "embedding" or "other".
    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    values: Tensor
    shape: tuple[int, ...]
    kind: str

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def is_stack(self) -> bool:
        """Whether these are the stacked weights of a module that `is_experts`."""
        return _is_stack(self.module, self.name.rpartition(".")[2])

    @property
    def matrices(self) -> Tensor:
        """The values as [E, N, K], E matrices along whose rows patterns such as 2:4 run: one of a linear, one of each
        expert of a stack. A view, transposed where the model stores them so."""
        if self.is_stack:
            return stack_of(self.module, self.name.rpartition(".")[2])
        values = self.values.detach()
        return (values.T if is_conv1d(self.module) else values)[None]

    def counted(self) -> LayerSparsity | None:
        """Its zeros; None where they cannot be counted: quantized weights, and those on the meta device."""
        check_whole(f"The weight of '{self.name}'", self.values)
        values = self.values
        if isinstance(values, torch.sparse.SparseSemiStructuredTensor):
            values = plain(values)
        if isinstance(self.module, SparseLinear) and self.module.kind and not values.is_meta:
            values = self.module.sparse_weight.to_dense()
        if values.is_meta or is_packed(values) or not values.is_floating_point():
            return None
        if values.layout != torch.strided:
            values = values.to_dense()
        if values.itemsize == 1:
            values = values.float()  # torch counts no 8-bit floats
        return LayerSparsity(self.name, self.shape, self.numel - int(torch.count_nonzero(values)), self.kind)


@dataclass(frozen=True)
class LayerSparsity:
    """The number of zeros in a weight.

    Attributes:
        name: the linear's name in the model, or the parameter's where that is no linear's.
        shape: (N, K); with more dimensions where the model stores it so (experts).
        zeros: weights that are 0, -0.0 included.
        kind: "linear", "router" (one that chooses among experts), "experts", "output head", "embedding" or "other".
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    kind: str = LINEAR

    @property
    def weights(self) -> int:
        """How many it has."""
        return torch.Size(self.shape).numel()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / max(self.weights, 1)


@dataclass(frozen=True)
class ModelSparsity(Sequence[LayerSparsity]):
    """The sparsity of some layers of a model, of which this is a sequence, and of the whole model.

    Its text is what the commands print: ``50.00% over 14 linears, 41.18% over all weights of the model``; with experts
    each part has its share of all weights: ``50.00% over 8 linears (5.0% of the weights), 0.00% over the experts (93.1%
    of the weights), 2.50% over all weights of the model``.

    Attributes:
        layers: the layers that were asked for.
        rest: all other weights of the model with two dimensions or more.
    """

    layers: tuple[LayerSparsity, ...]
    rest: tuple[LayerSparsity, ...]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over `layers`."""
        return total_sparsity(self.layers)

    @property
    def model_sparsity(self) -> float:
        """Fraction of zeros over all weights of the model: linears, experts, embeddings, head."""
        return total_sparsity((*self.layers, *self.rest))

    @property
    def experts(self) -> tuple[LayerSparsity, ...]:
        """All stacks of experts of the model, asked for or not."""
        return tuple(layer for layer in (*self.layers, *self.rest) if layer.kind == EXPERTS)

    @property
    def expert_sparsity(self) -> float | None:
        """Fraction of zeros over all experts of the model; None for a model without any."""
        return total_sparsity(self.experts) if self.experts else None

    def __str__(self) -> str:
        linears = [layer for layer in self.layers if layer.kind != EXPERTS]
        parts = [f"{total_sparsity(linears):.2%} over {len(linears)} linears"]
        if self.experts:
            everything = sum(layer.weights for layer in (*self.layers, *self.rest))
            parts.append(f"{total_sparsity(self.experts):.2%} over the experts")
            for index, layers in enumerate((linears, self.experts)):
                parts[index] += f" ({sum(layer.weights for layer in layers) / everything:.1%} of the weights)"
        return ", ".join([*parts, f"{self.model_sparsity:.2%} over all weights of the model"])

    def to_dict(self) -> dict[str, Any]:
        """What the commands give as JSON."""
        return {
            "sparsity": self.sparsity,
            "expert_sparsity": self.expert_sparsity,
            "model_sparsity": self.model_sparsity,
            "layers": {layer.name: layer.sparsity for layer in self.layers},
        }

    @overload
    def __getitem__(self, index: int) -> LayerSparsity: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerSparsity, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerSparsity | tuple[LayerSparsity, ...]:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)


def measure_sparsity(
    model: nn.Module, config: LoRSConfig | None = None, *, targets: Sequence[Target] | None = None
) -> ModelSparsity:
    """Count the zeros of a model, whatever it is made of; nothing is refused because it cannot be adapted.

    Its layers are all linears (subclasses of nn.Linear, transformers' Conv1D, sparse layers) and all experts, except
    the output head. The weight of an adapted layer is measured without its adapter.

    Args:
        model: any model.
        config: its target_modules and exclude_modules choose the layers by their names instead.
        targets: these are the layers instead, what `targets.find_targets` found in this model.

    Raises:
        ValueError: the names choose nothing; or a weight is a DTensor.
    """
    if targets is None:
        chosen = {weight.name for weight in choose(list(weights_of(model)), config)}
    else:
        chosen = {target.name for target in targets}
    return measured(model, chosen)


def measured(model: nn.Module, chosen: Collection[str]) -> ModelSparsity:
    """The sparsity of a model whose layers are the weights of these names."""
    layers, rest, uncounted = [], [], []
    for weight in weights_of(model):
        counted = weight.counted()
        if counted is None:
            uncounted.append(weight.name)
        elif weight.name in chosen:
            layers.append(counted)
        else:
            rest.append(counted)
    if uncounted:
        warnings.warn(
            f"The zeros of {listed(uncounted)} were not counted: these weights are quantized, or have no values in "
            "memory. The sparsity is that of the others.",
            UserWarning,
            stacklevel=3,
        )
    return ModelSparsity(tuple(layers), tuple(rest))


def total_sparsity(layers: Iterable[LayerSparsity]) -> float:
    """Fraction of zeros over all layers together; 0 for none."""
    counts = [(layer.zeros, layer.weights) for layer in layers]
    return sum(zeros for zeros, _ in counts) / max(sum(weights for _, weights in counts), 1)


def choose(weights: Sequence[Weight], config: LoRSConfig | None) -> list[Weight]:
    """The linears and experts that a configuration chooses by name: linears by its target_modules, experts by its
    target_parameters, both less its exclude_modules; None, or "all-linear": all but routers.

    Raises:
        ValueError: what is named is not there, or all of it is excluded.
    """
    candidates = [weight for weight in weights if weight.kind in (LINEAR, EXPERTS)]
    if config is None:
        return candidates
    config.validate()
    wanted, found = config.target_modules, candidates
    if wanted != ALL_LINEAR:
        # A list or a pattern may also name the output head and routers.
        found = [weight for weight in weights if weight.kind in (LINEAR, ROUTER, HEAD) and _named(weight, wanted)]
        if wanted and not found:
            linears = [weight.name for weight in candidates if weight.kind == LINEAR]
            raise ValueError(
                f"target_modules={wanted!r} matches no linear of the model. It has {listed(linears)}: give suffixes of "
                f"such names in a list, a regular expression for the whole name, or '{ALL_LINEAR}'. "
                "target_parameters names experts."
            )
    if config.target_parameters is not None:
        stacks = [weight for weight in candidates if weight.kind == EXPERTS]
        named = [weight for weight in stacks if _named(weight, config.target_parameters)]
        if not named:
            raise ValueError(
                f"target_parameters={config.target_parameters!r} names no experts of the model. It has "
                f"{listed([weight.name for weight in stacks]) or 'none'}."
            )
        found = [weight for weight in found if weight.kind != EXPERTS] + named
    left = [weight for weight in found if not _named(weight, config.exclude_modules)]
    if found and not left:
        raise ValueError(f"exclude_modules={config.exclude_modules!r} leaves nothing of what was selected.")
    return left


def _named(weight: Weight, wanted: str | list[str] | None) -> bool:
    return bool(wanted) and any(selects(wanted, name) for name in weight.names)


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """Every weight of a model with two dimensions or more, once, in the model's order; adapters are left out."""
    heads = {id(part) for head in (*output_heads(model), *task_heads(model).values()) for part in head.modules()}
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    inner = set().union(*(set(_not_the_models(module)) for module in names_of))
    # A linear whose weight is an embedding's, or the output head's, is that embedding or head.
    others = [m for m in names_of if m not in inner and (not is_linear(m) or id(m) in heads)]
    tied = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    seen, routers = set[int](), routers_of(model)
    for module, names in names_of.items():
        if module in inner:
            continue
        kind = HEAD if id(module) in heads else ROUTER if module in routers else LINEAR
        if isinstance(module, SparseLinear):
            every, dense = tuple(names), (module.out_features, module.in_features)
            if module.num_experts is None:
                yield Weight(names[0], every, module, module.weight_values, dense, kind)
            else:
                every += tuple(name.rpartition(".")[0] for name in names)
                stacked = (module.num_experts, *dense)
                yield Weight(names[0], every, module, module.weight_values, stacked, EXPERTS)
            continue
        own = dict(module._parameters)
        if is_linear(module):
            own.pop("weight_orig", None)  # of torch.nn.utils.prune; `weight` is what is used
            own["weight"] = cast(nn.Parameter, module.weight)
        for key, values in own.items():
            if values is None or is_lazy(values) or id(values) in seen or values.dim() < 2:
                continue
            if kind == LINEAR and is_linear(module) and id(values) in tied:
                continue
            if values is module._parameters.get(key):  # the id of a computed tensor may soon be another's
                seen.add(id(values))
            name = f"{names[0]}.{key}".lstrip(".")
            if is_linear(module) and key == "weight":
                shape = tuple(values.T.shape) if is_conv1d(module) else tuple(values.shape)
                yield Weight(names[0], tuple(names), module, values, shape, kind)
            elif is_experts(module) and key.endswith("_bias"):
                continue  # [E, N]: a vector of each expert
            else:
                shape = tuple(stack_of(module, key).shape if _is_stack(module, key) else values.shape)
                every = (*(f"{each}.{key}".lstrip(".") for each in names), *names)
                yield Weight(name, every, module, values, shape, _kind(name, module, values))


def beside_base_model(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a transformers model beside its base model that have parameters, by name; {} if it is one itself."""
    base = getattr(model, "base_model", None)
    if not hasattr(model, "base_model_prefix") or base is model or not isinstance(base, nn.Module):
        return {}
    parts = {name: child for name, child in model.named_children() if all(one is not base for one in child.modules())}
    return {name: part for name, part in parts.items() if any(True for _ in part.parameters())}


def task_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The heads of a transformers model for a task (classification, question answering, CTC): what it has beside its
    base model, if it has no output embeddings."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    unwrap = getattr(model, "get_base_model", None)  # of a PEFT model
    model = unwrap() if callable(unwrap) else model
    getter = getattr(model, "get_output_embeddings", None)
    return {} if not callable(getter) or getter() is not None else beside_base_model(model)


def _is_stack(module: nn.Module, parameter: str) -> bool:
    return is_experts(module) and parameter in stack_names(module)


def _kind(name: str, module: nn.Module, values: Tensor) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return EMBEDDING
    # transformers keeps the experts of a layer as parameters [E, N, K] (dbrx: [E N, K]) of a module called so.
    called = f"{name} {type(module).__name__}".lower()
    return EXPERTS if "expert" in called and not name.endswith("bias") else OTHER


def _not_the_models(module: nn.Module) -> Iterator[nn.Module]:
    """Modules inside this one whose parameters are not the model's own weights: adapters of PEFT and its trained
    copies, and what a computed weight is computed from."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    for name, child in module.named_children():
        adapter = "BaseTunerLayer" in kinds and name != "base_layer"
        copy = "AuxiliaryTrainingWrapper" in kinds and name != "original_module"
        if adapter or copy or (name == "parametrizations" and is_linear(module)):
            yield from child.modules()
