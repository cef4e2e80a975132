# SPDX-License-Identifier: Apache-2.0
# A 2:4 SparseWeight <-> torch.sparse.SparseSemiStructuredTensor (which torch calls a prototype; tested with 2.13).
# CUTLASS form: our values, our metadata translated and reordered, on any device. cuSPARSELt form: opaque, so converted
# by torch's own functions on CUDA, through a dense copy. NOTE: the cuSPARSELt path has not yet run on hardware.
"""To and from torch's semi-structured sparse tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_mask
from .compressed_tensors import load_sparse_checkpoint, save_sparse_checkpoint
from .formats import FULL, translate
from .weight import SparseWeight

__all__ = [
    "from_torch_semi_structured",
    "load_sparse_checkpoint",
    "save_sparse_checkpoint",
    "to_torch_semi_structured",
]

# {backend: (rows, columns) that a weight of 16-bit values must have a multiple of}, from _DTYPE_SHAPE_CONSTRAINTS in
# torch/sparse/semi_structured.py
_MULTIPLES = {"cutlass": (32, 64), "cusparselt": (16, 16)}
_DTYPES = (torch.float16, torch.bfloat16)


def to_torch_semi_structured(weight: SparseWeight, backend: str = "cutlass") -> Tensor:
    """A 2:4 weight as torch's semi-structured tensor, for torch's own sparse matmuls on CUDA.

    torch's form keeps exactly two positions of every group of four, zeros included, so it does not hold the exact mask.
    If that matters, keep ``weight.mask()`` and give it to :func:`from_torch_semi_structured`.

    Args:
        weight: [N, K] of layout ``"2:4"``, float16 or bfloat16.
        backend: ``"cutlass"``: packed values [N, K/2] (those of ``weight``, not copied) and int16 metadata [N, K/16],
            on the weight's device; N a multiple of 32, K of 64. ``"cusparselt"``: one opaque tensor, made by
            ``torch._cslt_compress``; the weight on CUDA, N and K multiples of 16.

    Returns:
        torch.sparse.SparseSemiStructuredTensorCUTLASS or ...CUSPARSELT, [N, K].

    Raises:
        TypeError: not a SparseWeight. ValueError: another layout, dtype, size or backend. RuntimeError: CUDA or
            cuSPARSELt is needed and missing.
    """
    _check_backend(backend)
    if not isinstance(weight, SparseWeight):
        raise TypeError(f"weight is a {type(weight).__name__}; it must be a SparseWeight, as from_dense makes it.")
    if weight.layout != "2:4":
        raise ValueError(
            f"weight has layout {weight.layout!r}; a semi-structured tensor is 2:4: convert it with "
            "SparseWeight.from_dense(weight.to_dense(), '2:4')."
        )
    _check_dtype_and_shape(weight.dtype, weight.shape, backend)
    if backend == "cusparselt":
        return _to_cusparselt(weight)
    assert weight.index is not None
    metadata = translate(weight.index, FULL, weight.shape[1])
    if bool((metadata < 0).any()):
        raise ValueError(
            f"The metadata of the 2:4 weight of shape {tuple(weight.shape)} is corrupted: it has a code that does not "
            "occur. Compress the dense weight again, or load another copy of the file."
        )
    return _tensor_class(backend)(
        weight.shape, weight.values, _reorder(metadata.to(torch.uint8).view(torch.int16)), None, None, None
    )


def from_torch_semi_structured(tensor: Tensor, mask: Tensor | None = None) -> SparseWeight:
    """torch's semi-structured tensor as a 2:4 weight.

    Args:
        tensor: [N, K] of torch.sparse.SparseSemiStructuredTensorCUTLASS (any device) or ...CUSPARSELT (CUDA; read
            through its ``to_dense()``), float16 or bfloat16, as ``to_sparse_semi_structured`` makes it.
        mask: bool [N, K], True where kept. None: kept where the value is not 0. torch's form does not distinguish a
            kept zero from a filler, so a weight with kept zeros needs its mask here.

    Raises:
        TypeError: another class. ValueError: metadata with an invalid code (the first place is named), a wrong shape or
            dtype, a transposed tensor, or a mask that disagrees: a nonzero value outside it, or more than two kept in
            a group. RuntimeError: a cuSPARSELt tensor that is not on CUDA.
    """
    backend = next((name for name in _MULTIPLES if isinstance(tensor, _tensor_class(name))), None)
    if backend is None:
        raise TypeError(
            f"tensor is a {type(tensor).__name__}; it must be a SparseSemiStructuredTensor of torch.sparse. A dense "
            "tensor is compressed by SparseWeight.from_dense(tensor, '2:4')."
        )
    parts: Any = tensor
    if tensor.dim() != 2 or parts.packed is None:
        raise ValueError(
            f"tensor of shape {tuple(tensor.shape)} is transposed or has no packed values; give the [N, K] tensor that "
            "to_sparse_semi_structured returned: tensor.t() of a transposed one."
        )
    _check_dtype_and_shape(tensor.dtype, tensor.shape, backend)
    if backend == "cusparselt":
        dense = _from_cusparselt(tensor)
    else:
        dense = _from_cutlass(parts.packed, parts.meta, tensor.shape)
    if mask is not None:
        check_mask(mask, dense)
        outside = (dense != 0) & ~mask
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"mask disagrees with the tensor: {int(outside.sum())} values outside it are not 0, the first at row "
                f"{row}, column {column}. Give the mask that belongs to this tensor, or none."
            )
    return SparseWeight.from_dense(dense, "2:4", mask)


def _from_cutlass(packed: Tensor, meta: Tensor | None, shape: torch.Size) -> Tensor:
    """The dense tensor of the CUTLASS form; all codes are checked first."""
    N, K = shape
    if packed.shape != (N, K // 2):
        raise ValueError(f"packed has shape {tuple(packed.shape)}; a tensor of shape {(N, K)} needs {(N, K // 2)}.")
    if meta is None or meta.dtype != torch.int16 or meta.shape != (N, K // 16):
        found = "missing" if meta is None else f"{meta.dtype} with shape {tuple(meta.shape)}"
        raise ValueError(
            f"meta is {found}; it must be int16 of shape {(N, K // 16)}, as to_sparse_semi_structured makes it. A "
            "tensor of prune_dense_static_sort has another form; compress the dense one, "
            "SparseWeight.from_dense(dense, '2:4')."
        )
    if meta.device != packed.device:
        raise ValueError(f"meta is on {meta.device} and packed on {packed.device}; move them to the same device.")
    codes = _restore(meta).view(torch.uint8)
    # Fillers count as kept here, so every valid code has two positions and equals ours.
    wrong = translate(codes, {code: code for code in FULL.values()}, K) < 0
    if bool(wrong.any()):
        row, byte = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"The metadata of the tensor of shape {(N, K)} is corrupted in {int(wrong.sum())} of {codes.numel()} "
            f"bytes, first in row {row}, columns {8 * byte} to {8 * byte + 7}: 0x{int(codes[row, byte]):02x} is no "
            "code of two positions in rising order. Make the tensor again."
        )
    return SparseWeight.from_sparse24(packed.contiguous(), codes).to_dense()


def _to_cusparselt(weight: SparseWeight) -> Tensor:
    _require_cuda(
        "weight", weight.device, "torch makes the cuSPARSELt form on CUDA only: weight.to('cuda') first, or use "
        "backend='cutlass'",
    )  # fmt: skip
    return _tensor_class("cusparselt").from_dense(weight.to_dense())


def _from_cusparselt(tensor: Tensor) -> Tensor:
    _require_cuda("tensor", tensor.device, "the cuSPARSELt form is opaque, and only cuSPARSELt on CUDA reads it")
    # torch multiplies by the identity, which is exact: each output is one value times 1.
    return tensor.to_dense()


def _require_cuda(name: str, device: torch.device, reason: str) -> None:
    if device.type != "cuda":
        raise RuntimeError(f"{name} is on {device}; {reason}.")
    if not torch.backends.cusparselt.is_available():
        raise RuntimeError("This torch finds no cuSPARSELt library; use backend='cutlass', or install torch with it.")


def _reorder(meta: Tensor) -> Tensor:
    """Logical int16 metadata [N, K/16] in the order that CUTLASS reads it (its reorder_meta with
    ColumnMajorInterleaved<2>; torch/sparse/_semi_structured_conversions.py).

    Row 32a + 16b + 8c + d goes to row 32a + 4d + 2b + c; each 2 x 2 block there is transposed; then pairs of columns
    are stored one after the other. As a permutation of axes, the transposition swaps c with the column's lowest bit.
    """
    N, columns = meta.shape
    split = meta.view(N // 32, 2, 2, 8, columns // 2, 2)  # a, b, c, d, column / 2, column % 2
    return split.permute(4, 0, 3, 1, 5, 2).reshape(N, columns)


def _restore(meta: Tensor) -> Tensor:
    """Undo :func:`_reorder`."""
    N, columns = meta.shape
    stored = meta.reshape(columns // 2, N // 32, 8, 2, 2, 2)  # column / 2, a, d, b, column % 2, c
    return stored.permute(1, 3, 5, 2, 0, 4).reshape(N, columns)


def _tensor_class(backend: str) -> Any:
    names = {"cutlass": "SparseSemiStructuredTensorCUTLASS", "cusparselt": "SparseSemiStructuredTensorCUSPARSELT"}
    return getattr(torch.sparse, names[backend])


def _check_backend(backend: str) -> None:
    if backend not in _MULTIPLES:
        raise ValueError(f"backend is {backend!r}; it must be 'cutlass' or 'cusparselt'.")


def _check_dtype_and_shape(dtype: torch.dtype, shape: torch.Size, backend: str) -> None:
    if dtype not in _DTYPES:
        hint = "torch's keep one of two there, not two of four; " if dtype == torch.float32 else ""
        raise ValueError(
            f"The dtype is {dtype}; semi-structured tensors are converted in float16 and bfloat16. {hint}"
            "Convert it with .to(torch.bfloat16), or go through its to_dense()."
        )
    N, K = shape
    rows, columns = _MULTIPLES[backend]
    if N % rows or K % columns:
        raise ValueError(
            f"The weight has shape {(N, K)}; torch's {backend} form needs out_features to be a multiple of {rows} and "
            f"in_features of {columns}."
        )
