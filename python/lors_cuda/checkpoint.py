# SPDX-License-Identifier: Apache-2.0
# save_adapter and load_adapter: what of a model goes into an adapter directory, and whether one fits a model.
# adapter_directory.py reads and writes the files. Everything is checked before a tensor is copied or a module replaced.
"""Save and load adapters."""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import DTYPES, check_stored, joined, listed
from ._distributed import (
    check_gathered,
    copy_whole,
    original_class,
    process_rank,
    reshard,
    together,
    whole,
    whole_attribute,
)
from ._grid import Requantization
from .adapter_directory import (
    FORMAT_VERSION,
    OWN_FIELDS,
    PEFT_TYPE,
    PREFIX,
    SavedAdapter,
    file_names,
    from_file,
    read_adapter,
    require_safetensors,
    to_file,
    write_adapter,
)
from .config import LoRSConfig
from .fingerprints import fingerprint, mask_problem, to_fields, value_problem
from .linear import LoRSLinear
from .model import convert, dither_seed_of, named_lors_layers, running_method
from .quantization import default_remainder, requantization
from .targets import Target, conversion_advice, find_targets, saved_modules
from .weight import SparseWeight

_WRAPPERS = ("DistributedDataParallel", "DeepSpeedEngine")  # by name: DeepSpeed need not be installed


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of a converted model, and the modules in modules_to_save, to `directory` in PEFT's format.

    Each file is written beside its final name, flushed to the disk and renamed, the configuration last, so that a full
    disk or a kill leaves what was there. The tensors keep their dtype. Under torch.compile, DistributedDataParallel or
    DeepSpeed the names are those of the inner model. With several processes, call it in one, unless the model is under
    fully_shard: then call it in all of them, the adapters are gathered, and the first process writes. Adapters that are
    still zero while others have learned are named in a warning. While a method of lors_cuda.methods trains the model,
    the adapter as it is now is written, and beside it the method's state, with which :func:`load_adapter` goes on.

    Raises:
        ValueError: the model has no LoRS layers, or layers with and without use_rslora.
        OSError: the files could not be written (the system's reason is given).
        ImportError: safetensors is not installed.
        RuntimeError: under fully_shard, it failed in another process.
    """
    require_safetensors()
    model = _unwrapped(model)
    check_gathered(model)
    sharded = reshard(model)
    layers = dict(named_lors_layers(model))
    if not layers:
        raise ValueError(f"The model has no LoRS layers, so there is no adapter to save. {conversion_advice(model)}")
    run = running_method(model)
    config = _config_of(model, layers)
    tensors: dict[str, Tensor] = {}
    called = file_names({name: layer.num_experts for name, layer in layers.items()})
    for name, layer in layers.items():
        for which in ("lora_A", "lora_B"):
            tensors[f"{PREFIX}{called[name]}.{which}.weight"] = to_file(which, whole_attribute(layer, which))
    for name, tensor in _saved_tensors(model, config).items():
        tensors[PREFIX + name] = whole(tensor)
    fields = _config_fields(model, layers, config)
    if not sharded or process_rank() == 0:
        _warn_untrained({name: tensors[f"{PREFIX}{called[name]}.lora_B.weight"] for name in layers})
    with together() if sharded else contextlib.nullcontext():
        if not sharded or process_rank() == 0:
            write_adapter(Path(directory), tensors, fields)
    if run is not None:
        run.save(directory)


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, strict_mask: bool = True, strict_values: bool = False
) -> nn.Module:
    """Load an adapter directory into `model`, converting it first if it has no LoRS layers yet; in place.

    Every name, shape, rank, scaling, dtype and mask fingerprint is checked before anything is changed. A directory
    that PEFT wrote has no fingerprints; `strict_mask=False` loads it, and the adapter is masked from then on. Base
    weights with other values than in training (a base into which the adapter is merged already, one loaded in another
    dtype) are warned of by name. Into a model that a method trains, a checkpoint of that training is loaded, the
    method's state with it. A model under fully_shard must be converted already; all processes load together,
    each from the directory.

    Args:
        model: the sparse base model, or a model converted with the same targets, ranks and scaling.
        directory: what `save_adapter` wrote.
        strict_mask: refuse an adapter that was trained on another mask.
        strict_values: refuse one that was trained on other values, instead of a warning (UserWarning). Adapters that
            an earlier version saved do not know them.

    Returns:
        The same model object.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or corrupted, or the adapter does not fit the model (each reason is named);
            nothing is changed.
        ImportError: safetensors is not installed.
    """
    require_safetensors()
    inner = _unwrapped(model)
    check_gathered(inner)
    with together() if reshard(inner) else contextlib.nullcontext():
        adapter = read_adapter(Path(directory))
    layers = dict(named_lors_layers(inner))
    targets: list[Target] = []
    weights: dict[str, Callable[[], SparseWeight]] = {}
    if layers:
        problems = _fit_converted(inner, layers, adapter, weights)
    else:
        targets, problems = _fit_unconverted(inner, adapter, weights)
    problems = problems or _fit_base(weights, adapter, strict_mask, strict_values)
    if problems:
        raise ValueError(f"The adapter in '{adapter.path}' was not loaded. {joined(problems)}")
    if targets:
        convert(inner, targets, adapter.config)
        layers = dict(named_lors_layers(inner))
        for name, layer in layers.items():
            for which, tensor in adapter.adapters[name].items():
                setattr(layer, which, nn.Parameter(tensor.to(layer.lora_A.device, copy=True)))
    existing = inner.state_dict(keep_vars=True)
    run = running_method(inner)
    if run is not None:
        run.load(directory)
    else:
        for name, layer in layers.items():
            copy_whole(layer.lora_A, adapter.adapters[name]["lora_A"])
            copy_whole(layer.lora_B, adapter.adapters[name]["lora_B"])
    for name, tensor in adapter.saved.items():
        copy_whole(existing[name], tensor)
    return model


def _warn_untrained(lora_B: dict[str, Tensor]) -> None:
    """Say which adapters are still at their zero start while others are not."""
    zero = [name for name, tensor in lora_B.items() if not tensor.is_meta and not bool(tensor.any())]
    if zero and len(zero) < len(lora_B):
        warnings.warn(
            f"{len(zero)} of {len(lora_B)} adapters are still zero: {listed(zero)}. They had no gradient. That is "
            "right for an expert that saw no token; a layer that the loss does not reach can be left out "
            "(exclude_modules).",
            UserWarning,
            stacklevel=3,
        )


# ---- what the files hold ----


def _config_of(model: nn.Module, layers: dict[str, LoRSLinear]) -> LoRSConfig:
    """Return a configuration that gives every layer its true rank and alpha, also if layers were made one by one."""
    known = vars(model).get("lors_config")
    base = known if isinstance(known, LoRSConfig) else None
    if len({layer.use_rslora for layer in layers.values()}) > 1:
        raise ValueError("Some layers use use_rslora and others do not; PEFT's format has one value for all of them.")
    first = next(iter(layers.values()))
    config = LoRSConfig.from_dict(base.to_dict()) if base is not None else LoRSConfig(gradient=first.gradient)
    config.use_rslora, config.gradient, config.rounding = first.use_rslora, first.gradient, first.rounding
    differing = [name for name, layer in layers.items() if layer.requantization != _requantization(config, name, layer)]
    if differing:
        raise ValueError(
            f"{listed(differing)} requantise otherwise than the configuration says (requantize={config.requantize}, "
            f"remainder={config.remainder!r}, dither_seed={config.dither_seed}), so an adapter saved with it would "
            "compute something else. Convert the model with get_lors_model and these options."
        )
    if base is None or any(
        config.rank_of(name) != layer.r or config.alpha_of(name) != layer.lora_alpha for name, layer in layers.items()
    ):
        config.r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
        config.lora_alpha = Counter(layer.lora_alpha for layer in layers.values()).most_common(1)[0][0]
        # "^" makes a key match from the start of the name only, here and in PEFT.
        config.rank_pattern = {f"^{re.escape(name)}": layer.r for name, layer in layers.items() if layer.r != config.r}
        config.alpha_pattern = {
            f"^{re.escape(name)}": layer.lora_alpha
            for name, layer in layers.items()
            if layer.lora_alpha != config.lora_alpha
        }
    # The names, because "all-linear" may mean something else to PEFT; as one regular expression where a name in a list
    # would, as a suffix, also select another module.
    config.target_parameters = [name for name, layer in layers.items() if layer.num_experts is not None] or None
    names = [name for name, layer in layers.items() if layer.num_experts is None]
    others = [name for name, _ in model.named_modules(remove_duplicate=False) if name not in layers]
    ambiguous = any(other.endswith(f".{name}") for name in names for other in others)
    config.target_modules = "|".join(re.escape(name) for name in names) if ambiguous else names
    config.exclude_modules = None
    return config


def _config_fields(model: nn.Module, layers: dict[str, LoRSLinear], config: LoRSConfig) -> dict[str, Any]:
    """Return the content of adapter_config.json, as PEFT writes it but for `peft_type` and our own field "lors".

    PEFT reads it once lors_cuda.peft is imported. Without that it stops at the `peft_type`: it would apply the adapter
    unmasked.
    """
    kind = original_class(model)
    return {
        "peft_type": PEFT_TYPE,
        "task_type": None,
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": config.init_lora_weights,
        "use_rslora": config.use_rslora,
        "target_modules": config.target_modules,
        "target_parameters": config.target_parameters,
        "modules_to_save": config.modules_to_save,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "lors": {
            "format_version": FORMAT_VERSION,
            **{name: getattr(config, name) for name in OWN_FIELDS},
            **to_fields({name: fingerprint(layer.whole_weight()) for name, layer in layers.items()}),
        },
    }


def _requantization(config: LoRSConfig, name: str, layer: LoRSLinear) -> Requantization:
    """What the configuration makes of the merges of a layer."""
    remainder = config.remainder or default_remainder(config.requantize, layer.sparse_weight.quantization)
    return requantization(config.requantize, remainder, dither_seed_of(config, name))


def _saved_tensors(model: nn.Module, config: LoRSConfig) -> dict[str, Tensor]:
    """Return parameters and buffers of modules_to_save under their names in the model's state_dict."""
    return {
        f"{name}.{key}": tensor
        for name, module in saved_modules(model, config).items()
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


# ---- whether it fits the model: every function returns sentences, [] if it fits ----


def _fit_converted(
    model: nn.Module,
    layers: dict[str, LoRSLinear],
    adapter: SavedAdapter,
    weights: dict[str, Callable[[], SparseWeight]],
) -> list[str]:
    """`weights` is filled with the base weights to compare: what makes each, so that one at a time exists."""
    problems = _name_stacks({name: layer.num_experts for name, layer in layers.items()}, adapter)
    if problems:
        return problems
    problems = _fit_names(list(layers), adapter)
    running = running_method(model) is not None
    for name, layer in layers.items():
        if name not in adapter.adapters:
            continue
        pair = adapter.adapters[name]
        r, alpha = adapter.config.rank_of(name), adapter.config.alpha_of(name)
        fits = (r, alpha) == (layer.r, layer.lora_alpha)
        if running:  # a method changes ranks at the same scaling; whether its state fits, it says itself
            fits = math.isclose(alpha / (math.sqrt(r) if layer.use_rslora else r), layer.scaling, rel_tol=1e-12)
        shape = (layer.out_features, layer.in_features)
        problems += _fit_layer(name, layer.num_experts, *shape, r if running else layer.r, pair)
        if not fits or adapter.config.use_rslora != layer.use_rslora:
            problems.append(
                f"'{name}' has r={r}, lora_alpha={alpha}, use_rslora={adapter.config.use_rslora} in the adapter, but "
                f"r={layer.r}, lora_alpha={layer.lora_alpha}, use_rslora={layer.use_rslora} in the model; convert the "
                "model with the adapter's values, or load into the unconverted model."
            )
        if layer.requantization != _requantization(adapter.config, name, layer):
            problems.append(
                f"'{name}' was trained with requantize={adapter.config.requantize}, "
                f"remainder={adapter.config.remainder!r}, dither_seed={adapter.config.dither_seed}, and is requantised "
                "otherwise in the model; convert the model with these, or load into the unconverted model."
            )
        for which, tensor in pair.items():
            if not running:
                check_stored(f"{which} of '{name}'", getattr(layer, which), "loaded")
            problems += _fit_dtype(f"{which} of '{name}'", tensor, whole_attribute(layer, which))
    own = vars(model).get("lors_config")
    saving = own if isinstance(own, LoRSConfig) else LoRSConfig()
    problems += _fit_saved(_saved_tensors(model, saving), adapter)
    weights.update({name: layer.whole_weight for name, layer in layers.items()})
    return problems


def _fit_unconverted(
    model: nn.Module, adapter: SavedAdapter, weights: dict[str, Callable[[], SparseWeight]]
) -> tuple[list[Target], list[str]]:
    absent = absent_modules(model, adapter)
    if absent is not None:
        return [], [absent]
    targets = find_targets(model, adapter.config)
    problems = _name_stacks({target.name: target.num_experts for target in targets}, adapter)
    if problems:
        return targets, problems
    problems = _fit_names([target.name for target in targets], adapter)
    for target in targets:
        if target.name in adapter.adapters:
            pair = adapter.adapters[target.name]
            problems += _fit_layer(target.name, target.num_experts, *target.shape, target.r, pair)
            weights[target.name] = target.sparse_weight
    problems += _fit_saved(_saved_tensors(model, adapter.config), adapter)
    return targets, problems


def absent_modules(model: nn.Module, adapter: SavedAdapter) -> str | None:
    """The sentence about an adapter's modules that the model does not have; None if it has them all."""
    modules = dict(model.named_modules())
    absent = [name for name in adapter.adapters if name.removesuffix(".base_layer") not in modules]
    if not absent:
        return None
    return (
        f"The model, {type(model).__name__}, has no module '{absent[0]}' ({len(absent)} of the adapter's "
        f"{len(adapter.adapters)} modules are missing): the adapter belongs to another model."
    )


def _name_stacks(layers: dict[str, int | None], adapter: SavedAdapter) -> list[str]:
    """Call the adapters of experts as the model's layers are, and give them their shapes; of another number of experts
    the sentences, and nothing is changed."""
    called = file_names(layers)
    problems = []
    for name, num_experts in layers.items():
        if num_experts is None or called[name] not in adapter.adapters:
            continue
        experts, rest = divmod(len(adapter.adapters[called[name]]["lora_A"]), adapter.config.rank_of(name))
        if experts != num_experts and not rest:
            problems.append(f"'{name}' is of {experts} experts in the adapter, and the model has {num_experts}.")
    if problems:
        return problems
    found = {name: adapter.adapters.pop(called[name]) for name in layers if called[name] in adapter.adapters}
    for name, pair in found.items():
        for which, tensor in pair.items():
            pair[which] = from_file(which, tensor, layers[name]).contiguous()
        adapter.adapters[name] = pair
    return []


def _fit_names(names: list[str], adapter: SavedAdapter) -> list[str]:
    known = set(names)
    without = [name for name in names if name not in adapter.adapters]
    unknown = [name for name in adapter.adapters if name not in known]
    return [f"It has no tensors for '{name}', which is adapted in the model." for name in without] + [
        f"It has tensors for '{name}', which is not adapted in the model." for name in unknown
    ]


def _fit_layer(
    name: str, num_experts: int | None, out_features: int, in_features: int, r: int, pair: dict[str, Tensor]
) -> list[str]:
    problems = []
    largest = min(out_features, in_features)
    if r > largest:  # as a weighted sum of adapters may
        problems.append(
            f"'{name}' has rank {r} in the adapter, and its layer of {out_features} x {in_features} takes at most "
            f"{largest}. Load it with lors_cuda.peft.from_pretrained and merge it there; or, where PEFT has summed it "
            f"from others, sum them by add_weighted_adapter(..., combination_type='svd', svd_rank={largest})."
        )
    leading = [] if num_experts is None else [num_experts]
    for which, needed in (("lora_A", [*leading, r, in_features]), ("lora_B", [*leading, out_features, r])):
        tensor = pair[which]
        if list(tensor.shape) != needed:
            problems.append(f"{which} of '{name}' has shape {list(tensor.shape)}, but the model needs {needed}.")
        if tensor.dtype not in DTYPES:
            problems.append(f"{which} of '{name}' has dtype {tensor.dtype}, but a floating-point one is needed.")
    return problems


def _fit_dtype(what: str, stored: Tensor, own: Tensor) -> list[str]:
    """Refuse a conversion that would lose digits: float32 into bfloat16, bfloat16 into float16."""
    if stored.dtype != own.dtype and torch.promote_types(stored.dtype, own.dtype) != own.dtype:
        return [
            f"{what} is {stored.dtype} in the adapter and {own.dtype} in the model, which cannot hold it. "
            "Load it before the model is converted to that dtype."
        ]
    return []


def _fit_saved(own: dict[str, Tensor], adapter: SavedAdapter) -> list[str]:
    problems = [f"It has no tensor for '{key}' (modules_to_save)." for key in own if key not in adapter.saved]
    for key, tensor in adapter.saved.items():
        if key not in own:
            problems.append(f"It has a tensor '{key}', which is in none of the model's modules_to_save.")
        elif tensor.shape != own[key].shape:
            shapes = f"{list(tensor.shape)}, but the model needs {list(own[key].shape)}"
            problems.append(f"'{key}' has shape {shapes}.")
        else:
            problems += _fit_dtype(f"'{key}'", tensor, own[key])
    return problems


def _fit_base(
    weights: dict[str, Callable[[], SparseWeight]], adapter: SavedAdapter, strict_mask: bool, strict_values: bool
) -> list[str]:
    """Whether the base weights are those it was trained on; warns of other values unless they are refused."""
    if adapter.trained_on is None:
        if not strict_mask:
            return []
        return [
            "It was not saved by lors_cuda and has no mask fingerprints, so it cannot be checked against the model's "
            "zeros. Use strict_mask=False to load it all the same."
        ]
    found = {name: fingerprint(weight()) for name, weight in weights.items()}
    problem = mask_problem(found, adapter.trained_on)
    if problem is not None:  # then other values are no news
        return [f"{problem}, or use strict_mask=False to load it all the same."] if strict_mask else []
    problem = value_problem(found, adapter.trained_on)
    if problem is not None and strict_values:
        return [f"{problem}, or use strict_values=False to load it all the same."]
    if problem is not None:
        warnings.warn(f"The adapter in '{adapter.path}': {problem}.", UserWarning, stacklevel=3)
    return []


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers whose prefixes do not belong into the file."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}.")
    while True:
        inner = model._modules.get("_orig_mod")  # torch.compile's
        if any(kind.__name__ in _WRAPPERS for kind in type(model).__mro__):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner
