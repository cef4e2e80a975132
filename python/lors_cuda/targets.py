# SPDX-License-Identifier: Apache-2.0
# Which modules of a model are adapted, and why others cannot be: one set of rules for the library, lors_cuda.peft
# (where PEFT's matching of names selects) and the command line. Changes no model. Finding walks the whole model:
# callers do it once and pass the targets on.
"""Selection and checks of the modules to adapt."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from ._checks import check_rank, joined, listed
from ._distributed import is_offloaded, original_forward
from .config import ALL_LINEAR, LoRSConfig, pattern_matches, selects
from .weight import check_fits

# Classification models of transformers report no output embeddings; their head has one of these names (as in PEFT).
_CLASSIFIER_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Target:
    """One nn.Linear to adapt: its first name in the model, every name it has there, the module, its rank and alpha."""

    name: str
    names: tuple[str, ...]
    module: nn.Linear
    r: int
    lora_alpha: float


class Places:
    """The place of each module and each parameter of a model, and so why a module cannot be adapted."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.names_of: dict[nn.Module, list[str]] = {}
        self._holders: dict[Tensor, list[nn.Module]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names_of.setdefault(module, []).append(name)
        for module in self.names_of:
            for parameter in module.parameters(recurse=False):
                self._holders.setdefault(parameter, []).append(module)

    def problem(self, module: nn.Module) -> str | None:
        """Why this module cannot be adapted; the words follow 'it'. None if it can."""
        parents = [self._model.get_submodule(name.rpartition(".")[0]) for name in self.names_of[module]]
        reason = unsuitable(module, parents)
        if reason is not None:
            return reason
        others = [other for other in self._holders[cast(nn.Linear, module).weight] if other is not module]
        if others:
            return (
                f"shares its weight with '{self.names_of[others[0]][0]}' (tied weights): merging the adapter would "
                "untie them. Give it a weight of its own, or leave it out"
            )
        return None


def cannot_adapt(name: str, reason: str) -> str:
    """The sentence about a module that cannot be adapted."""
    return f"'{name}' cannot be adapted: it {reason} (exclude_modules=['{name}'] leaves it out)."


def find_targets(model: nn.Module, config: LoRSConfig) -> list[Target]:
    """List the nn.Linear modules of `model` which `config` selects, in the model's order; changes nothing.

    A module that the model has under several names is listed once, with all of them; it is selected if one
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
    places = Places(model)
    heads = output_heads(model) if config.target_modules == ALL_LINEAR else []
    targets, left_out = [], []
    for module, names in places.names_of.items():
        if config.target_modules == ALL_LINEAR:
            selected = names[0] if isinstance(module, nn.Linear) else None
        else:
            selected = next((name for name in names if name and selects(config.target_modules, name)), None)
        if not selected or (isinstance(config.target_modules, str) and not isinstance(module, nn.Linear)):
            continue  # a regular expression such as ".*mlp.*" also matches containers; only its linears are meant
        if any(head is module for head in heads) or any(_excluded(config, name) for name in names):
            left_out.append(selected)
            continue
        reason = places.problem(module)
        if reason is not None:
            raise ValueError(cannot_adapt(names[0], reason))
        name, linear = names[0], cast(nn.Linear, module)
        targets.append(Target(name, tuple(names), linear, config.rank_of(name), config.alpha_of(name)))
    if not targets:
        raise ValueError(_nothing_selected(model, config, left_out))
    warn_unused(config, [name for target in targets for name in target.names])
    return targets


def check_targets(targets: Iterable[Target], config: LoRSConfig) -> None:
    """Refuse what the layers would refuse, for all targets, before the first is replaced.

    Raises:
        ValueError: a rank is too large or a weight does not fit the layout; every module concerned is named.
    """
    problems = []
    for target in targets:
        try:
            check_rank(target.r, target.module.out_features, target.module.in_features)
            check_fits(target.module.weight.detach(), config.layout)
        except ValueError as error:
            problems.append(f"'{target.name}': {error}")
    if problems:
        advice = "Use rank_pattern for smaller ranks, another layout, or exclude_modules."
        raise ValueError(f"The model was not converted. {joined(problems)} {advice}")


def all_linears(model: nn.Module, kinds: tuple[type, ...] = (nn.Linear,)) -> Iterator[nn.Module]:
    """What "all-linear" means: the modules of these kinds, except an output head."""
    heads = output_heads(model)
    for module in model.modules():
        if isinstance(module, kinds) and not any(module is head for head in heads):
            yield module


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
        matches = {name: module for name, module in model.named_modules() if name and selects([entry], name)}
        if not matches:
            raise ValueError(no_saved_module(entry, model))
        found.update(matches)
    return found


def no_saved_module(entry: str, model: nn.Module) -> str:
    """The sentence about an entry of modules_to_save that names nothing."""
    return (
        f"modules_to_save names '{entry}', but no module of {type(model).__name__} is called so or ends in "
        f"'.{entry}'. Its modules are {listed([name for name, _ in model.named_children()])}, and below."
    )


def warn_unused(config: Any, names: list[str]) -> None:
    """Warn about entries of a LoRSConfig or LoRSLoraConfig that select none of the adapted modules: a misspelt one
    would otherwise train less than was asked, unnoticed."""
    unused: list[str] = []
    if not isinstance(config.target_modules, (str, type(None))):
        entries = [entry for entry in config.target_modules if not any(selects([entry], name) for name in names)]
        unused += [f"target_modules entry {entry!r}" for entry in entries]
    for field_name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field_name) or {}
        keys = [key for key in patterns if not any(pattern_matches(key, name) for name in names)]
        unused += [f"{field_name} key {key!r}" for key in keys]
    if unused:
        warnings.warn(f"{', '.join(unused)} selects no module and has no effect.", UserWarning, stacklevel=4)


def _excluded(config: LoRSConfig, name: str) -> bool:
    if config.exclude_modules and selects(config.exclude_modules, name):
        return True
    parts = name.split(".")
    return any(config.saves(".".join(parts[: end + 1])) for end in range(len(parts)))


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
            f"target_modules={config.target_modules!r} selects {listed(left_out)} in {kind}, but all of them are the "
            "output head or taken out by exclude_modules or modules_to_save; nothing is left to adapt."
        )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        return f"{kind} has no nn.Linear, so there is nothing to adapt."
    return (
        f"target_modules={config.target_modules!r} matches no nn.Linear of {kind}. It has {listed(linears)}: give "
        f"suffixes of such names in a list, a regular expression for the whole name, or '{ALL_LINEAR}'."
    )


def _article(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "AEIOU" else f"a {kind}"
