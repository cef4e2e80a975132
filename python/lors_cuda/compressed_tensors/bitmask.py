# SPDX-License-Identifier: Apache-2.0
# One weight in compressed-tensors' formats `sparse-24-bitmask` (its releases 0.9 to 0.14) and `sparse-bitmask` (0.3 to
# 0.14), to and from a dense tensor, through SparseWeight. Used by checkpoint.py; reads and writes no files.
"""The tensors that compressed-tensors stored for a sparse weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from .._checks import DTYPES, check_choice
from ..formats import COLUMNS, FULL, translate
from ..weight import SparseWeight

SPARSE24_BITMASK, BITMASK = "sparse-24-bitmask", "sparse-bitmask"
# {format: the last parts of the tensors' names}
PARTS = {
    SPARSE24_BITMASK: ("compressed", "bitmask", "shape"),
    BITMASK: ("compressed", "bitmask", "shape", "row_offsets"),
}
FORMATS = tuple(PARTS)


def encode_weight(weight: Tensor, format: str) -> dict[str, Tensor]:
    """A dense weight [N, K] as the tensors of ``format``, on the CPU; -0.0 is zero.

    ==============  =============================================  ==========================================
    part            ``"sparse-24-bitmask"``                        ``"sparse-bitmask"``
    ==============  =============================================  ==========================================
    `compressed`    [N, K/2], two values of each group of four     [number of nonzeros], row by row
    `bitmask`       uint8 [N, ceil(K/8)], bit k % 8 of byte k / 8  the same
    `shape`         int64 [2, 1]: N, K                             int64 [2]
    `row_offsets`                                                  int64 [N]: where each row begins
    ==============  =============================================  ==========================================

    Raises:
        ValueError: an unknown format, not a floating-point weight [N, K], or, for ``"sparse-24-bitmask"``, not 2:4.
    """
    check_choice("format", format, FORMATS)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; it must be a torch.Tensor.")
    sparse = SparseWeight.from_dense(weight.detach().cpu(), "2:4" if format == SPARSE24_BITMASK else "bitmap")
    N, K = sparse.shape
    shape = torch.tensor([N, K])
    assert sparse.index is not None
    if format == SPARSE24_BITMASK:
        bitmask = translate(sparse.index, {code: COLUMNS[full] for code, full in FULL.items()}, K).to(torch.uint8)
        return {"compressed": sparse.values, "bitmask": bitmask, "shape": shape.reshape(2, 1)}
    assert sparse.mask_bits is not None
    bitmask = sparse.mask_bits.view(torch.uint8)[:, : (K + 7) // 8].contiguous()
    return {
        "compressed": sparse.values,
        "bitmask": bitmask,
        "shape": shape,
        "row_offsets": sparse.index[:-1].contiguous(),
    }


def decode_weight(parts: Mapping[str, Tensor], format: str, name: str = "weight") -> Tensor:
    """The dense tensor of the parts that :func:`encode_weight` or compressed-tensors made; its zeros are +0.

    Before the dense tensor is made, everything is checked: dtypes, shapes, the number of bits in every row against its
    values and offsets, bits beyond the last column, and two of every four for ``"sparse-24-bitmask"``.

    Args:
        parts: the tensors by the last part of their names, as in :func:`encode_weight`. ``"sparse-bitmask"`` may have a
            one-dimensional shape: compressed-tensors before 0.9 compressed every parameter.
        format: one of FORMATS.
        name: the weight's name in error messages.

    Raises:
        ValueError: an unknown format, a missing or surplus part, or parts that contradict each other; the message names
            the weight and the first wrong place.
    """
    check_choice("format", format, FORMATS)
    if set(parts) != set(PARTS[format]):
        wrong = ", ".join(repr(part) for part in sorted(set(parts) ^ set(PARTS[format])))
        _refuse(name, f"format {format!r} has the parts {', '.join(PARTS[format])}, and {wrong} is missing or too much")
    values, shape = parts["compressed"], _shape(parts["shape"], format, name)
    if values.dtype not in DTYPES:
        raise ValueError(
            f"The values of '{name}' are {values.dtype}; float32, bfloat16, float16 and float64 are read, and codes "
            "of a quantized weight only where config.json says how it is quantized (config_groups)."
        )
    N, K = shape if len(shape) == 2 else (1, *shape)
    _check(parts["bitmask"], "bitmask", torch.uint8, (*shape[:-1], (K + 7) // 8), name)
    bitmask = parts["bitmask"].reshape(N, -1)
    if format == SPARSE24_BITMASK:
        sparse = _sparse24(values, bitmask, K, name)
    else:
        sparse = _bitmap(values, bitmask, parts["row_offsets"], K, name)
    return sparse.to_dense().reshape(shape)


def _sparse24(values: Tensor, bitmask: Tensor, K: int, name: str) -> SparseWeight:
    N = bitmask.shape[0]
    if K % 4:
        _refuse(name, f"its shape is {(N, K)}, and 2:4 needs a multiple of 4 columns")
    _check(values, "compressed", values.dtype, (N, K // 2), name)
    metadata = translate(bitmask, {columns: code for code, columns in COLUMNS.items()}, K)
    wrong = metadata < 0
    if bool(wrong.any()):
        row, byte = wrong.nonzero()[0].tolist()
        _refuse(
            name,
            f"{int(wrong.sum())} of {bitmask.numel()} bytes of its bitmask do not keep two of every four columns, the "
            f"first in row {row}, columns {8 * byte} to {min(8 * byte + 8, K) - 1} (0x{int(bitmask[row, byte]):02x})",
        )
    return SparseWeight.from_sparse24(values, metadata.to(torch.uint8))


def _bitmap(values: Tensor, bitmask: Tensor, row_offsets: Tensor, K: int, name: str) -> SparseWeight:
    N, held = bitmask.shape
    # A one-dimensional weight has one offset, which old versions stored as a scalar.
    _check(row_offsets.reshape(-1), "row_offsets", torch.int64, (N,), name)
    if values.dim() != 1:
        _refuse(name, f"'compressed' has shape {tuple(values.shape)} and must be one-dimensional")
    words = bitmask.new_zeros(N, 4 * ((K + 31) // 32))
    words[:, :held] = bitmask
    offsets = torch.cat([row_offsets.reshape(-1), row_offsets.new_tensor([values.numel()])])
    try:
        return SparseWeight.from_bitmap(values, words.view(torch.int32), offsets, K)
    except ValueError as error:
        _refuse(name, str(error).partition(". ")[0])


def _shape(stored: Tensor, format: str, name: str) -> tuple[int, ...]:
    dimensions = (2,) if format == SPARSE24_BITMASK else (1, 2)
    if stored.dtype != torch.int64 or stored.numel() not in dimensions:
        needed = " or ".join(map(str, dimensions))
        _refuse(name, f"'shape' is {stored.dtype} with {stored.numel()} numbers; it must be int64 with {needed}")
    shape = tuple(stored.reshape(-1).tolist())
    if min(shape) < 1:
        _refuse(name, f"its shape is {shape}")
    return shape


def _check(tensor: Tensor, part: str, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        _refuse(name, f"'{part}' is {tensor.dtype} with shape {tuple(tensor.shape)}; it must be {dtype} {shape}")


def _refuse(name: str, what: str) -> NoReturn:
    raise ValueError(f"The compressed weight '{name}' is corrupted or incomplete: {what}. Get the file again.")
