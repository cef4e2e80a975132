# SPDX-License-Identifier: Apache-2.0
# LoRSConfig says which linears are adapted and how; find_targets lists the nn.Linear modules it selects in a model.
# Called by model.py, init.py and checkpoint.py. Holds no tensors and never changes a model.
"""Configuration of a LoRS model and the selection of the modules it adapts."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from ._checks import GRADIENTS
from ._distributed import is_offloaded, original_forward
from .weight import LAYOUTS

ALL_LINEAR = "all-linear"

# Classification models of transformers report no output embeddings; their head has one of these names (as in PEFT).
_CLASSIFIER_HEADS = ("score", "classifier")
_NAMES_SHOWN = 6


@dataclass
class LoRSConfig:
    """Which linears of a model are adapted, with what rank and by which gradient (LoRS, arXiv 2501.08582).

    Args:
        r: rank of the adapters, an integer of at least 1; lora_A is [r, in_features], lora_B is [out_features, r].
        lora_alpha: finite; the adapters are scaled by lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        target_modules: "all-linear" (every nn.Linear except the output head), a list of module-name suffixes
            ("q_proj", "mlp.up_proj"), or a regular expression that must match the whole module name, as in PEFT.
        exclude_modules: name suffixes, or a regular expression for the whole name; these are never adapted.
        layout: how the frozen weight is stored: "auto", "dense", "2:4" or "bitmap".
        gradient: "lors" (the paper's rearranged adapter gradients) or "exact" (true gradient of the
            forward, which needs one [out_features, in_features] product per layer).
        use_rslora: scale by lora_alpha / sqrt(r) (arXiv 2312.03732) instead of lora_alpha / r.
        init_lora_weights: True: lora_A Kaiming-uniform, lora_B zero; False: lora_B random as well, for tests.
        rank_pattern: {regular expression: rank}; the first one that matches the end of a module's name, from a dot on,
            replaces `r` for it; "^name" matches from the start only (as in PEFT).
        alpha_pattern: {regular expression: lora_alpha}, likewise.
        modules_to_save: name suffixes of modules trained and saved whole. Suffixes match at a dot: "norm" does not
            select "input_layernorm", as it would in PEFT. Linears inside these modules are not adapted.

    Raises:
        ValueError, TypeError: a field has a value that cannot work; the sentence says which and what is needed.
    """

    r: int = 16
    lora_alpha: float = 16
    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: str | list[str] | None = None
    layout: str = "auto"
    gradient: str = "lors"
    use_rslora: bool = False
    init_lora_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field and bring it to its plain form; called again on use, because fields may be reassigned.

        Raises:
            ValueError, TypeError: as the class.
        """
        self.r = _rank("r", self.r)
        self.lora_alpha = _alpha("lora_alpha", self.lora_alpha)
        _choice("layout", self.layout, LAYOUTS)
        _choice("gradient", self.gradient, GRADIENTS)
        for name in ("use_rslora", "init_lora_weights"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                hint = " (for a gradient-based start, call init_from_gradients)" if name == "init_lora_weights" else ""
                raise TypeError(f"{name} must be True or False, but is {value!r}{hint}.")
        targets = _names_or_regex("target_modules", self.target_modules)
        if not targets:
            raise ValueError(
                f"target_modules must be '{ALL_LINEAR}', a non-empty list of module-name suffixes or a regular "
                f"expression, but is {self.target_modules!r}."
            )
        self.target_modules = ALL_LINEAR if isinstance(targets, str) and targets.lower() == ALL_LINEAR else targets
        self.exclude_modules = _names_or_regex("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"modules_to_save must be a list of module names, but is the string {self.modules_to_save!r}."
            )
        saved = _names_or_regex("modules_to_save", self.modules_to_save)
        self.modules_to_save = saved if isinstance(saved, list) else None
        self.rank_pattern = _pattern("rank_pattern", self.rank_pattern, _rank)
        self.alpha_pattern = _pattern("alpha_pattern", self.alpha_pattern, _alpha)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that json can write and `from_dict` reads back to an equal configuration."""
        return {item.name: copy.deepcopy(getattr(self, item.name)) for item in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRSConfig:
        """Build a configuration from a mapping of field names, as `to_dict` returns it.

        Raises:
            TypeError: `values` is not a mapping.
            ValueError: it has a name that is no field, or a wrong value.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"LoRSConfig.from_dict needs a mapping of field names, but got {type(values).__name__}.")
        known = [item.name for item in dataclasses.fields(cls)]
        values = {name: value for name, value in values.items() if name != "products"}  # a field until 0.1.0
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(f"LoRSConfig has no field {_listed(unknown)}; its fields are {', '.join(known)}.")
        return cls(**values)

    def rank_of(self, name: str) -> int:
        """Return the rank of the module called `name`: the first matching rank_pattern, else r."""
        return next((value for key, value in self.rank_pattern.items() if pattern_matches(key, name)), self.r)

    def alpha_of(self, name: str) -> float:
        """Return lora_alpha of the module called `name`: the first matching alpha_pattern, else lora_alpha."""
        return next((value for key, value in self.alpha_pattern.items() if pattern_matches(key, name)), self.lora_alpha)

    def saves(self, name: str) -> bool:
        """Tell whether modules_to_save names this module itself (not one that merely contains it)."""
        return bool(self.modules_to_save) and _selects(self.modules_to_save, name)


