# SPDX-License-Identifier: Apache-2.0
# One quantised weight as files hold it, to and from codes [N, K] with their scales and zero points. Everything is
# checked before it is used: the files may come from anywhere. marlin24.py undoes the order of that format.
#   codes      int8, or e4m3, one for each element: q.      4 bits are two's complement, -8 to 7, in an int8
#   weight     (q - z) s, z and s those of the element's group of columns
# Files add 2^(bits - 1) to codes and zero points of packed formats, so that they are not negative.
"""The tensors of a quantised weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..formats import COLUMNS, translate, unpack_mask
from ..quantization import CODES, SCALE_DTYPES, QuantizationGrid
from .schemes import GPTQ, MARLIN24, PACK, Scheme

WEIGHT, SCALE, ZERO_POINT, PACKED, SHAPE = (
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_packed",
    "weight_shape",
)
_SPARSE = ("compressed", "bitmask", "shape")
# The last parts of tensors' names; those of activations, which are not quantised here.
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
PARTS = frozenset({SCALE, ZERO_POINT, PACKED, SHAPE, "weight_g_idx", "scale_packed", "meta", *_SPARSE, *ACTIVATIONS})
GPTQ_PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx"})


class Codes(NamedTuple):
    """A quantised weight [N, K]: a code for each element, int8 or float8_e4m3fn, and the grid they lie on, whose group
    may be any that divides K."""

    codes: Tensor
    grid: QuantizationGrid

    def nonzero(self) -> Tensor:
        """bool [N, K]: where the weight is not 0."""
        if self.grid.kind == "e4m3":
            return self.codes.view(torch.int8) & 0x7F != 0
        return self.codes != self._zero()

    def masked(self, mask: Tensor) -> Codes:
        """The same with 0 off the mask, bool [N, K]."""
        codes = torch.where(mask, self.codes.view(torch.int8), self._zero()).to(torch.int8)
        return self._replace(codes=codes.view(self.codes.dtype))

    def dequantize(self, name: str) -> Tensor:
        """The weight [N, K] in the scales' dtype, (q - z) s with one rounding; 0 is +0.

        Raises:
            ValueError: a weight is beyond the dtype's range (the first place is named).
        """
        scales, zero_points = self.grid.scales, self.grid.zero_points
        N, K = self.codes.shape
        grouped = self.codes.to(scales.dtype).view(N, -1, self.grid.group)  # exact, and so is the difference
        if zero_points is not None:
            grouped -= zero_points.to(scales.dtype).unsqueeze(-1)
        dense = grouped.mul_(scales.unsqueeze(-1)).view(N, K)
        if not bool(dense.isfinite().all()):
            row, column = (~dense.isfinite()).nonzero()[0].tolist()
            refuse(name, f"code times scale at row {row}, column {column} is beyond the range of {scales.dtype}")
        return dense.add_(0.0)

    def _zero(self) -> Tensor | int:
        """The code of 0, at every place."""
        zero_points = self.grid.zero_points
        return 0 if zero_points is None else zero_points.repeat_interleave(self.grid.group, dim=1)


def decode_quantized(parts: Mapping[str, Tensor], scheme: Scheme, name: str) -> Codes:
    """The codes of a weight's tensors, by the last parts of their names.

    Raises:
        ValueError: a part is missing or surplus; a dtype, shape, code, scale or zero point does not fit; the message
            names the weight and the first wrong place.
    """
    parts = {part: tensor for part, tensor in parts.items() if part not in ACTIVATIONS}
    if scheme.format == GPTQ:
        return _gptq(parts, scheme, name)
    if scheme.format == MARLIN24:
        from .marlin24 import decode_marlin24

        codes, scales = decode_marlin24(parts, scheme, name)
        return Codes(codes, QuantizationGrid(scheme.kind, scheme.columns(codes.shape[1]), checked_scales(scales, name)))
    packed, zeros = scheme.format == PACK, set() if scheme.symmetric else {ZERO_POINT}
    stored = {PACKED, SHAPE} if packed else set(_SPARSE) if scheme.bitmask else {WEIGHT}
    check_parts(parts, stored | {SCALE} | zeros, {ZERO_POINT}, name)
    if packed:
        N, K = read_shape(parts[SHAPE], name)
        check(parts[PACKED], PACKED, torch.int32, (N, -(-K * scheme.bits // 32)), name)
        codes = unpack_rows(parts[PACKED], scheme.bits, K)
    elif scheme.bitmask:
        codes = _expand_bitmask(parts, scheme, name)
    else:
        codes = parts[WEIGHT]
        if codes.dim() != 2 or 0 in codes.shape:
            refuse(name, f"'weight' has shape {tuple(codes.shape)}; it must have rows and columns")
        check(codes, WEIGHT, CODES[scheme.kind], tuple(codes.shape), name)
    N, K = codes.shape
    _check_codes(codes, scheme, name)
    scales = _spread(parts[SCALE], scheme, N, K, name)
    zero_points = _zero_points(parts.get(ZERO_POINT), scheme, scales.shape, name)
    return Codes(codes, QuantizationGrid(scheme.kind, scheme.columns(K), scales, zero_points))


def encode_quantized(weight: Codes, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a weight by the last parts of their names: `decode_quantized` gives the same codes. A format that
    nothing reads any more is written as the one that holds the same: marlin-24 as pack-quantized, and no bitmask.
    """
    codes, scales = weight.codes, weight.grid.scales
    zeros = torch.zeros_like(scales, dtype=torch.int8) if weight.grid.zero_points is None else weight.grid.zero_points
    N, K = codes.shape
    bits, middle = scheme.bits, 1 << (scheme.bits - 1)
    if scheme.format == GPTQ:
        return {
            "qweight": _pack(codes.t(), middle, bits, 0),
            "qzeros": _pack(zeros.t(), middle - scheme.subtracted, bits, 1),
            "scales": compact(scales.t()),
            "g_idx": torch.arange(K, dtype=torch.int32) // weight.grid.group,
        }
    parts = {WEIGHT: codes, SCALE: scales, ZERO_POINT: zeros}
    if scheme.format in (PACK, MARLIN24):
        del parts[WEIGHT]
        parts |= {PACKED: _pack(codes, middle, bits, 1), SHAPE: torch.tensor([N, K])}
        parts[ZERO_POINT] = _pack(zeros, middle, bits, 0)
    elif scheme.strategy == "tensor":
        parts[ZERO_POINT] = zeros[:1, 0].clone()
    if scheme.strategy == "tensor":
        parts[SCALE] = scales[:1, 0].clone()
    if scheme.symmetric:
        del parts[ZERO_POINT]
    return parts


