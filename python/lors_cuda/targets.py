# SPDX-License-Identifier: Apache-2.0
# Which modules of a model are adapted, and why others cannot be: one set of rules for the library, lors_cuda.peft
# (where PEFT's matching of names selects) and the command line. Changes no model. Finding walks the whole model:
# callers do it once and pass the targets on.
"""Selection and checks of the modules to adapt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._checks import check_rank, grouped, joined, listed
from ._linears import check_fits, check_stored_layout, is_linear, weight_of
from ._unsuitable import Places, article, cannot_adapt, not_loaded
from .config import ALL_LINEAR, LoRSConfig, matched, pattern_matches, selects
from .experts import expert_stacks, is_experts, stack_of
from .quantization import check_requantization, default_remainder, requantization
from .sparse_linear import SparseLayer, SparseLinear
from .weight import SparseWeight

# Classification models of transformers report no output embeddings; their head has one of these names (as in PEFT).
_CLASSIFIER_HEADS = ("score", "classifier")
# The stack that holds what was each expert's own linear before transformers 5.
_FORMER_STACKS = {
    **dict.fromkeys(("w1", "w3", "gate_proj", "up_proj"), "gate_up_proj"),
    "w2": "down_proj",
}


@dataclass(frozen=True)
class Target:
    """One weight to adapt: that of an nn.Linear, Conv1D or SparseLinear, or the stack of a layer's experts.

    Attributes:
        name, names: the module's first name in the model, and every name; of a stack those of the parameter.
        module: the linear; the experts, a module that `is_experts`.
        r, lora_alpha: its rank, of experts that of each, and alpha.
        stack: the parameter's name in the experts; "" for a linear.
    """

    name: str
    names: tuple[str, ...]
    module: nn.Linear | SparseLinear
    r: int
    lora_alpha: float
    stack: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K, of a stack those of one expert."""
        if self.stack:
            _, N, K = stack_of(self.module, self.stack).shape
            return N, K
        return shape_of(self.module)

    @property
    def num_experts(self) -> int | None:
        """E of a stack; None for a linear."""
        return stack_of(self.module, self.stack).shape[0] if self.stack else None

    @property
    def size(self) -> int:
        """Number of weights; 0 where that is not known."""
        return self.module._parameters[self.stack].numel() if self.stack else _size(self.module)  # type: ignore[union-attr]

    @property
    def not_loaded(self) -> str | None:
        """Why the module is not loaded as it must be, which loading the model otherwise mends; None if it is."""
        return not_loaded(self.module, self.stack or "weight")

    @property
    def module_names(self) -> tuple[str, ...]:
        """Every name of `module`."""
        return tuple(name.removesuffix(f".{self.stack}") for name in self.names) if self.stack else self.names

    @property
    def weight(self) -> Tensor:
        """The weight of a plain layer as [N, K], of a Conv1D a view; of a stack [E N, K], a copy where the family keeps
        it transposed."""
        return stack_of(self.module, self.stack).flatten(0, 1) if self.stack else weight_of(self.module)

    def sparse_weight(self) -> SparseWeight:
        """The weight and its mask, without compressing it."""
        if isinstance(self.module, SparseLinear):
            return self.module.whole_weight()
        return SparseWeight.from_dense(self.weight.detach(), "dense")


def find_targets(model: nn.Module, config: LoRSConfig) -> list[Target]:
    """List what to adapt in `model`, nn.Linear, transformers' Conv1D, SparseLinear and the stacked weights of experts,
    in the model's order; changes nothing.

    A module that the model has under several names is listed once, with all of them; it is selected if one
    name is, and left out if one name is excluded. "all-linear" leaves out what cannot be adapted, and warns once; also
    routers and output heads, of which it says nothing.

    Raises:
        ValueError: nothing is selected, or a module that is named cannot be adapted: it is no plain linear, its weight
            is computed (torch.nn.utils.prune or parametrize), shared with another module, read by code that does not
            call the layer, quantised, or on the meta device; it is a router; target_parameters names something else
            than experts.
    """
    config.validate()
    if has_peft_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters of PEFT, whose own linears would be taken for the model's. Work on "
            "the base model (model.unload() gives it back), or stay with PEFT: lors_cuda.peft has masked adapters."
        )
    places = Places(model)
    every = config.target_modules == ALL_LINEAR
    heads = output_heads(model) if every else []
    chosen: dict[str, tuple[nn.Module, str]] = {}  # by name: the linear and "", or the experts and a parameter of them
    left_out = []
    wanted_stacks = _wanted_stacks(model, config)
    for module, names in places.names_of.items():
        for stack in wanted_stacks.get(module, ()):
            paths = [f"{name}.{stack}".lstrip(".") for name in names]
            if any(_excluded(config, name) for name in (*names, *paths)):
                left_out.append(paths[0])
            else:
                chosen[paths[0]] = (module, stack)
        if every:
            selected = names[0] if _is_adaptable(module) else None
        else:
            selected = next((name for name in names if name and selects(config.target_modules, name)), None)
        if not selected or (isinstance(config.target_modules, str) and not _is_adaptable(module)):
            continue  # a regular expression such as ".*mlp.*" also matches containers; only its linears are meant
        if any(head is module for head in heads) or any(_excluded(config, name) for name in names):
            left_out.append(selected)
        elif not (every and module in places.routers):
            chosen[names[0]] = (module, "")
    targets: list[Target] = []
    for name, (module, stack) in chosen.items():
        every_name = tuple(f"{each}.{stack}".lstrip(".") if stack else each for each in places.names_of[module])
        targets.append(Target(name, every_name, module, config.rank_of(name), config.alpha_of(name), stack))  # type: ignore[arg-type]

    def problem(target: Target) -> str | None:
        return places.stack_problem(target.module, target.stack) if target.stack else places.problem(target.module)

    if every:
        targets = adaptable(targets, problem, config)
    for target in targets:
        reason = target.not_loaded if every else problem(target)
        if reason is not None:
            raise ValueError(cannot_adapt(target.name, reason))
    if not targets:
        raise ValueError(_nothing_selected(model, config, left_out))
    warn_unused(config, [name for target in targets for name in target.names])
    return targets


