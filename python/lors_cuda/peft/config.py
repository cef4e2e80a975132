# SPDX-License-Identifier: Apache-2.0
# LoRSLoraConfig: a peft.LoraConfig with `layout` and `gradient`. _checks.py says of each field of LoraConfig whether it
# works or is refused. One that a later PEFT adds is refused where PEFT calls it a variant of its layers, and otherwise
# ignored with a warning.
"""The configuration of LoRS adapters in PEFT."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from dataclasses import dataclass, field
from typing import Any

from peft.utils.other import get_pattern_key

from peft import LoraConfig

from .._checks import (
    GRADIENTS,
    LAYOUTS,
    REFUSED_LORA_FIELDS,
    SUPPORTED_LORA_FIELDS,
    alpha_number,
    check_choice,
    check_flag,
    check_lora_fields,
    pattern_dict,
    rank_number,
)
from .._draws import ROUNDINGS, seed_number
from ..adapter_directory import FORMAT_VERSION, OWN_FIELDS, PEFT_TYPE
from ..config import check_requantize_options
from ..fingerprints import Fingerprint, from_fields, mask_problem, to_fields, value_problem


class PeftMethod(str, enum.Enum):
    """The `peft_type` of LoRS adapters, in the manner of `peft.PeftType`.

    A PEFT that has not registered it stops at it with a KeyError. With "LORA" it would apply the adapter unmasked.
    """

    LORS = PEFT_TYPE


PEFT_METHOD = PeftMethod.LORS

_STARTS = (True, False, "gaussian", "orthogonal")


class SavedBase(dict[str, Any]):
    """The field "lors" of a configuration; equal if masks and values of the modules that both name are.

    PEFT compares configurations before it hotswaps adapters, and the new one may adapt fewer modules, or have been
    trained on the same values in a wider dtype.
    """

    def __eq__(self, other: object) -> bool:
        one, two = from_fields(self), from_fields(other)
        if one is None or two is None:
            return False
        names = one.keys() & two.keys()
        one, two = ({name: each[name] for name in names} for each in (one, two))
        return mask_problem(one, two) is None and value_problem(one, two) is None

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


@dataclass
class LoRSLoraConfig(LoraConfig):  # type: ignore[misc]
    """A `peft.LoraConfig` whose adapters are masked by the zeros of the base weight (LoRS, arXiv 2501.08582).

    Fields as in `peft.LoraConfig`; those that a masked adapter cannot have are refused by name.

    Args:
        layout: how the frozen weight of an nn.Linear is stored: "auto", "dense", "2:4" or "bitmap". A base that is
            already compressed (`lors_cuda.SparseLinear`) keeps its layout.
        gradient: "lors" (the paper's adapter gradients) or "exact", see :func:`lors_cuda.lors_linear`.
        rounding: of the merged weight, as in :class:`lors_cuda.LoRSConfig`. Adapters of one layer must agree;
            "stochastic" cannot be trained with dropout, which needs the adapter apart from the weight.
        rounding_seed: of "stochastic", likewise.
        requantize: of quantised weights (`lors_cuda.SparseLinear`), as in :class:`lors_cuda.LoRSConfig`. Adapters of
            one layer must agree; not with dropout, likewise.
        remainder: with `requantize`, likewise.
        dither_seed: of "dither", likewise.
        lors: what `save_pretrained` writes, the version of the format and the fingerprints of the base; not for use.

    Raises:
        ValueError, TypeError: a field has a value that cannot work; the sentence says which and what is needed.
    """

    layout: str = field(default="auto", metadata={"help": "How the frozen weight is stored."})
    # PEFT's own layers refuse a configuration with a variant they do not know, instead of dropping the mask.
    gradient: str = field(
        default="lors", metadata={"help": "The adapters' gradients: 'lors' or 'exact'.", "is_lora_variant": True}
    )
    rounding: str = field(
        default="nearest",
        metadata={"help": "How 16-bit merged weights are rounded: 'nearest' or 'stochastic'.", "is_lora_variant": True},
    )
    rounding_seed: int = field(default=0, metadata={"help": "The seed of rounding='stochastic'."})
    requantize: bool = field(
        default=False,
        metadata={"help": "Round merged weights to the base's grid.", "is_lora_variant": True},
    )
    remainder: str | None = field(
        default=None, metadata={"help": "With requantize: 'dither', 'none' or 'stored'.", "is_lora_variant": True}
    )
    dither_seed: int = field(default=0, metadata={"help": "The seed of remainder='dither'."})
    lors: dict[str, Any] | None = field(default=None, metadata={"help": "Filled by save_pretrained."})

    def __post_init__(self) -> None:
        saved, self.lors = self.lors, None
        #: {module name: fingerprint} of the base it was trained on, to be checked when it is attached to a model.
        self.trained_on: dict[str, Fingerprint] | None = None
        #: Whether another mask is refused then.
        self.strict_mask = True
        #: {module name: fingerprint} of the base that it is attached to.
        self.fingerprints: dict[str, Fingerprint] = {}
        if saved is not None:
            self._read(saved)
        #: {module name: (the layer's own {adapter name: rank} and {adapter name: scaling}, the adapter's name)} of the
        #: model it is attached to.
        self.adapted: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {}
        #: {path: whether it is adapted} of the stacked weights of experts in the model it is attached to.
        self.stacks: dict[str, bool] = {}
        #: Whether its adapter is a new one, and not loaded: then its rank must suit the layers.
        self.is_new = self.trained_on is None
        self.validate()
        super().__post_init__()
        self.peft_type: Any = PEFT_METHOD

    def _read(self, saved: Any) -> None:
        """Take over the field "lors" of an adapter_config.json."""
        trained_on = from_fields(saved)
        if trained_on is None:
            raise ValueError("The field 'lors' of the configuration has no mask fingerprints. Save the adapter again.")
        if saved.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"The adapter has format version {saved.get('format_version')!r}, and this lors_cuda reads "
                f"{FORMAT_VERSION}. Install the version that wrote it, or a newer one."
            )
        self.trained_on = trained_on or None
        # `lors_cuda.save_adapter` writes them here.
        for name in OWN_FIELDS:
            setattr(self, name, saved.get(name, getattr(self, name)))

    def validate(self) -> None:
        """Refuse what cannot work; called again when the configuration is used, because fields may be reassigned.

        Raises:
            ValueError, TypeError: as the class.
        """
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("gradient", self.gradient, GRADIENTS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        self.rounding_seed = seed_number("rounding_seed", self.rounding_seed)
        check_requantize_options(self)
        start = self.init_lora_weights
        if not isinstance(start, bool) and not (isinstance(start, str) and start in _STARTS):
            raise ValueError(
                f"init_lora_weights={start!r} is refused: {_start_problem(start)}. To start from data with every zero "
                "kept, call lors_cuda.peft.estimate_gradients on the sparse model before get_peft_model and "
                "lors_cuda.peft.init_from_gradients after it; or use True, 'gaussian' or 'orthogonal'."
            )
        used = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if not value or value == _default(item):
                continue
            used[item.name] = value
            known = SUPPORTED_LORA_FIELDS | REFUSED_LORA_FIELDS.keys()
            if item.name not in known and item.metadata.get("is_lora_variant"):
                raise ValueError(
                    f"{item.name}={value!r} is refused by LoRSLoraConfig: it makes PEFT's layers compute something "
                    f"else, without the mask. Leave it at {_default(item)!r}."
                )
        check_lora_fields("LoRSLoraConfig", used)
        if getattr(self, "_custom_modules", None):
            raise ValueError(
                "_register_custom_module is refused by LoRSLoraConfig: a layer of another class would not be masked."
            )
        if getattr(self.runtime_config, "ephemeral_gpu_offload", False):
            raise ValueError("ephemeral_gpu_offload=True is refused by LoRSLoraConfig: it is for DoRA alone.")
        check_flag("use_rslora", self.use_rslora)
        rank_number("r", self.r)
        alpha_number("lora_alpha", self.lora_alpha)
        pattern_dict("rank_pattern", self.rank_pattern, rank_number)
        pattern_dict("alpha_pattern", self.alpha_pattern, alpha_number)
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and less than 1, but is {self.lora_dropout!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT writes them, with the fingerprints of the base under "lors", and in `rank_pattern` and
        `alpha_pattern` what layers have now, where it was changed after the adapter was made."""
        values: dict[str, Any] = super().to_dict()
        values["rank_pattern"], values["alpha_pattern"] = self._true_patterns()
        fingerprints = to_fields(self.fingerprints or self.trained_on or {})
        values["lors"] = SavedBase(format_version=FORMAT_VERSION, **fingerprints)
        return values

    def _true_patterns(self) -> tuple[dict[str, int], dict[str, float]]:
        """Both patterns, or, where a layer's rank or scaling is another one, patterns of the same meaning by full
        names."""
        ranks, alphas, changed = {}, {}, False
        for name, (own_ranks, scalings, adapter) in self.adapted.items():
            rank = self.rank_pattern.get(get_pattern_key(self.rank_pattern, name), self.r)
            alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, name), self.lora_alpha)
            own_rank = own_ranks.get(adapter, rank)
            divisor = math.sqrt(own_rank) if self.use_rslora else own_rank
            scaling = float(scalings.get(adapter, alpha / divisor))
            if own_rank != rank or not math.isclose(scaling, alpha / divisor, rel_tol=1e-6):
                # A tensor's scaling, for hotswapping, is rounded.
                alpha, changed = alpha_number(f"The lora_alpha of '{name}'", scaling * divisor), True
            ranks[f"^{re.escape(name)}"], alphas[f"^{re.escape(name)}"] = own_rank, alpha
        return (ranks, alphas) if changed else (self.rank_pattern, self.alpha_pattern)


def _start_problem(start: Any) -> str:
    """Why an initialiser of PEFT cannot be used; the words follow a colon."""
    if not isinstance(start, str):
        return "it must be True, False or a name"
    if start.lower() in ("eva", "mica"):
        return "it derives the adapters from the dense weight, without the mask"
    if start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return "it would rewrite the base weight and destroy its zeros"
    return "this lors_cuda does not know it"


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