@dataclass(frozen=True)
class Target:
    """One nn.Linear to adapt: its first name in the model, every name it has there, the module, its rank and alpha."""

    name: str
    names: tuple[str, ...]
    module: nn.Linear
    r: int
    lora_alpha: float


def pattern_matches(pattern: str, name: str) -> bool:
    """Tell whether a rank_pattern or alpha_pattern key matches `name`: its end, starting at a dot or at its start."""
    return re.match(rf"(?:.*\.)?(?:{pattern})$", name) is not None


def find_targets(model: nn.Module, config: LoRSConfig) -> list[Target]:
    """List the nn.Linear modules of `model` which `config` selects, in the model's order; changes nothing.

    A module that stands in the model under several names is listed once, with all of them; it is selected if one
    name is, and left out if one name is excluded.

    Raises:
        ValueError: nothing is selected, or a selected module cannot be adapted: it is no plain nn.Linear, its weight is
            computed (torch.nn.utils.prune or parametrize), shared with another module, or on the meta device.
    """
    config.validate()
    if has_peft_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters of PEFT, whose own linears would be taken for the model's. Work on "
            "the base model (model.unload() gives it back), or stay with PEFT: lors_cuda.peft has masked adapters."
        )
    heads = output_heads(model) if config.target_modules == ALL_LINEAR else []
    names_of: dict[nn.Module, list[str]] = {}
    holders: dict[torch.Tensor, list[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    for module in names_of:
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(module)

    targets, left_out = [], []
    for module, names in names_of.items():
        selected = next((name for name in names if name and _targeted(config, name, module)), None)
        if selected is None or (isinstance(config.target_modules, str) and not isinstance(module, nn.Linear)):
            continue  # a regular expression such as ".*mlp.*" also matches containers; only its linears are meant
        if any(head is module for head in heads) or any(_excluded(config, name) for name in names):
            left_out.append(selected)
            continue
        name = names[0]
        parents = [model.get_submodule(other.rpartition(".")[0]) for other in names]
        reason = unsuitable(module, parents)
        if reason is None:
            weight = cast(nn.Linear, module).weight
            others = [names_of[other][0] for other in holders[weight] if other is not module]
            if others:
                reason = (
                    f"shares its weight with '{others[0]}' (tied weights): merging the adapter would untie them. "
                    "Give it a weight of its own, or leave it out"
                )
        if reason is not None:
            raise ValueError(f"'{name}' cannot be adapted: it {reason} (exclude_modules=['{name}'] leaves it out).")
        linear = cast(nn.Linear, module)
        targets.append(Target(name, tuple(names), linear, config.rank_of(name), config.alpha_of(name)))
    if not targets:
        raise ValueError(_nothing_selected(model, config, left_out))
    _warn_unused(config, [name for target in targets for name in target.names])
    return targets


def output_heads(model: nn.Module) -> list[nn.Module]:
    """List the output heads of a transformers model: its output embeddings, or else its classifier; [] otherwise."""
    heads = []
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if not callable(getter):
            continue
        head = getter()
        if head is not None:
            heads.append(head)
        else:
            children = dict(module.named_children())
            heads += [children[name] for name in _CLASSIFIER_HEADS if name in children]
    return heads


def has_peft_adapters(model: nn.Module) -> bool:
    """Tell whether PEFT has put layers of its own into the model; PEFT is not imported for it."""
    return any(kind.__name__ == "BaseTunerLayer" for module in model.modules() for kind in type(module).__mro__)


def conversion_advice(model: nn.Module) -> str:
    """What to do with a model that has no LoRS layers where some are needed."""
    if has_peft_adapters(model):
        return (
            "It is a PEFT model: use PEFT's own save_pretrained, merge_and_unload and disable_adapter, and "
            "lors_cuda.peft for the rest."
        )
    return "Convert it with get_lors_model or load_adapter first."


def saved_modules(model: nn.Module, config: LoRSConfig) -> dict[str, nn.Module]:
    """Return the modules which modules_to_save names, by their first name; {} if it is None.

    Raises:
        ValueError: an entry of modules_to_save names no module of the model.
    """
    found: dict[str, nn.Module] = {}
    for entry in config.modules_to_save or []:
        matches = {name: module for name, module in model.named_modules() if name and _selects([entry], name)}
        if not matches:
            raise ValueError(
                f"modules_to_save names '{entry}', but no module of {type(model).__name__} is called so or ends in "
                f"'.{entry}'. Its modules are {_listed([name for name, _ in model.named_children()])}, and below."
            )
        found.update(matches)
    return found


def _targeted(config: LoRSConfig, name: str, module: nn.Module) -> bool:
    if config.target_modules == ALL_LINEAR:
        return isinstance(module, nn.Linear)
    return _selects(config.target_modules, name)


def _excluded(config: LoRSConfig, name: str) -> bool:
    if config.exclude_modules and _selects(config.exclude_modules, name):
        return True
    parts = name.split(".")
    return any(config.saves(".".join(parts[: end + 1])) for end in range(len(parts)))


def _selects(wanted: str | list[str] | None, name: str) -> bool:
    """Tell whether a regular expression matches the whole name, or one of a list is its end, from a dot on."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in wanted or [])


def unsuitable(module: nn.Module, parents: list[nn.Module]) -> str | None:
    """Say why this module cannot be replaced by an adapted one, or None; the words follow 'it'."""
    kind = type(module).__name__
    if not isinstance(module, nn.Linear):
        return (
            f"is {_article(kind)}, and only nn.Linear can be adapted. Name linears in target_modules, or leave it out"
        )
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "belongs to nn.MultiheadAttention, which reads its weight without calling it. Leave it out"
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents):
        return (
            "belongs to nn.TransformerEncoderLayer, whose inference fast path reads the weight without calling the "
            "module, so that the adapter would be ignored. Write the layer out in modules of your own, or leave it out"
        )
    weight = module._parameters.get("weight")
    if weight is None or hasattr(module, "parametrizations"):
        return (
            "computes its weight (torch.nn.utils.prune or parametrize). Make that permanent first: "
            "torch.nn.utils.prune.remove(module, 'weight') or parametrize.remove_parametrizations(module, 'weight')"
        )
    if is_lazy(weight):
        return "has no shape yet (nn.LazyLinear). Run the model once before converting it"
    if is_offloaded(module):
        return (
            "has its weights offloaded by accelerate (device_map), which brings them for each forward only. Load the "
            "model without offloading to the CPU or the disk, or leave it out"
        )
    if original_forward(module) is not nn.Linear.forward:
        return f"is {_article(kind)} with a forward of its own, which would be lost. Use nn.Linear, or leave it out"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks, which would be lost. Remove them and register them on the converted module, or leave it out"
    if weight.device.type == "meta":
        return "is on the meta device, without values. Load the model's weights first"
    if not weight.is_floating_point():
        return f"has a weight of dtype {weight.dtype}, and a floating-point one is needed. Load the model unquantized"
    return None


def _nothing_selected(model: nn.Module, config: LoRSConfig, left_out: list[str]) -> str:
    kind = type(model).__name__
    if isinstance(model, nn.Linear):
        return "The model is itself an nn.Linear and cannot be replaced in place; use LoRSLinear.from_linear(linear)."
    if left_out:
        return (
            f"target_modules={config.target_modules!r} selects {_listed(left_out)} in {kind}, but all of them are the "
            "output head or taken out by exclude_modules or modules_to_save; nothing is left to adapt."
        )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        return f"{kind} has no nn.Linear, so there is nothing to adapt."
    return (
        f"target_modules={config.target_modules!r} matches no nn.Linear of {kind}. It has {_listed(linears)}: give "
        f"suffixes of such names in a list, a regular expression for the whole name, or '{ALL_LINEAR}'."
    )


def _warn_unused(config: LoRSConfig, names: list[str]) -> None:
    """Warn about entries that select nothing: a misspelt one would otherwise train less than was asked, unnoticed."""
    unused: list[str] = []
    if isinstance(config.target_modules, list):
        entries = [entry for entry in config.target_modules if not any(_selects([entry], name) for name in names)]
        unused += [f"target_modules entry {entry!r}" for entry in entries]
    for field_name in ("rank_pattern", "alpha_pattern"):
        keys = [key for key in getattr(config, field_name) if not any(pattern_matches(key, name) for name in names)]
        unused += [f"{field_name} key {key!r}" for key in keys]
    if unused:
        warnings.warn(f"{', '.join(unused)} selects no module and has no effect.", UserWarning, stacklevel=4)


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {choices}, but is {value!r}.")


def _rank(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        rank = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer of at least 1, but is {value!r}.") from None
    if rank < 1:
        raise ValueError(f"{name} must be an integer of at least 1, but is {rank}.")
    return rank


def _alpha(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, but is {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, but is {value}.")
    return value


def _pattern(name: str, values: Any, check: Any) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a dict from regular expression to value, but is {type(values).__name__}.")
    for key in values:
        _regex(name, key)
    return {key: check(f"{name}[{key!r}]", value) for key, value in values.items()}


def _names_or_regex(name: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, str):
        return _regex(name, value)
    if not isinstance(value, Iterable) or isinstance(value, (Mapping, bytes)):
        raise TypeError(f"{name} must be a list of module names or a string, but is {type(value).__name__}.")
    names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    wrong = [item for item in names if not isinstance(item, str) or not item]
    if wrong:
        raise TypeError(f"{name} must hold non-empty module names, but holds {wrong[0]!r}.")
    return names or None


def _regex(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} needs a regular expression as a string, but has {value!r}.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name} has the regular expression {value!r}, which is not valid: {error}.") from None
    return value


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _article(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "AEIOU" else f"a {kind}"
