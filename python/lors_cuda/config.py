# SPDX-License-Identifier: Apache-2.0
# LoRSConfig says which linears are adapted and how; targets.py finds them in a model. Holds no tensors.
"""Configuration of a LoRS model."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ._checks import (
    GRADIENTS,
    LAYOUTS,
    alpha_number,
    check_choice,
    check_flag,
    listed,
    names_or_regex,
    pattern_dict,
    rank_number,
)
from ._draws import ROUNDINGS, seed_number
from .quantization import check_remainder

ALL_LINEAR = "all-linear"
_Value = TypeVar("_Value")


@dataclass
class LoRSConfig:
    """Which linears of a model are adapted, with what rank and by which gradient (LoRS, arXiv 2501.08582).

    Args:
        r: rank of the adapters, an integer of at least 1; lora_A is [r, in_features], lora_B is [out_features, r].
        lora_alpha: finite; the adapters are scaled by lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        target_modules: "all-linear" (every nn.Linear, and Conv1D of transformers, except the output head; what cannot
            be adapted is left out and listed in one warning), a list of module-name suffixes ("q_proj", "mlp.up_proj"),
            or a regular expression that must match the whole module name, as in PEFT. These must name what can be
            adapted.
            "all-linear" is also the weights of experts, see `target_parameters`, and never their routers. None:
            "all-linear", or, with target_parameters, no linears.
        target_parameters: the weights of experts to adapt, as suffixes of parameters' names, as in PEFT
            (["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]). None: those of all experts with "all-linear", none
            otherwise. Each expert has an adapter of rank r, so that experts need small ranks: 2 to 8.
        exclude_modules: name suffixes, or a regular expression for the whole name; these are never adapted. ["experts"]
            leaves the experts out.
        layout: how the frozen weight is stored: "auto", "dense", "2:4" or "bitmap".
        gradient: "lors" (the paper's rearranged adapter gradients) or "exact" (true gradient of the
            forward, which needs one [out_features, in_features] matrix per layer).
        rounding: how a merged weight of 16 bits is rounded: "nearest", or "stochastic", up or down by chance, the
            likelier the nearer, so that updates below half a step are not lost; see docs/howto/rounding.md.
        rounding_seed: of "stochastic", 0 to 2^63 - 1; each layer derives its own, in merging and evaluation. In
            training a run of lors_cuda.methods draws anew at each step; without one, this seed serves there too.
        requantize: of quantised weights: the merged weight is rounded to the grid of the stored codes, in training too,
            so that what is saved as codes computes exactly the same (QA-SparsePEFT of SQFT, arXiv 2410.03750). Refused
            unless every target is quantised.
        remainder: with `requantize`, what is known of the weight between two codes: "none"; "dither": a fixed random
            number of each weight's place stands in for it, so that updates below half a step are not all lost;
            "stored": the base is int8 codes on a grid 16 times finer than the int4 grid of the result. None: "dither"
            for int4, "none" for int8 and e4m3, whose step is small.
        dither_seed: of "dither", 0 to 2^63 - 1; each layer derives its own. It is saved with the adapter.
        use_rslora: scale by lora_alpha / sqrt(r) (arXiv 2312.03732) instead of lora_alpha / r.
        init_lora_weights: True: lora_A Kaiming-uniform, lora_B zero; False: lora_B random as well, for tests.
        rank_pattern: {regular expression: rank}; the first one that matches the end of a module's name, of experts a
            parameter's, from a dot on, replaces `r` for it; "^name" matches from the start only (as in PEFT).
        alpha_pattern: {regular expression: lora_alpha}, likewise.
        modules_to_save: name suffixes of modules trained and saved whole. Suffixes match at a dot: "norm" does not
            select "input_layernorm", as it would in PEFT. Linears inside these modules are not adapted.

    Raises:
        ValueError, TypeError: a field has a value that cannot work; the sentence says which and what is needed.
    """

    r: int = 16
    lora_alpha: float = 16
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layout: str = "auto"
    gradient: str = "lors"
    rounding: str = "nearest"
    rounding_seed: int = 0
    requantize: bool = False
    remainder: str | None = None
    dither_seed: int = 0
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
        self.r = rank_number("r", self.r)
        self.lora_alpha = alpha_number("lora_alpha", self.lora_alpha)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("gradient", self.gradient, GRADIENTS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        self.rounding_seed = seed_number("rounding_seed", self.rounding_seed)
        check_requantize_options(self)
        check_flag("use_rslora", self.use_rslora)
        hint = " (for a gradient-based start, call init_from_gradients)"
        check_flag("init_lora_weights", self.init_lora_weights, hint)
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"target_parameters must be a list of parameters' names, but is the string {self.target_parameters!r}."
            )
        parameters = names_or_regex("target_parameters", self.target_parameters)
        self.target_parameters = parameters if isinstance(parameters, list) and parameters else None
        if self.target_modules is None:
            self.target_modules = ALL_LINEAR if self.target_parameters is None else []
        targets = names_or_regex("target_modules", self.target_modules)
        if not targets and self.target_parameters is None:
            raise ValueError(
                f"target_modules must be '{ALL_LINEAR}', a non-empty list of module-name suffixes or a regular "
                f"expression, but is {self.target_modules!r}."
            )
        every = isinstance(targets, str) and targets.lower() == ALL_LINEAR
        self.target_modules = ALL_LINEAR if every else (targets or [])
        self.exclude_modules = names_or_regex("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"modules_to_save must be a list of module names, but is the string {self.modules_to_save!r}."
            )
        saved = names_or_regex("modules_to_save", self.modules_to_save)
        self.modules_to_save = saved if isinstance(saved, list) else None
        self.rank_pattern = pattern_dict("rank_pattern", self.rank_pattern, rank_number)
        self.alpha_pattern = pattern_dict("alpha_pattern", self.alpha_pattern, alpha_number)

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
            raise ValueError(f"LoRSConfig has no field {listed(unknown)}; its fields are {', '.join(known)}.")
        return cls(**values)

    def rank_of(self, name: str) -> int:
        """Return the rank of the module called `name`: the first matching rank_pattern, else r."""
        return matched(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """Return lora_alpha of the module called `name`: the first matching alpha_pattern, else lora_alpha."""
        return matched(self.alpha_pattern, name, self.lora_alpha)

    def saves(self, name: str) -> bool:
        """Tell whether modules_to_save names this module itself (not one that merely contains it)."""
        return bool(self.modules_to_save) and selects(self.modules_to_save, name)


def check_requantize_options(config: Any) -> None:
    """Refuse values that cannot be together, of a LoRSConfig or LoRSLoraConfig."""
    check_remainder(config.requantize, config.remainder)
    config.dither_seed = seed_number("dither_seed", config.dither_seed)
    if config.requantize and config.rounding != "nearest":
        raise ValueError(
            f"requantize=True rounds to nearest codes: leave rounding={config.rounding!r} out. remainder='dither' "
            "keeps small updates from being lost."
        )


def pattern_matches(pattern: str, name: str) -> bool:
    """Tell whether a rank_pattern or alpha_pattern key matches `name`: its end, starting at a dot or at its start."""
    return re.match(rf"(?:.*\.)?(?:{pattern})$", name) is not None


def matched(patterns: Mapping[str, _Value] | None, name: str, default: _Value) -> _Value:
    """The value of the first key of a rank_pattern or alpha_pattern that matches `name`."""
    return next((value for key, value in (patterns or {}).items() if pattern_matches(key, name)), default)


def selects(wanted: str | list[str] | None, name: str) -> bool:
    """Tell whether a regular expression matches the whole name, or one of a list is its end, from a dot on."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in wanted or [])
