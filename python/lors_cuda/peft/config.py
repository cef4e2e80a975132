# SPDX-License-Identifier: Apache-2.0
# LoRSLoraConfig: a peft.LoraConfig with `layout` and `gradient`. Every field of LoraConfig is decided here: it works or
# is refused by name. A field that a later PEFT adds is refused as soon as it is used.
"""The configuration of LoRS adapters in PEFT."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from .._checks import check_gradient
from ..adapter_files import FORMAT_VERSION, PEFT_TYPE
from ..weight import check_layout


class PeftMethod(str, enum.Enum):
    """The `peft_type` of LoRS adapters, in the manner of `peft.PeftType`.

    A PEFT that has not registered it stops at it with a KeyError that shows the value, so the value is the advice. With
    "LORA" there it would apply the adapter without the mask.
    """

    LORS = PEFT_TYPE
    __hash__ = str.__hash__  # the hash of a str enumeration is its name's; PEFT looks the value of a file up


PEFT_METHOD = PeftMethod.LORS

SUPPORTED_FIELDS = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora",
        "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "trainable_token_indices", "ensure_weight_tying",
        "runtime_config",  # its one field, ephemeral_gpu_offload, serves DoRA alone
        "megatron_core", "qalora_group_size",  # of no effect without megatron_config and use_qalora
    }
)  # fmt: skip

_REWRITES = "it would rewrite the base weight and destroy its zeros"
REFUSED_FIELDS = {
    "fan_in_fan_out": "it is for Conv1D, whose weight is stored transposed; only nn.Linear can be adapted",
    "megatron_config": "Megatron's parallel layers are no nn.Linear",
    "loftq_config": _REWRITES,
    "eva_config": "EVA starts the adapters from data; see init_from_gradients",
    "corda_config": _REWRITES,
    "lora_ga_config": _REWRITES,
    "use_dora": "DoRA rescales each row of the merged weight, which the masked product does not do",
    "velora_config": "VeLoRA changes the gradient of lora_A, which LoRS defines itself",
    "alora_invocation_tokens": "the merged weight holds for all tokens of a batch, and aLoRA adapts some of them",
    "use_qalora": "it needs a quantized base",
    "monteclora_config": "MonteCLoRA samples the product of the adapters, which the masked product does not do",
    "layer_replication": "replicated layers share one weight, and each would have to store it again",
    "lora_bias": "lora_B has no bias here; train the layer's own with bias='lora_only'",
    "target_parameters": "only nn.Linear can be adapted, not a bare parameter",
    "use_bdlora": "block-diagonal adapters have another product",
    "arrow_config": "Arrow routes each token to other adapters, and the merged weight holds for all tokens",
    "kasa_config": _REWRITES,
}
_STARTS = (True, False, "gaussian", "orthogonal")


class Fingerprints(dict[str, str]):
    """{module name: fingerprint of its mask}; equal if the masks of the modules that both name are.

    PEFT compares configurations before it hotswaps adapters, and the new one may adapt fewer modules.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and all(other[name] == self[name] for name in self.keys() & other.keys())

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


@dataclass
class LoRSLoraConfig(LoraConfig):  # type: ignore[misc]
    """A `peft.LoraConfig` whose adapters are masked by the zeros of the base weight (LoRS, arXiv 2501.08582).

    Fields as in `peft.LoraConfig`; those that cannot hold for a masked product are refused by name.

    Args:
        layout: how the frozen weight of an nn.Linear is stored: "auto", "dense", "2:4" or "bitmap". A base that is
            already compressed (`lors_cuda.SparseLinear`) keeps its layout.
        gradient: "lors" (the paper's adapter gradients) or "exact", see :func:`lors_cuda.lors_linear`.
        lors: what `save_pretrained` writes, the version of the format and the fingerprints of the masks; not for use.

    Raises:
        ValueError, TypeError: a field has a value that cannot work; the sentence says which and what is needed.
    """

    layout: str = field(default="auto", metadata={"help": "How the frozen weight is stored."})
    # PEFT's own layers refuse a configuration with a variant they do not know, instead of dropping the mask.
    gradient: str = field(
        default="lors", metadata={"help": "The adapters' gradients: 'lors' or 'exact'.", "is_lora_variant": True}
    )
    lors: dict[str, Any] | None = field(default=None, metadata={"help": "Filled by save_pretrained."})

    def __post_init__(self) -> None:
        saved, self.lors = self.lors, None
        #: {module name: fingerprint} of the masks it was trained on, to be checked when it is attached to a model.
        self.saved_fingerprints: dict[str, str] | None = None
        #: {module name: fingerprint} of the model it is attached to.
        self.mask_fingerprints: dict[str, str] = {}
        if saved is not None:
            self._read(saved)
        self.validate()
        super().__post_init__()
        self.peft_type: Any = PEFT_METHOD

    def _read(self, saved: Any) -> None:
        """Take over the field "lors" of an adapter_config.json."""
        fingerprints = saved.get("mask_fingerprints") if isinstance(saved, Mapping) else None
        if not isinstance(fingerprints, Mapping):
            raise ValueError("The field 'lors' of the configuration has no mask fingerprints. Save the adapter again.")
        if saved.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"The adapter has format version {saved.get('format_version')!r}, and this lors_cuda reads "
                f"{FORMAT_VERSION}. Install the version that wrote it, or a newer one."
            )
        self.saved_fingerprints = dict(fingerprints) or None
        # `lors_cuda.save_adapter` writes them here.
        self.layout = saved.get("layout", self.layout)
        self.gradient = saved.get("gradient", self.gradient)

    def validate(self) -> None:
        """Refuse what cannot work; called again when the configuration is used, because fields may be reassigned.

        Raises:
            ValueError, TypeError: as the class.
        """
        check_layout(self.layout)
        check_gradient(self.gradient)
        start = self.init_lora_weights
        if not isinstance(start, bool) and not (isinstance(start, str) and start in _STARTS):
            raise ValueError(
                f"init_lora_weights={start!r} is refused: {_start_problem(start)}. To start from data with every zero "
                "kept, call lors_cuda.peft.estimate_gradients on the sparse model before get_peft_model and "
                "lors_cuda.peft.init_from_gradients after it; or use True, 'gaussian' or 'orthogonal'."
            )
        for item in dataclasses.fields(LoraConfig):
            value, default = getattr(self, item.name), _default(item)
            if item.name in SUPPORTED_FIELDS or not value or value == default:
                continue
            why = REFUSED_FIELDS.get(item.name, "this lors_cuda does not know the field; a newer one may")
            raise ValueError(f"{item.name}={value!r} is refused by LoRSLoraConfig: {why}. Leave it at {default!r}.")
        if getattr(self, "_custom_modules", None):
            raise ValueError(
                "_register_custom_module is refused by LoRSLoraConfig: a layer of another class would not be masked."
            )
        if getattr(self.runtime_config, "ephemeral_gpu_offload", False):
            raise ValueError("ephemeral_gpu_offload=True is refused by LoRSLoraConfig: it serves DoRA alone.")
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"use_rslora must be True or False, but is {self.use_rslora!r}.")
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern or {}, Mapping):
                raise TypeError(f"{name} must be a dict of module names and values, but is {pattern!r}.")
        _check_rank("r", self.r)
        for key, rank in (self.rank_pattern or {}).items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for name, alpha in {"lora_alpha": self.lora_alpha, **(self.alpha_pattern or {})}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                what = name if name == "lora_alpha" else f"alpha_pattern[{name!r}]"
                raise ValueError(f"{what} must be a finite number, but is {alpha!r}.")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and less than 1, but is {self.lora_dropout!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT writes them, with the fingerprints of the masks under "lors"."""
        values: dict[str, Any] = super().to_dict()
        fingerprints = Fingerprints(self.mask_fingerprints or self.saved_fingerprints or {})
        values["lors"] = {"format_version": FORMAT_VERSION, "mask_fingerprints": fingerprints}
        return values


def _start_problem(start: Any) -> str:
    """Why an initialiser of PEFT cannot be used; the words follow a colon."""
    if not isinstance(start, str):
        return "it must be True, False or a name"
    if start.lower() in ("eva", "mica"):
        return "it derives the adapters from the dense product, without the mask"
    if start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return _REWRITES
    return "this lors_cuda does not know it"


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _check_rank(name: str, rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{name} must be an integer of at least 1, but is {rank!r}.")
