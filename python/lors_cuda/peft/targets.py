# SPDX-License-Identifier: Apache-2.0
# Which modules of a model a LoRSLoraConfig adapts, and whether they can be: everything that is checked before the first
# module is replaced. PEFT's matching of names decides; "all-linear" is spelled out here, as PEFT knows no SparseLinear.
"""Selection and checks of the target modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import ALL_LINEAR, output_heads, unsuitable
from ..linear import LoRSLinear
from ..model import joined
from ..sparse_linear import SparseLinear
from ..weight import SparseWeight, check_fits
from .config import LoRSLoraConfig
from .layer import LoRSLoraLinear

_NAMES_SHOWN = 6


def named_peft_layers(model: nn.Module) -> Iterator[tuple[str, LoRSLoraLinear]]:
    """Iterate over (name, layer) of the LoRS layers of PEFT, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRSLoraLinear):
            yield name, module


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the modules that PEFT may adapt: without what is inside adapted or separately trained modules."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or name.startswith(tuple(inside)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside.append(f"{name}.")
        yield name, module


def spell_out_all_linear(config: LoRSLoraConfig, model: nn.Module) -> None:
    """Replace target_modules="all-linear" by the names of all linears, also stored sparse, except the output head."""
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return
    heads = output_heads(model)
    linears = (nn.Linear, SparseLinear, LoRSLoraLinear)
    names = {
        name
        for name, module in candidates(model)
        if isinstance(module, linears) and not any(module is head for head in heads)
    }
    if not names:
        raise ValueError(
            f"target_modules='{ALL_LINEAR}' matches nothing: {type(model).__name__} has no nn.Linear and no "
            "SparseLinear (apart from an output head). Only these can be adapted; Conv1D and embeddings cannot."
        )
    config.target_modules = names


def check_targets(targets: dict[str, nn.Module], model: nn.Module, config: LoRSLoraConfig) -> dict[str, str]:
    """Refuse what cannot be adapted, for all targets; return {name: fingerprint of its mask}.

    Raises:
        ValueError: a module is of the wrong kind, shared or adapted otherwise, its weight does not fit the layout, or
            the configuration was saved on other masks. Every module concerned is named, and nothing is changed.
    """
    names_of: dict[nn.Module, list[str]] = {}
    holders: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name)
    problems = []
    for name, module in targets.items():
        reason = _problem(module, [model.get_submodule(other.rpartition(".")[0]) for other in names_of[module]])
        others = [other for other in names_of[module] if other != name]
        if reason is None and others:
            reason = f"is also called '{others[0]}', and PEFT would adapt it under one name only. Leave it out"
        if reason is None and isinstance(module, nn.Linear):
            sharing = [other for other in holders[module.weight] if other not in names_of[module]]
            if sharing:
                reason = f"shares its weight with '{sharing[0]}' (tied weights). Untie them, or leave it out"
        if reason is not None:
            problems.append(f"'{name}' cannot be adapted: it {reason} (exclude_modules=['{name}'] leaves it out).")
            continue
        try:
            _check_layout(name, module, config)
        except ValueError as error:
            problems.append(f"'{name}': {error}")
    if problems:
        raise ValueError(f"The model was not adapted. {joined(problems)}")
    fingerprints = {name: fingerprint(module) for name, module in targets.items()}
    if config.saved_fingerprints is not None:
        _check_masks(fingerprints, config.saved_fingerprints)
    return fingerprints


def fingerprint(module: nn.Module) -> str:
    """The fingerprint of a target's mask, see :meth:`lors_cuda.SparseWeight.fingerprint`."""
    if isinstance(module, LoRSLoraLinear):
        return module.mask_fingerprint
    linear: Any = module
    weight = linear.sparse_weight if isinstance(module, SparseLinear) else SparseWeight(linear.weight.detach())
    return weight.fingerprint()


def _problem(module: nn.Module, parents: list[nn.Module]) -> str | None:
    """Say why this module cannot be adapted, or None; the words follow 'it'."""
    if isinstance(module, LoRSLoraLinear):
        return None
    if isinstance(module, BaseTunerLayer):
        return f"has an adapter of PEFT's {type(module).__name__}, which is not masked. Unload that one"
    if isinstance(module, LoRSLinear):
        return "is a LoRSLinear with an adapter of its own. Call lors_cuda.merge_and_unload on the model"
    if isinstance(module, SparseLinear):
        return "is on the meta device. Load the model's weights first" if module.weight_values.is_meta else None
    return unsuitable(module, parents)


def _check_layout(name: str, module: nn.Module, config: LoRSLoraConfig) -> None:
    if isinstance(module, nn.Linear):
        check_fits(module.weight.detach(), config.layout)
    elif isinstance(module, SparseLinear) and config.saved_fingerprints is None:
        stored = module.sparse_weight.layout
        if config.layout not in ("auto", stored):
            raise ValueError(
                f"it is stored in layout '{stored}' and layout='{config.layout}' was asked for. Leave layout at "
                "'auto', or compress the model so."
            )


def _check_masks(fingerprints: dict[str, str], saved: Mapping[str, str]) -> None:
    different = [name for name, value in fingerprints.items() if saved.get(name) != value]
    absent = [name for name in saved if name not in fingerprints]
    if not different and not absent:
        return
    if absent:
        what = f"It has adapters for {_listed(absent)}, which the model lacks or the configuration leaves out"
    else:
        what = f"It was trained on a model with another sparsity mask: {_listed(different)} differ"
    raise ValueError(
        f"The adapter does not fit the model, and nothing was changed. {what}. Load the base model it was trained on, "
        "or call lors_cuda.peft.from_pretrained(..., strict_mask=False) to load it all the same."
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
