# SPDX-License-Identifier: Apache-2.0
# What lors_cuda/targets.py does not know: PEFT's layers, its matching of names, and what is inside its wrappers.
"""Selection and checks of the target modules of a LoRSLoraConfig, by the rules of the library."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .._checks import check_rank, grouped, joined, listed
from .._linears import check_fits, check_stored_layout, is_linear
from .._unsuitable import Places, cannot_adapt
from ..config import ALL_LINEAR, matched, selects
from ..experts import LoRSExperts, SparseExpertWeight
from ..fingerprints import Fingerprint, fingerprint, mask_problem, value_problem
from ..sparse_linear import SparseLayer, SparseLinear
from ..targets import (
    Target,
    adaptable,
    check_requantizable,
    no_saved_module,
    no_stack,
    output_heads,
    warn_unused,
)
from .config import LoRSLoraConfig
from .experts import stacks_of
from .layer import LoRSLoraLinear

# PEFT itself adds these to modules_to_save for models with a task's head, whichever of them the model has.
_HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip


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


def target_of(name: str, module: nn.Module, config: LoRSLoraConfig, stack: str = "") -> Target:
    """What is called `name`: a module, or a stack of experts that are not converted yet."""
    rank, alpha = matched(config.rank_pattern, name, config.r), matched(config.alpha_pattern, name, config.lora_alpha)
    return Target(name, (name,), cast(nn.Linear, module), rank, alpha, stack)


def selected(model: nn.Module, config: LoRSLoraConfig) -> dict[str, Target]:
    """What `config` selects: modules by PEFT's matching of names, and stacks of experts, see `spell_out`."""
    found = {
        name: target_of(name, module, config)
        for name, module in candidates(model)
        if config.stacks.get(name, BaseTuner._check_target_module_exists(config, name))
    }
    for path, (module, stack) in stacks_of(model).items():
        if config.stacks.get(path) and not isinstance(module, LoRSExperts):
            found[path] = target_of(path, module, config, stack)
    return found


def spell_out(config: LoRSLoraConfig, model: nn.Module) -> None:
    """Replace target_modules="all-linear" by the names of the linears that can be adapted, stored sparse or not, except
    the output head and routers, and target_parameters by the paths of the stacks of experts that they name; with
    "all-linear" alone those of all experts.

    Raises:
        ValueError: an entry of target_parameters names no stack.
    """
    targets = config.target_modules
    every = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    stacks, wanted = stacks_of(model), config.target_parameters
    for entry in wanted or []:
        if not any(selects([entry], path) for path in stacks):
            raise ValueError(no_stack(entry, model, list(stacks)))
    config.stacks = {
        path: (selects(list(wanted), path) if wanted else every)
        and not any(selects(config.exclude_modules, name) for name in (path, path.rpartition(".")[0]))
        for path in stacks
    }
    if not every:
        config.target_parameters = [path for path, chosen in config.stacks.items() if chosen] or None
        return
    heads, places = output_heads(model), Places(model)
    names = {
        name
        for name, module in candidates(model)
        if (is_linear(module) or (isinstance(module, SparseLayer) and module.num_experts is None))
        and module not in places.routers
        and not any(module is head for head in heads)
    }
    if not names:
        raise ValueError(
            f"target_modules='{ALL_LINEAR}' matches nothing: {type(model).__name__} has no nn.Linear and no "
            "SparseLinear (apart from an output head). Only these can be adapted; embeddings cannot."
        )
    config.target_modules = names
    chosen = selected(model, config)  # without what exclude_modules and the other fields leave out
    left = adaptable(list(chosen.values()), lambda target: _problem(target, places), config, stacklevel=9)
    kept = {target.name for target in left}
    config.target_modules = kept - stacks.keys()
    config.stacks = {path: path in kept for path in stacks}
    config.target_parameters = sorted(kept & stacks.keys()) or None


