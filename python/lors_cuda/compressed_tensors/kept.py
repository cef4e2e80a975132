# SPDX-License-Identifier: Apache-2.0
# A model whose quantised weights stay codes in memory: SparseLinear layers in the place of its linears, made after
# transformers has built the model around placeholders that take no memory. And the way back to files.
"""Models of quantised sparse layers, and the checkpoints they are saved as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import listed
from .._files import replace_file
from .._linears import is_conv1d
from ..formats import pack_mask
from ..linear import LoRSLinear
from ..quantization import quantize_codes
from ..sparse_linear import SparseLinear
from ..weight import SparseWeight
from .files import CONFIG_NAME, read_json, require
from .quantized import Codes, encode_quantized
from .quantized_files import MASK_NAME, StoredWeight
from .schemes import FLOAT, GPTQ, MARLIN24, PACK, Quantization, Scheme

QUANTIZED = "quantized"
_COPIED = ("quant_method", "format", "quantization_status", "ignore", "config_groups", "version")
# {name of the command line: how it is stored}
SCHEMES = {
    "int4-g128": Scheme(PACK, "int4", "group", 128),
    "int4-g64": Scheme(PACK, "int4", "group", 64),
    "int4-g32": Scheme(PACK, "int4", "group", 32),
    "int4": Scheme(PACK, "int4", "channel"),
    "int8": Scheme(PACK, "int8", "channel"),
    "fp8": Scheme(FLOAT, "e4m3", "channel"),
}


@dataclass(frozen=True)
class Stored:
    """How a model's quantised layers were stored; an attribute of the model, ``lors_quantization``.

    Attributes:
        block: config.json's ``quantization_config``.
        schemes: of each layer, by its name in the model.
        activations: tensors of quantised activations, which are written back as they are.
    """

    block: dict[str, Any]
    schemes: dict[str, Scheme]
    activations: dict[str, Tensor] = field(default_factory=dict)


def sparse_weight(stored: StoredWeight) -> SparseWeight:
    """A stored weight in memory: 2:4 where its mask is, else as a bitmap or dense.

    Raises:
        ValueError: its grid is none that the kernels compute with; the weight is named.
    """
    try:
        return SparseWeight.from_quantized(stored.weight.codes, stored.weight.grid, stored.mask)
    except ValueError as error:
        raise ValueError(
            f"The quantized weight '{stored.name}' cannot be kept: {error} Load it with quantized='dequantize'."
        ) from error


def placeholders(weights: Mapping[str, SparseWeight], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the weights' shapes that take no memory, for transformers to build the model around."""
    return {name: torch.zeros(1, dtype=dtype).expand(weight.shape) for name, weight in weights.items()}


def put_kept(
    model: nn.Module,
    weights: Mapping[str, SparseWeight],
    instead: Mapping[str, Tensor],
    quantization: Quantization,
    activations: dict[str, Tensor],
) -> None:
    """Put a frozen SparseLinear in the place of each linear whose weight is a placeholder.

    Raises:
        ValueError: a weight has become a part of something else (experts in one tensor), or is no linear's.
    """
    linears = {module.weight.data_ptr(): name for name, module in model.named_modules() if type(module) is nn.Linear}
    schemes = {}
    for name, weight in weights.items():
        place = linears.get(instead[name].data_ptr())
        if place is None:
            raise ValueError(
                f"The quantized weight '{name}' cannot be kept: in {type(model).__name__} it is no nn.Linear of its "
                "own. Load it with quantized='dequantize'."
            )
        linear: Any = model.get_submodule(place)
        parent, _, child = place.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            SparseLinear(weight, linear.bias, dtype=linear.weight.dtype).train(linear.training),
        )
        schemes[place] = quantization.scheme(name.rpartition(".")[0])
    vars(model)["lors_quantization"] = Stored(quantization.block, schemes, activations)


def check_no_conv1d(model: nn.Module, directory: Path) -> None:
    """Refuse a model whose linears are stored as [in, out], where a quantised weight would be read transposed."""
    if any(is_conv1d(module) for module in model.modules()):
        raise ValueError(
            f"The model in '{directory}' has Conv1D layers, as GPT-2, and quantized weights of such are not read. Use "
            "the checkpoint that it was made from."
        )


# ---- writing --------------------------------------------------------------------------------------------------------


def quantize_linears(model: nn.Module, scheme: str, names: list[str], *, remainder: bool = False) -> None:
    """Round the weights of linears to nearest codes, in place; their zeros stay.

    Args:
        scheme: one of SCHEMES.
        names: of nn.Linear modules of the model; each becomes a frozen SparseLinear.
        remainder: int8 codes on a grid sixteen times finer than the int4 grid of `scheme`, for training with
            ``remainder="stored"``.

    Raises:
        ValueError: a weight has no such grid (the linear is named; those before it are quantised), or `remainder` is
            asked for with 8 bits.
    """
    how = SCHEMES[scheme]
    if remainder and how.kind != "int4":
        raise ValueError(f"remainder='stored' is what int4 codes drop, and {scheme} has 8 bits; leave remainder out.")
    for name in names:
        linear: Any = model.get_submodule(name)
        try:
            weight = SparseWeight.quantize(linear.weight.detach(), None, how.kind, how.group)
            if remainder and weight.quantization is not None:
                finer, mask = weight.quantization.finer(), weight.mask()
                weight = SparseWeight.from_quantized(quantize_codes(linear.weight.detach(), mask, finer), finer, mask)
        except ValueError as error:
            raise ValueError(
                f"'{name}' cannot be quantized to {scheme}: {error} Take another scheme, or exclude_modules=['{name}']."
            ) from error
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            SparseLinear(weight, linear.bias, dtype=linear.weight.dtype).train(linear.training),
        )
    if remainder:
        how = replace(how, kind="int8")
    kind = {
        "num_bits": how.bits, "type": "float" if how.kind == "e4m3" else "int", "symmetric": True,
        "strategy": how.strategy, "group_size": how.group, "dynamic": False,
    }  # fmt: skip
    ignored = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    block = {
        "quant_method": "compressed-tensors", "format": how.format, "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": kind, "input_activations": None}},
    }  # fmt: skip
    vars(model)["lors_quantization"] = Stored(block, dict.fromkeys(names, how))


