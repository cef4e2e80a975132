# SPDX-License-Identifier: Apache-2.0
# The names of options, what each may be, and the sentences of refusals; for the library, lors_cuda.peft and the command
# line alike. Python checks what only it can see; the operators check shapes, dtypes and devices again at their edge.
"""What options, weights, masks and adapters must be: the one place where Python checks them, in sentences."""

from __future__ import annotations

import math
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._distributed import is_sharded
from ._library import BUILD, check_device

if TYPE_CHECKING:
    from .weight import SparseWeight

GRADIENTS = ("lors", "exact")
LAYOUTS = ("auto", "dense", "2:4", "bitmap")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The CPU's variables are judged in csrc/core/cpu/dispatch.cpp.
_ENVIRONMENT = {
    "LORS_CUDA_FUSED": ("always", "never"),
    "LORS_SPARSE_PRODUCT": ("dense", "sparse", "auto"),  # the default first
}
_NAMES_SHOWN = 6
_PROBLEMS_SHOWN = 5

# What becomes of each field of PEFT's LoraConfig, in a configuration or in a file: it works, or is refused by name.
_REWRITES = "it would rewrite the base weight and destroy its zeros"
SUPPORTED_LORA_FIELDS = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "target_parameters", "exclude_modules", "lora_alpha", "lora_dropout",
        "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "trainable_token_indices", "ensure_weight_tying",
        "fan_in_fan_out",  # of no effect: a Conv1D is known by its class
        "runtime_config",  # its one field, ephemeral_gpu_offload, is for DoRA alone
        "megatron_core", "qalora_group_size",  # of no effect without megatron_config and use_qalora
        "layout", "gradient", "rounding", "rounding_seed", "requantize", "remainder", "dither_seed", "lors",
        "products",  # ours; the last one was before 0.1.0
    }
)  # fmt: skip
REFUSED_LORA_FIELDS = {
    "megatron_config": "Megatron's parallel layers are no nn.Linear",
    "loftq_config": _REWRITES,
    "eva_config": "EVA starts the adapters from data; see init_from_gradients",
    "corda_config": _REWRITES,
    "lora_ga_config": _REWRITES,
    "use_dora": "DoRA rescales each row of the merged weight, which a masked adapter does not do",
    "velora_config": "VeLoRA changes the gradient of lora_A, which LoRS defines itself",
    "alora_invocation_tokens": "the merged weight holds for all tokens of a batch, and aLoRA adapts some of them",
    "use_qalora": "it needs a quantized base",
    "monteclora_config": "MonteCLoRA samples the adapters, which a masked adapter does not do",
    "layer_replication": "replicated layers share one weight, and each would have to store it again",
    "lora_bias": "lora_B has no bias here; train the layer's own with bias='lora_only'",
    "use_bdlora": "block-diagonal adapters are not the B A that is masked",
    "arrow_config": "Arrow routes each token to other adapters, and the merged weight holds for all tokens",
    "kasa_config": _REWRITES,
}


# ---- the text of lists ----


def alternatives(names: Sequence[str]) -> str:
    """What may be chosen: "'a', 'b' or 'c'"."""
    quoted = [repr(name) for name in names]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))


def listed(names: Sequence[str]) -> str:
    """Names as "'a', 'b' and 3 more"."""
    return shortened([f"'{name}'" for name in names])


def shortened(parts: Sequence[str], separator: str = ", ") -> str:
    """Parts of a sentence; after the first few only their number."""
    shown = separator.join(parts[:_NAMES_SHOWN])
    return shown if len(parts) <= _NAMES_SHOWN else f"{shown} and {len(parts) - _NAMES_SHOWN} more"


def joined(problems: Sequence[str]) -> str:
    """Sentences in a row; after the first few only their number."""
    shown = " ".join(problems[:_PROBLEMS_SHOWN])
    rest = len(problems) - _PROBLEMS_SHOWN
    return shown if rest <= 0 else f"{shown} And {rest} more like these."