def check_targets(targets: dict[str, Target], model: nn.Module, config: LoRSLoraConfig, *, new: bool) -> None:
    """Refuse what cannot be adapted, for all targets.

    `new`: the adapter is neither loaded nor combined from others, whose rank may exceed a layer's sides.

    Raises:
        ValueError: a module is of the wrong kind, shared or adapted otherwise, a rank is too large, its weight does not
            fit the layout, or modules_to_save names no module. Every one is named, and nothing is changed.
    """
    places = Places(model)
    problems = _unknown_saved(model, config)
    refused: dict[str, list[str]] = {}
    for name, target in targets.items():
        reason = _problem(target, places)
        if reason is not None:
            problems.append(cannot_adapt(name, reason))
            continue
        try:
            if new:
                check_rank(target.r, *target.shape)
            check_requantizable(target.module, config)
            _check_layout(target, config)
        except ValueError as error:
            refused.setdefault(str(error), []).append(name)
    problems += grouped(refused)
    if problems:
        raise ValueError(f"The model was not adapted. {joined(problems)}")
    if new:
        warn_unused(config, list(targets))


def fingerprints(targets: dict[str, Target], config: LoRSLoraConfig) -> dict[str, Fingerprint]:
    """{name: fingerprint of its weight} of the targets; warns of values that a loaded adapter was not trained on.

    Raises:
        ValueError: the masks, or the modules, are not those that it was trained on.
    """
    found = {name: _fingerprint(target) for name, target in targets.items()}
    if config.trained_on is not None:
        _check_base(found, config.trained_on, config.strict_mask)
    return found


def _fingerprint(target: Target) -> Fingerprint:
    module: nn.Module = target.module
    if isinstance(module, LoRSLoraLinear) and module.fingerprint is not None:
        return module.fingerprint
    if isinstance(module, (SparseLinear, LoRSLoraLinear)):
        return fingerprint(module.sparse_weight)
    return fingerprint(target.sparse_weight())


def _problem(target: Target, places: Places) -> str | None:
    """Say why this cannot be adapted, or None; the words follow 'it'."""
    module: nn.Module = target.module
    if isinstance(module, (LoRSLoraLinear, SparseExpertWeight)):
        return None
    if isinstance(module, BaseTunerLayer):
        return f"has an adapter of PEFT's {type(module).__name__}, which is not masked. Unload that one"
    if isinstance(module, SparseLinear) and type(module) is not SparseLinear:
        return "is a LoRSLinear with an adapter of its own. Call lors_cuda.merge_and_unload on the model"
    reason = places.stack_problem(module, target.stack) if target.stack else places.problem(module)
    names = places.names_of[module]
    if reason is None and len(names) > 1:
        return f"is also called '{names[1]}', and PEFT would adapt it under one name only. Leave it out"
    return reason


def _unknown_saved(model: nn.Module, config: LoRSLoraConfig) -> list[str]:
    """Entries of modules_to_save that name no module, as sentences; PEFT would train nothing for them."""
    known = _HEADS_OF_TASKS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    entries = [entry for entry in config.modules_to_save or [] if entry not in known]
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [no_saved_module(entry, model) for entry in entries if not any(name.endswith(entry) for name in names)]


def _check_layout(target: Target, config: LoRSLoraConfig) -> None:
    module: nn.Module = target.module
    if target.stack or is_linear(module):
        if config.trained_on is None or not config.strict_mask:  # else the mask itself is compared
            check_fits(target.weight.detach(), config.layout)
    elif isinstance(module, SparseLinear) and config.trained_on is None:
        check_stored_layout(module.sparse_weight, config.layout)


def _check_base(found: dict[str, Fingerprint], saved: Mapping[str, Fingerprint], strict_mask: bool) -> None:
    absent = [name for name in saved if name not in found]
    what = mask_problem(found, saved)
    if absent:
        what = (
            f"It has adapters for {listed(absent)}, which the model lacks or the configuration leaves out. Load the "
            "base model it was trained on"
        )
    if what is not None and strict_mask:
        raise ValueError(
            f"The adapter does not fit the model, and nothing was changed. {what}, or call "
            "lors_cuda.peft.from_pretrained(..., strict_mask=False) to load it all the same."
        )
    what = None if what is not None else value_problem(found, saved)
    if what is not None:
        warnings.warn(f"The adapter may not fit the model: {what}.", UserWarning, stacklevel=2)