def write_quantized(model: nn.Module, directory: Path) -> None:
    """Save a model of quantised layers into a directory that exists and is empty, as it was stored: the same scheme,
    scales and zero points. ``marlin-24`` becomes ``pack-quantized``, and no weight is stored as a bitmask. What was
    trained with ``remainder="stored"`` becomes int4.

    Raises:
        TypeError: not a transformers model. ValueError: it was not loaded with quantized="keep", or a layer has changed
            so that its scheme does not hold it.
    """
    stored: Stored | None = vars(model).get("lors_quantization")
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"model is a {type(model).__name__}; it must be a transformers model, with save_pretrained.")
    if stored is None:
        raise ValueError(
            "The model has no quantized layers. Load a quantized checkpoint with load_sparse_checkpoint(directory, "
            "quantized='keep'), or make one with `lors-cuda quantize`."
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    if any(_is_made_coarser(layer) for layer in layers.values()):
        stored = _int4(stored, layers)
    tensors = _without(model.state_dict(), layers)
    masks = {}
    for name, layer in layers.items():
        scheme = stored.schemes.get(name)
        weight = merged_weight(name, layer)
        grid = weight.quantization
        if grid is None or scheme is None or (grid.kind, grid.group) != (scheme.kind, scheme.columns(weight.shape[1])):
            raise ValueError(
                f"'{name}' holds no quantized weight of the checkpoint that the model was loaded from; put its "
                "to_linear() in its place."
            )
        codes = Codes(weight.codes().cpu(), grid.to("cpu"))
        tensors |= {f"{name}.{part}": tensor for part, tensor in encode_quantized(codes, scheme).items()}
        mask = weight.mask().cpu()
        if not torch.equal(mask, codes.nonzero()):
            masks[f"{name}.weight"] = pack_mask(mask)
    type(model).save_pretrained(model, str(directory), state_dict=tensors | stored.activations)  # type: ignore[attr-defined]
    if masks:
        require("safetensors.torch").save_file(masks, str(directory / MASK_NAME))
    config = read_json(directory / CONFIG_NAME)
    config["quantization_config"] = _block(stored)
    replace_file(directory / CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _is_made_coarser(layer: SparseLinear) -> bool:
    return isinstance(layer, LoRSLinear) and layer.requantize and layer.remainder == "stored"


def _int4(stored: Stored, layers: Mapping[str, SparseLinear]) -> Stored:
    """How a model is stored whose int8 codes, with their remainder, become int4 ones.

    Raises:
        ValueError: a layer stays int8, which its group in config.json cannot say.
    """
    others = [name for name, layer in layers.items() if not _is_made_coarser(layer)]
    if others or stored.block.get("quant_method") == GPTQ:
        raise ValueError(
            f"{listed(others or list(layers))} would stay int8 beside layers that remainder='stored' makes int4. Adapt "
            "all quantized layers of a model that `lors-cuda quantize` made, or save it with format='dense'."
        )
    block = deepcopy(stored.block) | {"format": PACK}
    for group in block["config_groups"].values():
        group |= {"weights": group["weights"] | {"num_bits": 4}} | ({"format": PACK} if group.get("format") else {})
    schemes = {name: replace(scheme, kind="int4", format=PACK) for name, scheme in stored.schemes.items()}
    return Stored(block, schemes, stored.activations)


def merged_weight(name: str, layer: SparseLinear) -> SparseWeight:
    """The quantised weight that a layer is saved as, its adapter merged in.

    Raises:
        ValueError: its adapter was trained without requantize, so that its merged weight is not on the grid.
    """
    if not isinstance(layer, LoRSLinear):
        return layer.check_mask(always=True)
    if not layer.requantize:
        raise ValueError(
            f"'{name}' has an adapter that was trained without requantize: rounding its merged weight to codes now "
            "would lose a part of what was learned. Save the merged model with format='dense', or train with "
            "requantize=True."
        )
    return layer.merged_sparse_weight()


def to_plain_linears(model: nn.Module) -> None:
    """Put an ordinary linear in the place of each SparseLinear, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is SparseLinear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_linear())
    vars(model).pop("lors_quantization", None)


def _without(state: Mapping[str, Tensor], layers: Mapping[str, SparseLinear]) -> dict[str, Tensor]:
    """A model's state without what its sparse layers store, but with their biases."""
    own = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"}
    return {name: tensor for name, tensor in state.items() if name not in own}


def _block(stored: Stored) -> dict[str, Any]:
    """The quantization_config of what is written. Without sparsity_config: vLLM refuses every one."""
    block = stored.block
    if block.get("quant_method") == GPTQ:
        return block
    written = {key: block[key] for key in _COPIED if key in block} | {"quant_method": "compressed-tensors"}
    written["format"] = _current(block.get("format"))
    written["config_groups"] = {
        key: {**group, "format": _current(group["format"])} if group.get("format") else group
        for key, group in block["config_groups"].items()
    }
    return {"quantization_status": "compressed", "ignore": [], **written}


def _current(format: Any) -> Any:
    return PACK if format == MARLIN24 else format