def grouped(reasons: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for each reason, with the names that it is of."""
    return [f"{listed(names)}: {reason}" for reason, names in reasons.items()]


# ---- options ----


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse an option's value that is none of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be {alternatives(allowed)}.")


def check_flag(name: str, value: object, hint: str = "") -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but is {value!r}{hint}.")


def check_environment() -> None:
    """Refuse a LORS_ environment variable with a value that is none of its own, before any kernel needs it."""
    if BUILD["cpu_problem"]:
        raise ValueError(BUILD["cpu_problem"])
    for name, allowed in _ENVIRONMENT.items():
        value = os.environ.get(name)
        if value and value not in allowed:
            words = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            raise ValueError(f"{name} is {value!r}; set it to {words}, or leave it unset.")


def sparse_product() -> str:
    """How the forward of a 2:4 weight is computed: LORS_SPARSE_PRODUCT, or what it is where that is unset."""
    return os.environ.get("LORS_SPARSE_PRODUCT") or _ENVIRONMENT["LORS_SPARSE_PRODUCT"][0]


def rank_number(name: str, value: Any) -> int:
    """A rank as an int of at least 1."""
    try:
        if isinstance(value, bool):
            raise TypeError
        rank = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer of at least 1, but is {value!r}.") from None
    if rank < 1:
        raise ValueError(f"{name} must be an integer of at least 1, but is {rank}.")
    return rank


def alpha_number(name: str, value: Any) -> float:
    """A lora_alpha: a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, but is {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, but is {value}.")
    return value


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


def check_number(name: str, value: object, must: str, holds: Callable[[float], bool]) -> None:
    """Refuse what is no number for which ``holds``; ``must`` says in words what it has to be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
        raise ValueError(f"{name} is {value!r}; it must be {must}.")


def pattern_dict(name: str, values: Any, check: Any) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern, each value checked; {} for None."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a dict from regular expression to value, but is {values!r}.")
    for key in values:
        _regex(name, key)
    return {key: check(f"{name}[{key!r}]", value) for key, value in values.items()}


def names_or_regex(name: str, value: Any) -> Any:
    """Module names as a list, None for none, or a regular expression as it is."""
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


def check_stored(which: str, factor: Tensor, done: str) -> None:
    """Refuse what would be `done` to a factor that is computed at every access, and be lost.

    Raises:
        ValueError: it is no parameter.
    """
    if not isinstance(factor, nn.Parameter):
        raise ValueError(
            f"{which} is computed (by torch.nn.utils.parametrize, or a method of lors_cuda.methods that trains the "
            f"model), so it cannot be {done}. Call run.finish() of the method, or "
            "torch.nn.utils.parametrize.remove_parametrizations, first."
        )


def check_rank(r: int, out_features: int, in_features: int) -> None:
    """Refuse a rank outside [1, min(out_features, in_features)]."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r is {r!r}; the rank must be an integer.")
    if not 1 <= r <= min(out_features, in_features):
        raise ValueError(
            f"r is {r}; for a layer of {out_features} x {in_features} the rank must be between 1 and "
            f"{min(out_features, in_features)}."
        )


def check_lora_fields(where: str, fields: Mapping[str, Any]) -> None:
    """Judge the fields of a LoraConfig of PEFT, of any version, that are not at their defaults.

    Raises:
        ValueError: a field would destroy the zeros or bypass the mask. A field that is not known is warned of.
    """
    for name, value in fields.items():
        if value and name in REFUSED_LORA_FIELDS:
            raise ValueError(f"{name}={value!r} is refused by {where}: {REFUSED_LORA_FIELDS[name]}. Leave it out.")
    unknown = [name for name, value in fields.items() if value and name not in SUPPORTED_LORA_FIELDS]
    if unknown:
        warnings.warn(
            f"{where} has {', '.join(f'{name}={fields[name]!r}' for name in unknown)}, which this lors_cuda does not "
            "know and ignores. Leave it out, or install a newer lors-cuda.",
            UserWarning,
            stacklevel=3,
        )


# ---- tensors ----


def check_whole(name: str, tensor: Tensor) -> None:
    """Refuse a DTensor."""
    if is_sharded(tensor):
        raise ValueError(
            f"{name} is a DTensor, a part of a tensor that several processes hold, and LoRS computes on whole ones. "
            "Under fully_shard call the module that it was applied to, which gathers its parameters; convert and merge "
            "a model outside fully_shard; tensor parallelism is not supported."
        )


def check_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor, a DTensor, or one of torch's own sparse layouts."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor.")
    check_whole(name, value)
    if value.layout != torch.strided:
        raise ValueError(f"{name} has the layout {value.layout}; it must be strided: call its to_dense().")


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor keeps its values in other tensors: torch's semi-structured ones, torchao's, quantized ones."""
    return type(tensor) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(tensor)


def check_weight(weight: Tensor) -> None:
    """A frozen dense weight [N, K] on a device with kernels."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; it must be a torch.Tensor or a SparseWeight.")
    check_tensor("weight", weight)
    if is_packed(weight):
        raise ValueError(
            f"weight is of the class {type(weight).__name__}, which holds its values in packed tensors, and LoRS needs "
            "an ordinary tensor. Give a semi-structured tensor of torch to SparseWeight.from_dense, which converts it; "
            "of a quantized one give weight.dequantize(), or load the model unquantized."
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be [out_features, in_features], both at least 1."
        )
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight has dtype {weight.dtype}; it must be float32, bfloat16, float16 or float64.")
    check_frozen(weight)
    check_device(weight.device)


def check_frozen(weight: Tensor) -> None:
    """Refuse a weight that would be given a gradient."""
    if weight.requires_grad:
        raise ValueError(
            "weight requires grad, but LoRS freezes it: no gradient of the base weight is formed. Call "
            "weight.requires_grad_(False), or pass weight.detach(); under torch.func differentiate with respect to "
            "lora_A, lora_B, the bias and the input alone."
        )


def check_mask(mask: Tensor, weight: Tensor) -> None:
    """A bool mask of the weight's shape, on its device."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"mask is {mask.dtype} with shape {tuple(mask.shape)}; it must be bool with the weight's shape "
            f"{tuple(weight.shape)}."
        )
    if mask.device != weight.device:
        raise ValueError(f"mask is on {mask.device} and weight on {weight.device}; move them to the same device.")


def check_adapters(
    weight: Tensor | SparseWeight, lora_A: Tensor, lora_B: Tensor, *, experts: bool | None = False
) -> None:
    """lora_A [r, K] and lora_B [N, r] of any floating dtype, on the weight's device.

    Args:
        weight: [N, K], or [E N, K] of a stack of experts.
        experts: whether they must be those of a stack, lora_A [E, r, K] and lora_B [E, N, r]; None: they may be.
    """
    check_tensor("lora_A", lora_A)
    check_tensor("lora_B", lora_B)
    N, K = weight.shape
    if experts is None:
        experts = lora_A.dim() == 3
    stack, of = ("experts, ", " of all experts") if experts else ("", "")
    if lora_A.dim() != 2 + experts or lora_A.shape[-1] != K:
        raise ValueError(
            f"lora_A has shape {tuple(lora_A.shape)}; it must be [{stack}r, {K}] for a weight of shape {(N, K)}{of}."
        )
    leading = lora_A.shape[:-2]
    if leading.numel() < 1 or N % leading.numel():
        raise ValueError(
            f"lora_A has shape {tuple(lora_A.shape)}, {leading.numel()} experts, and the weight of all experts has "
            f"{N} rows; they must be the same number for each."
        )
    r = lora_A.shape[-2]
    wanted = (*leading, N // leading.numel(), r)
    if lora_B.shape != wanted:
        raise ValueError(
            f"lora_B has shape {tuple(lora_B.shape)}; it must be {wanted} for a weight of shape {(N, K)}{of} and "
            f"lora_A of shape {tuple(lora_A.shape)}."
        )
    if r < 1:
        raise ValueError("lora_A has no rows; the rank r must be at least 1.")
    for name, adapter in (("lora_A", lora_A), ("lora_B", lora_B)):
        if adapter.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {adapter.dtype}; it must be float32, bfloat16, float16 or float64.")
        if adapter.device != weight.device:
            raise ValueError(
                f"{name} is on {adapter.device} and weight on {weight.device}; move them to the same device."
            )


def check_merge(weight: SparseWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, merged: SparseWeight) -> None:
    """Refuse a merge that reads or writes NaN or infinity, and name the first place; waits for the device.

    Finite parts may have a sum beyond the range of the weight's dtype, so that checking what is read is not enough.
    """
    check_has_values("weight", weight.values)

    def stacked(dense: Tensor) -> Tensor:
        return dense if lora_A.dim() == 2 else dense.unflatten(0, (lora_A.shape[0], -1))

    if not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling}; it must be finite. Set lora_alpha, or the layer's scaling, anew.")
    for which, stored in (("weight", weight.values), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not all_finite(stored):
            tensor = stacked(weight.to_dense()) if which == "weight" else stored
            place = _first_place(tensor)
            raise ValueError(
                f"{which}{list(place)} is {tensor[place].item()}; merging would spread it. Put finite values "
                "back (an earlier checkpoint, a lower learning rate) and merge again."
            )
    if not all_finite(merged.values):
        place = _first_place(stacked(merged.to_dense()))
        kept = float(stacked(weight.to_dense())[place])
        column = lora_A[place[:-2]].double()[:, place[-1]]
        added = float(lora_B[place[:-1]].double() @ column) * scaling
        wider = ", or merge in float32 (in Python: model.float())" if weight.dtype == torch.float16 else ""
        raise ValueError(
            f"merged{list(place)} would be {kept + added:.6g}, which is {kept:.6g} in the weight and {added:.6g} "
            f"from the adapter: beyond the range of {weight.dtype}, which ends at {torch.finfo(weight.dtype).max:.6g}. "
            f"Train a smaller adapter (a lower learning rate or lora_alpha){wider}."
        )


def check_has_values(name: str, tensor: Tensor) -> None:
    """Refuse a tensor on the meta device."""
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, where it has no values. Load the model's weights first.")


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinity; waits for the device."""
    # A finite sum has finite terms only, and takes one pass. Finite terms may still overflow it: then by element.
    return bool(tensor.detach().sum().isfinite()) or bool(torch.isfinite(tensor).all())


def _first_place(tensor: Tensor) -> tuple[int, ...]:
    """Where the first value is that is not finite: row and column, of experts after their number."""
    return tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
