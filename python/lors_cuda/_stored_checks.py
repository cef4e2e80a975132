# SPDX-License-Identifier: Apache-2.0
"""Whether tensors are a stored weight, whatever they hold: of values or codes, in every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import DTYPES, check_tensor
from ._library import check_device
from .codes import STORED, check_slots, slots, stored_shape
from .formats import check_bitmap, check_dense, check_sparse24, padded_offsets, row_offsets
from .quantization import QuantizationGrid


def check_stored(
    layout: str,
    values: Tensor,
    mask_bits: Tensor | None,
    index: Tensor | None,
    in_features: int | None = None,
    grid: QuantizationGrid | None = None,
) -> None:
    """Refuse what is no stored weight of this layout; its grid is checked, too.

    Args:
        in_features: of a bitmap and of codes; the others' values tell it.

    Raises:
        TypeError: a tensor is none.
        ValueError: shapes, dtypes or devices do not fit, the content is that of no weight (the first place is named),
            or a quantised weight has no mask.
    """
    check_tensor("values", values)
    if layout == "2:4" and mask_bits is not None:
        raise ValueError("There is a weight_mask beside 2:4 metadata, which is its mask; one of them is wrong.")
    if layout == "bitmap" and mask_bits is None:
        raise ValueError("There are row offsets of a bitmap (weight_index) but no bits (weight_mask).")
    if grid is not None:
        N, K = grid.shape
        _check_codes(layout, values, in_features, grid)
    else:
        N, K = _shape_of_values(layout, values, index, in_features)
    check_device(values.device)
    if layout == "2:4":
        index = _part("metadata", index, torch.uint8, (N, (K + 7) // 8), values)
    elif layout == "bitmap":
        index = _part("row_offsets", index, torch.int64, (N + 1,), values)
    if mask_bits is not None:
        mask_bits = _part("mask_bits", mask_bits, torch.int32, (N, (K + 31) // 32), values)
    elif grid is not None and layout == "dense":
        raise ValueError("There is no weight_mask of a quantised weight of layout 'dense', whose codes do not tell it.")
    numbers = values if grid is None else slots(values, grid.kind)
    if index is None:
        if mask_bits is not None:
            check_dense(numbers, mask_bits)
    elif mask_bits is None:
        check_sparse24(numbers, index)
    else:
        is_padded = grid is not None and grid.kind == "int4"
        check_bitmap(numbers, mask_bits, index, K, padded_offsets if is_padded else row_offsets)
    if grid is not None:
        check_slots(values, grid.kind, mask_bits, index)


def _shape_of_values(layout: str, values: Tensor, index: Tensor | None, in_features: int | None) -> tuple[int, int]:
    """(N, K) of a weight whose values have the right dimensions and dtype."""
    dimensions = 1 if layout == "bitmap" else 2
    if values.dim() != dimensions or (dimensions == 2 and 0 in values.shape):
        needed = "[out_features, in_features / 2], both at least 1" if dimensions == 2 else "one-dimensional"
        raise ValueError(f"values have shape {tuple(values.shape)}; they must be {needed}.")
    if values.dtype not in DTYPES:
        raise ValueError(f"values have dtype {values.dtype}; they must be float32, bfloat16, float16 or float64.")
    if layout == "dense":
        return values.shape[0], values.shape[1]
    if layout == "2:4":
        if values.shape[1] % 2:
            raise ValueError(f"values have shape {tuple(values.shape)}; 2:4 has an even number in each row.")
        return values.shape[0], 2 * values.shape[1]
    check_tensor("row_offsets", index)
    assert index is not None
    if index.dim() != 1 or len(index) < 2 or not in_features or in_features < 1:
        raise ValueError(
            f"row_offsets has shape {tuple(index.shape)} and in_features is {in_features}; row_offsets must be "
            "[out_features + 1], and out_features and in_features at least 1."
        )
    return len(index) - 1, in_features


def _check_codes(layout: str, values: Tensor, in_features: int | None, grid: QuantizationGrid) -> None:
    """Refuse values that are no codes on this grid by dtype or shape, or a grid that is none."""
    grid.check()
    if in_features != grid.shape[1]:
        raise ValueError(f"in_features is {in_features}, and the scales are those of {grid.shape[1]}.")
    if values.device != grid.scales.device:
        raise ValueError(f"values are on {values.device} and scales on {grid.scales.device}; move them together.")
    # check_bitmap counts those of a bitmap.
    shape = (values.numel(),) if layout == "bitmap" else stored_shape(grid.shape, grid.kind, layout)
    if values.dtype != STORED[grid.kind] or values.shape != shape:
        raise ValueError(
            f"values are {values.dtype} with shape {tuple(values.shape)}; {grid.kind} codes of layout '{layout}' for a "
            f"weight of shape {tuple(grid.shape)} are {STORED[grid.kind]}"
            f"{', one-dimensional' if layout == 'bitmap' else f' {shape}'}."
        )


def _part(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], values: Tensor) -> Tensor:
    """A part of a weight beside its values, of this dtype and shape and where they are."""
    check_tensor(name, tensor)
    assert tensor is not None
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name} is {tensor.dtype} with shape {tuple(tensor.shape)}; it must be {dtype} {shape}.")
    if tensor.device != values.device:
        raise ValueError(f"{name} is on {tensor.device} and values on {values.device}; move them to the same device.")
    return tensor