def adaptable(
    targets: list[Target], problem: Callable[[Target], str | None], config: Any, stacklevel: int = 4
) -> list[Target]:
    """What "all-linear" adapts: the targets without a problem and large enough for config.r.

    The others are listed, reason by reason, in one warning. Kept for the caller to refuse are a rank of rank_pattern,
    which was asked for, and a module that is not loaded as it must be.

    Raises:
        ValueError: nothing is left.
    """
    reasons: dict[str, list[str]] = {}
    sizes = {target.name: target.size for target in targets}
    for target in targets:
        reason = problem(target)
        if reason is not None and target.not_loaded is None:
            reasons.setdefault(reason, []).append(target.name)
    left = (target for target in targets if target.name not in _names(reasons) and target.size)
    shapes = {target.name: target.shape for target in left}
    if any(min(shape) >= config.r for shape in shapes.values()):  # or else the rank is what cannot be, and is refused
        for name, shape in shapes.items():
            if config.r > min(shape) and matched(config.rank_pattern, name, None) is None:
                reasons.setdefault(_rank_problem(config.r, shape), []).append(name)
    skipped = _names(reasons)
    if not skipped:
        return targets
    share = sum(sizes[name] for name in skipped) / max(sum(sizes.values()), 1)
    causes = joined(grouped({f"{reason}.": names for reason, names in reasons.items()}))
    experts = " and stacks of experts" if any(target.stack for target in targets) else ""
    text = (
        f"target_modules='{ALL_LINEAR}' leaves out {len(skipped)} of {len(targets)} linears{experts}, {share:.1%} of "
        f"their weights. {causes}"
    )
    if len(skipped) == len(targets):
        raise ValueError(f"{text} Nothing is left to adapt.")
    warnings.warn(text, UserWarning, stacklevel=stacklevel)
    return [target for target in targets if target.name not in skipped]


def check_targets(targets: Iterable[Target], config: LoRSConfig) -> None:
    """Refuse what the layers would refuse, for all targets, before the first is replaced.

    Raises:
        ValueError: a rank is too large or a weight does not fit the layout; every module concerned is named.
    """
    targets = list(targets)
    stacks = [target.name for target in targets if target.stack]
    if stacks and config.rounding != "nearest":
        raise ValueError(
            f"The model was not converted. rounding='{config.rounding}' is not supported for experts: {listed(stacks)}."
            " Leave rounding at 'nearest', or the experts out (exclude_modules=['experts'])."
        )

    def fits(target: Target) -> None:
        check_rank(target.r, *target.shape)
        if isinstance(target.module, SparseLinear):
            check_stored_layout(target.module.sparse_weight, config.layout)
        else:
            check_fits(target.weight.detach(), config.layout)

    advice = " Use rank_pattern for smaller ranks, another layout, or exclude_modules."
    for check, what_else in ((lambda target: check_requantizable(target.module, config), ""), (fits, advice)):
        problems: dict[str, list[str]] = {}
        for target in targets:
            try:
                check(target)
            except ValueError as error:
                problems.setdefault(str(error), []).append(target.name)
        if problems:
            raise ValueError(f"The model was not converted. {joined(grouped(problems))}{what_else}")


def check_requantizable(module: nn.Module, config: Any) -> None:
    """Refuse to requantise what the configuration's `requantize` and `remainder` do not fit.

    Raises:
        ValueError: so it is.
    """
    if not config.requantize:
        return
    grid = module.sparse_weight.quantization if isinstance(module, SparseLayer) else None
    if grid is None:
        raise ValueError(
            "requantize=True needs a quantised weight, and this one holds values. Make a quantised model with "
            "`lors-cuda quantize` (in Python, load_sparse_checkpoint(directory, quantized='keep') loads it and "
            "SparseWeight.quantize makes one weight), or leave requantize out."
        )
    chosen = requantization(True, config.remainder or default_remainder(True, grid), config.dither_seed)
    check_requantization(chosen, grid, has_draws=False)


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


