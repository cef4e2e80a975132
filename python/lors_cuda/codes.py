# SPDX-License-Identifier: Apache-2.0
# Codes of e4m3 are kept as bytes: torch converts float8 tensors with a model's floating numbers, fully_shard casts
# them, and not every backend of torch.distributed can send them.
"""How the codes of a quantised weight lie in each layout (docs/formats.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import compress_sparse24, kept_values, row_offsets, unpack_mask
from .quantization import CODES, QuantizationGrid

STORED = {"int8": torch.int8, "int4": torch.uint8, "e4m3": torch.uint8}  # of SparseWeight.values


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 [..., n] from -8 to 7, n even, as uint8 [..., n / 2]: two's complement, the first code in the low half."""
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low & 15 | high << 4).view(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The int8 codes [..., n] of :func:`pack_nibbles`."""
    low = ((packed & 15) ^ 8).view(torch.int8) - 8
    return torch.stack([low, packed.view(torch.int8) >> 4], -1).flatten(-2)


def pack_codes(codes: Tensor, kind: str, bits: Tensor, index: Tensor | None) -> Tensor:
    """The values of a quantised weight from its codes [N, K], which are read on the mask ``bits`` alone.

    Args:
        index: what the layout has: None, 2:4 metadata, or row offsets, of int4 those of ``formats.padded_offsets``.
    """
    K = codes.shape[1]
    # As bfloat16, which holds every byte exactly, for the one way into the layouts.
    numbers = codes.view(torch.int8).to(torch.bfloat16)
    if index is None:
        values = torch.where(unpack_mask(bits, K), numbers, 0.0)
    elif index.dtype == torch.uint8:
        values = compress_sparse24(numbers, bits, index)
    else:
        values = kept_values(numbers, bits)
        if kind == "int4":
            padded = values.new_zeros(int(index[-1]))
            padded[_is_code(bits, index)] = values
            values = padded
    stored = values.to(torch.int8)
    return pack_nibbles(stored) if kind == "int4" else stored.view(STORED[kind])


def stored_shape(shape: torch.Size, kind: str, layout: str) -> tuple[int, int]:
    """The shape of the values of a quantised weight [N, K] of layout "dense" or "2:4"."""
    per_byte = (2 if kind == "int4" else 1) * (2 if layout == "2:4" else 1)
    return shape[0], shape[1] // per_byte


def slots(values: Tensor, kind: str) -> Tensor:
    """The int8 number in each slot of stored values; of e4m3 the code's byte."""
    return unpack_nibbles(values) if kind == "int4" else values.view(torch.int8)


def unpadded(values: Tensor, kind: str, bits: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The number in each slot, and the index that a weight of such values has: of a bitmap without what makes the
    number of int4 codes even."""
    numbers = slots(values, kind)
    if kind == "int4" and bits is not None and index is not None:
        return numbers[_is_code(bits, index)], row_offsets(bits)
    return numbers, index


def as_codes(numbers: Tensor, mask: Tensor, grid: QuantizationGrid) -> Tensor:
    """Codes [N, K] from their numbers (of e4m3: bytes) as any floating type; off the mask that of zero."""
    stored = numbers.to(torch.int8)
    if grid.zero_points is not None:
        stored = torch.where(mask, stored, grid.zero_points.repeat_interleave(grid.group, 1))
    return stored.view(CODES[grid.kind])


def _is_code(bits: Tensor, offsets: Tensor) -> Tensor:
    """bool [number of slots]: False where a slot is there for an even number alone."""
    odd = row_offsets(bits).diff() % 2 == 1
    result = torch.ones(int(offsets[-1]), dtype=torch.bool, device=bits.device)
    result[offsets[1:][odd] - 1] = False
    return result


def check_slots(values: Tensor, kind: str, bits: Tensor | None, index: Tensor | None) -> None:
    """Refuse stored values that hold a byte of no e4m3 code (NaN; -0, which is stored as 0), or, of a bitmap of int4,
    a code in a slot that is there for an even number alone."""
    what = None
    if kind == "e4m3":
        wrong = (values & 127 == 127) | (values == 128)
        what = "are NaN or -0, which it cannot hold"
    elif kind == "int4" and bits is not None and index is not None:
        wrong = (unpack_nibbles(values) != 0) & ~_is_code(bits, index)
        what = "belong to no kept weight and must be 0"
    if what is not None and wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of the {kind} weight's codes {what}. Quantise the weight again, or load another copy "
            "of the file."
        )