# ---- packed words ---------------------------------------------------------------------------------------------------


def compact(tensor: Tensor) -> Tensor:
    """A copy with the strides of its shape, which contiguous() leaves odd where a dimension is 1."""
    return tensor.clone(memory_format=torch.contiguous_format)


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """int8 [rows, count] of int32 [rows, words]: 32 / bits codes in a word from its lowest bits, less 2^(bits - 1)."""
    data = compact(words).view(torch.uint8)  # little end first, as the words' bits are
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), -1).flatten(1)
    return (data[:, :count] - (1 << (bits - 1))).view(torch.int8)  # uint8 goes round, as two's complement does


def _pack(codes: Tensor, added: int, bits: int, dim: int) -> Tensor:
    """int32 words of int8 codes and a number added to each, packed along a dimension, which is filled up with zeros."""
    lines = codes.view(torch.uint8) + added  # goes round, as in unpack_rows
    lines = lines if dim == 1 else lines.t()
    lines = torch.nn.functional.pad(lines, (0, -lines.shape[1] % (32 // bits)))
    if bits == 4:
        lines = lines[:, 0::2] | lines[:, 1::2] << 4
    words = compact(lines).view(torch.int32)
    return words if dim == 1 else compact(words.t())


def _gptq(parts: Mapping[str, Tensor], scheme: Scheme, name: str) -> Codes:
    check_parts(parts, {"qweight", "qzeros", "scales"}, {"g_idx"}, name)
    words, bits = parts["qweight"], scheme.bits
    if words.dim() != 2 or 0 in words.shape:
        refuse(name, f"'qweight' has shape {tuple(words.shape)}; it must have rows and columns")
    K, N, held = words.shape[0] * (32 // bits), words.shape[1], 32 // bits
    check(words, "qweight", torch.int32, (K // held, N), name)
    group = scheme.columns(K)
    _check_group(group, K, name)
    if N % held:
        refuse(name, f"it has {N} rows, and GPTQ packs {held} zero points into a word")
    check(parts["qzeros"], "qzeros", torch.int32, (K // group, N // held), name)
    scales = parts["scales"]
    if scales.dtype not in SCALE_DTYPES or tuple(scales.shape) != (K // group, N):
        refuse(
            name,
            f"'scales' is {scales.dtype} with shape {tuple(scales.shape)}; it must be floating with {(K // group, N)}",
        )
    if "g_idx" in parts:
        check(parts["g_idx"], "g_idx", torch.int32, (K,), name)
        if not torch.equal(parts["g_idx"], torch.arange(K, dtype=torch.int32) // group):
            raise ValueError(
                f"The quantized weight '{name}' is in act-order: the groups in its g_idx are not {group} columns each, "
                "in their order, and that is not read. Use the checkpoint that it was made from."
            )
    codes = unpack_rows(words.t(), bits, K)
    zeros = unpack_rows(parts["qzeros"], bits, N).t().to(torch.int16) + scheme.subtracted
    middle = 1 << (bits - 1)
    if bool((zeros == middle).any()):
        row, at = (zeros == middle).nonzero()[0].tolist()
        raise ValueError(
            f"The quantized weight '{name}' has the stored zero point {2 * middle - 1} in row {row}, group {at}, which "
            f"some readers of GPTQ's files take for {2 * middle} and others for 0; it is not read. Save the model as "
            "'gptq_v2'."
        )
    zero_points = compact(zeros.to(torch.int8)) if bool(zeros.any()) else None
    return Codes(codes, QuantizationGrid(scheme.kind, group, checked_scales(compact(scales.t()), name), zero_points))


# ---- checks ---------------------------------------------------------------------------------------------------------


def refuse(name: str, what: str) -> NoReturn:
    raise ValueError(f"The quantized weight '{name}' is corrupted or incomplete: {what}. Get the file again.")


def check(tensor: Tensor, part: str, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        refuse(name, f"'{part}' is {tensor.dtype} with shape {tuple(tensor.shape)}; it must be {dtype} {shape}")


def check_parts(parts: Mapping[str, Tensor], needed: set[str], optional: set[str], name: str) -> None:
    wrong = needed - set(parts) or set(parts) - needed - optional
    if wrong:
        missing = "missing" if needed - set(parts) else "too much"
        listed = ", ".join(sorted(map(repr, wrong)))
        refuse(name, f"its format has the parts {', '.join(sorted(needed))}, and {listed} is {missing}")


def read_shape(stored: Tensor, name: str) -> tuple[int, int]:
    if stored.dtype not in (torch.int32, torch.int64) or stored.numel() != 2:
        refuse(name, f"its shape is stored as {stored.dtype} with {stored.numel()} numbers; it must be int64 with 2")
    N, K = stored.reshape(-1).tolist()
    if min(N, K) < 1:
        refuse(name, f"its shape is {(N, K)}")
    return N, K


def checked_scales(scales: Tensor, name: str) -> Tensor:
    wrong = ~(scales > 0) | scales.isinf()
    if bool(wrong.any()):
        row, at = wrong.nonzero()[0].tolist()
        refuse(name, f"scale {at} of row {row} is {float(scales[row, at])}; scales must be positive and finite")
    return scales


def _check_group(group: int, K: int, name: str) -> None:
    if K % group:
        refuse(name, f"it has {K} columns, and groups of {group} do not divide them")


def _check_codes(codes: Tensor, scheme: Scheme, name: str) -> None:
    if scheme.kind == "int8":
        return
    if scheme.kind == "e4m3":
        wrong, what = codes.view(torch.int8) & 0x7F == 0x7F, "is no number (nan)"
    else:
        wrong, what = (codes < -8) | (codes > 7), "is beyond 4 bits"
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        refuse(name, f"the code at row {row}, column {column} {what}")


def _spread(scales: Tensor, scheme: Scheme, N: int, K: int, name: str) -> Tensor:
    """The scales as [N, K / group], also where the whole tensor has one."""
    group = scheme.columns(K)
    _check_group(group, K, name)
    shapes = [(1,), (), (1, 1)] if scheme.strategy == "tensor" else [(N, K // group)]
    if scales.dtype not in SCALE_DTYPES or tuple(scales.shape) not in shapes:
        found = f"'{SCALE}' is {scales.dtype} with shape {tuple(scales.shape)}"
        refuse(
            name, f"{found}; for {(N, K)} with a scale for each {scheme.strategy} it must be floating with {shapes[0]}"
        )
    spread = scales.reshape(1, 1).expand(N, 1).contiguous() if scheme.strategy == "tensor" else scales.contiguous()
    return checked_scales(spread, name)


def _zero_points(stored: Tensor | None, scheme: Scheme, shape: torch.Size, name: str) -> Tensor | None:
    if stored is None:
        return None
    if scheme.symmetric:
        if bool((stored.float() != 0).any()):
            refuse(name, "it is symmetric by its config.json, and has zero points that are not 0")
        return None
    N, groups = shape
    if scheme.format == PACK:
        check(stored, ZERO_POINT, torch.int32, (-(-N * scheme.bits // 32), groups), name)
        return compact(unpack_rows(stored.t(), scheme.bits, N).t())
    one = scheme.strategy == "tensor"
    if one:
        check(stored, ZERO_POINT, torch.int8, tuple(stored.shape) if stored.numel() == 1 else (1,), name)
    else:
        check(stored, ZERO_POINT, torch.int8, (N, groups), name)
    zeros = stored.reshape(1, 1).expand(N, 1).contiguous() if one else stored.contiguous()
    if scheme.kind == "int4" and bool(((zeros < -8) | (zeros > 7)).any()):
        refuse(name, "a zero point is beyond 4 bits")
    return zeros


def _expand_bitmask(parts: Mapping[str, Tensor], scheme: Scheme, name: str) -> Tensor:
    N, K = read_shape(parts["shape"], name)
    if K % 4:
        refuse(name, f"its shape is {(N, K)}, and 2:4 needs a multiple of 4 columns")
    check(parts["compressed"], "compressed", CODES[scheme.kind], (N, K // 2), name)
    check(parts["bitmask"], "bitmask", torch.uint8, (N, (K + 7) // 8), name)
    return expand24(parts["compressed"], parts["bitmask"], K, name)


def expand24(values: Tensor, bitmask: Tensor, K: int, name: str) -> Tensor:
    """Codes [N, K] of those [N, K / 2] that the bits keep, two of every four columns."""
    wrong = translate(bitmask, {columns: code for code, columns in COLUMNS.items()}, K) < 0
    if bool(wrong.any()):
        row, byte = wrong.nonzero()[0].tolist()
        refuse(
            name,
            f"{int(wrong.sum())} of {bitmask.numel()} bytes of its bitmask do not keep two of every four columns, the "
            f"first in row {row}, columns {8 * byte} to {min(8 * byte + 8, K) - 1}",
        )
    codes = torch.zeros(bitmask.shape[0], K, dtype=torch.int8)
    codes[unpack_mask(bitmask, K)] = values.view(torch.int8).reshape(-1)
    return codes.view(values.dtype)