SIDE_NETWORK = "side_network"  # what lors_cuda.methods.SHERL puts into a model


def no_saved_module(entry: str, model: nn.Module) -> str:
    """The sentence about an entry of modules_to_save that names nothing."""
    advice = (
        " It is SHERL's: put it into the sparse model first, by lors_cuda.methods.SHERL(...).attach(model) with the "
        "options of the training."
    )
    return (
        f"modules_to_save names '{entry}', but no module of {type(model).__name__} is called so or ends in "
        f"'.{entry}'. Its modules are {listed([name for name, _ in model.named_children()])}, and below."
        + (advice if entry == SIDE_NETWORK else "")
    )


def warn_unused(config: Any, names: list[str]) -> None:
    """Warn about entries of a LoRSConfig or LoRSLoraConfig that select none of the adapted modules: a misspelt one
    would otherwise train less than was asked, unnoticed."""
    unused: list[str] = []
    if not isinstance(config.target_modules, (str, type(None))):  # of target_parameters every entry selects something
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


def _is_adaptable(module: nn.Module) -> bool:
    return is_linear(module) or type(module) is SparseLinear


def _wanted_stacks(model: nn.Module, config: LoRSConfig) -> dict[nn.Module, list[str]]:
    """{experts: the names of its stacks} that a configuration selects, before exclude_modules.

    Raises:
        ValueError: an entry of target_parameters names none.
    """
    found: dict[nn.Module, list[str]] = {}
    wanted = config.target_parameters
    if wanted is None and config.target_modules != ALL_LINEAR:
        return found
    paths = []
    if is_experts(model):
        raise ValueError(
            f"The model is itself a {type(model).__name__} and cannot be replaced in place; use "
            "lors_cuda.experts.LoRSExperts."
        )
    for path, module, name in expert_stacks(model):
        paths.append(path)
        if wanted is None or selects(wanted, path):
            found.setdefault(module, []).append(name)
    for entry in wanted or []:
        if not any(selects([entry], path) for path in paths):
            raise ValueError(no_stack(entry, model, paths))
    return found


def no_stack(entry: str, model: nn.Module, paths: list[str]) -> str:
    """The sentence about an entry of target_parameters that names no stack of experts' weights."""
    kind = type(model).__name__
    known = f"Those of {kind} are {listed(paths)}." if paths else f"{kind} has none."
    for name, _ in model.named_parameters():
        if selects([entry], name):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            return (
                f"target_parameters names '{name}', a parameter of {article(owner)}; only weights of experts that "
                f"transformers' use_experts_implementation has made can be adapted so, and linears by target_modules. "
                f"{known}"
            )
    former = next((part for part in entry.split(".") if part in _FORMER_STACKS), None)
    renamed = "" if former is None else f" What was {former} is in {_FORMER_STACKS[former]} since transformers 5."
    known = known.replace("Those", "The weights of experts", 1)
    return f"target_parameters names '{entry}', which is no parameter of {kind}.{renamed} {known}"


def _names(reasons: dict[str, list[str]]) -> set[str]:
    return {name for names in reasons.values() for name in names}


def _rank_problem(r: int, shape: tuple[int, int]) -> str:
    try:
        check_rank(r, *shape)
    except ValueError as error:
        return str(error).rstrip(".")
    raise AssertionError("the rank fits")


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """N and K of a linear, plain or stored sparse."""
    if is_linear(linear):
        N, K = weight_of(linear).shape
        return N, K
    sparse: Any = linear
    return sparse.out_features, sparse.in_features


def _size(linear: nn.Module) -> int:
    """Number of weights; 0 where that is not known."""
    known: Any = linear
    weight = linear._parameters.get("weight")
    if weight is not None and not is_lazy(weight):
        return weight.numel()
    return int(getattr(known, "in_features", 0) * getattr(known, "out_features", 0))


def _nothing_selected(model: nn.Module, config: LoRSConfig, left_out: list[str]) -> str:
    kind = type(model).__name__
    if isinstance(model, nn.Linear):
        return "The model is itself an nn.Linear and cannot be replaced in place; use LoRSLinear.from_linear(linear)."
    if left_out:
        parameters = f", target_parameters={config.target_parameters!r}" if config.target_parameters else ""
        return (
            f"target_modules={config.target_modules!r}{parameters} selects {listed(left_out)} in {kind}, but all of "
            "them are the output head or taken out by exclude_modules or modules_to_save; nothing is left to adapt."
        )
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    if not linears:
        return f"{kind} has no nn.Linear, so there is nothing to adapt."
    stacks = sorted({f"experts.{name}" for _, _, name in expert_stacks(model)})
    experts = f" The weights of its experts are named in target_parameters={stacks}." if stacks else ""
    return (
        f"target_modules={config.target_modules!r} matches no nn.Linear of {kind}. It has {listed(linears)}: give "
        f"suffixes of such names in a list, a regular expression for the whole name, or '{ALL_LINEAR}'.{experts}"
    )
