# SPDX-License-Identifier: Apache-2.0
# Which weights are kept, and so how many values are stored, is a property of the stored weight: a state decides the
# shapes of a layer's tensors. But only where it fits, because a refused state must leave the layer as it was.
"""What a SparseLinear takes from a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checks import DTYPES
from ._distributed import is_sharded, whole
from .codes import STORED
from .formats import layout_of
from .quantization import SCALE_DTYPES
from .weight import SparseWeight

if TYPE_CHECKING:
    from .sparse_linear import SparseLinear

GRID = ("weight_scales", "weight_zero_points")
_BUFFERS = ("weight_mask", "weight_index", *GRID)
STATE = ("weight_values", *_BUFFERS, "mask_digest")
_DTYPES = {
    "weight_values": DTYPES,
    "weight_mask": (torch.int32,),
    "weight_index": (torch.uint8, torch.int64),
    "weight_scales": SCALE_DTYPES,
    "weight_zero_points": (torch.int8,),
}
NO_NUMBERS = (
    "Masks are not numbers, nor are codes: average, decay or convert lora_A and lora_B, or weight_values that are "
    "floating, alone, and take weight_mask, weight_index, mask_digest and a quantised weight unchanged from a model of "
    "the same mask."
)


def fitted_state(
    layer: SparseLinear, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], errors: list[str]
) -> dict[str, Any] | None:
    """The state as torch copies it into the layer, which is given tensors of its shapes; None, with one of ``errors``
    more, where it does not fit."""
    given = {name: state_dict[prefix + name] for name in STATE if prefix + name in state_dict}
    if not given:
        return state_dict
    try:
        loaded = _fitting(layer, given, bool(local_metadata.get("assign_to_params_buffers")))
    except ValueError as error:
        errors.append(f"{prefix[:-1] or type(layer).__name__}: {error}")
        return None
    for name, tensor in loaded.items():
        own = getattr(layer, name)
        dtype = getattr(tensor, "dtype", None)
        if name in ("weight_values", "mask_digest"):  # which are converted to what the layer has
            dtype = own.dtype
        if tensor is None or own is None or (own.shape, own.dtype) != (tensor.shape, dtype):
            device = layer.weight_values.device
            new: Any = None if tensor is None else torch.empty_like(tensor, dtype=dtype, device=device)
            setattr(layer, name, nn.Parameter(new, requires_grad=False) if name == "weight_values" else new)
    layer._checked = None
    others = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in given}
    return {**others, **{prefix + name: tensor for name, tensor in loaded.items() if tensor is not None}}


def _fitting(layer: SparseLinear, given: dict[str, Tensor], assign: bool) -> dict[str, Tensor | None]:
    """The tensors of a state as this layer takes them: with a digest, and a mask that its dtype cannot lose.

    Where both are sharded the values are gathered to be checked, so that all processes must load together.

    Raises:
        ValueError: they are no stored weight, or not one that this layer can hold.
    """
    values, bits, index, scales, zero_points, digest = (given.get(name) for name in STATE)
    if values is not None and (scales is None) != (layer.kind == ""):
        raise ValueError(
            f"the state has a weight {'of values' if scales is None else 'of codes with scales'} and the layer one "
            f"{f'of {layer.kind} codes' if layer.kind else 'of values'}; make the layer from a weight that is "
            "quantised as the saved one."
        )
    for name, dtypes in _DTYPES.items():
        if name == "weight_values" and layer.kind:
            dtypes = (STORED[layer.kind],)
        if name in given and given[name].dtype not in dtypes:
            allowed = " or ".join(map(str, dtypes))
            raise ValueError(f"{name} has dtype {given[name].dtype}; it must be {allowed}. {NO_NUMBERS}")
    if values is None:  # a state without frozen parameters
        for name in given.keys() & set(_BUFFERS):
            own_tensor = getattr(layer, name)
            if own_tensor is None or not torch.equal(given[name].to(own_tensor.device), own_tensor):
                raise ValueError(f"the state has another {name} than the layer, and no weight_values. {NO_NUMBERS}")
        return {}
    layout, own = layout_of(index), layout_of(layer.weight_index)
    if layout != own:
        raise ValueError(
            f"the state has a weight of layout '{layout}' and the layer one of layout '{own}'; convert the model "
            f"with layout='{layout}' before loading it."
        )
    _check_sharding(layer, values)
    all_values = whole(values)  # before what only one process may refuse
    try:
        grid = layer.grid_of(scales, zero_points)
        weight = SparseWeight.from_stored(all_values, bits, index, layer.in_features, grid)
    except ValueError as error:  # of an average that was cast to integers, too
        raise ValueError(f"{error} {NO_NUMBERS}") from error
    if weight.shape != layer.stored_shape:
        raise ValueError(
            f"size mismatch for weight_values: the stored weight has shape {tuple(weight.shape)}, not "
            f"{layer.stored_shape}."
        )
    if digest is not None and not weight.has_digest(digest):
        raise ValueError(f"the mask is not the one that was saved: its digest is another one. {NO_NUMBERS}")
    if not assign and grid is None:
        bits = weight.to(layer.weight_values.dtype).mask_bits
    return dict(zip(STATE, (values, bits, index, scales, zero_points, weight.digest()), strict=True))


def _check_sharding(layer: SparseLinear, values: Tensor) -> None:
    if is_sharded(layer.weight_values) != is_sharded(values):
        sharded = "the layer is sharded and the state is not"
        if is_sharded(values):
            sharded = "the state is sharded and the layer is not"
        raise ValueError(
            f"{sharded}; load it by set_model_state_dict of torch.distributed.checkpoint.state_dict, a whole state "
            "with StateDictOptions(full_state_dict=True)."
        )
    if is_sharded(values) and values.shape != layer.weight_values.shape:
        raise ValueError(
            "the state's weight_values does not have the layer's shape, so its weight has another mask, and a "
            "layer that is sharded cannot take that on. Load it before fully_shard."
        )
