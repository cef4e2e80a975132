# SPDX-License-Identifier: Apache-2.0
# docs/formats.md in plain torch, for every device. One C++ operator, lors::compress, replaces a line of it on the CPU,
# where boolean indexing is ten times slower; the other direction, stored to dense, is lors::merge without an adapter.
#
# A byte of 2:4 metadata describes two groups of four columns, low half first, and so does a byte of mask bits or of
# other 2:4 formats. One table of 256 entries therefore translates each of them into another.
"""The layouts "2:4" and "bitmap", bit by bit: their specification, and the validation of untrusted tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ._library import lors

# {columns of a group that are kept, as bits: its code, first | second << 2}
CODES = {
    0b0000: 1 | 0 << 2,
    **{1 << p: p | p << 2 for p in range(4)},
    **{1 << first | 1 << second: first | second << 2 for first in range(4) for second in range(first + 1, 4)},
}
# {code: the code of two different positions that are those of its slots}: where a group keeps fewer than two, a slot
# that is zero gets a position too. The choices are torch's (sparse_semi_structured_from_dense_cutlass).
FULL = {
    **{first | second << 2: first | second << 2 for first in range(4) for second in range(first + 1, 4)},
    0 | 0 << 2: 0 | 2 << 2,
    1 | 1 << 2: 1 | 2 << 2,
    2 | 2 << 2: 2 | 3 << 2,
    3 | 3 << 2: 2 | 3 << 2,
    1 | 0 << 2: 2 | 3 << 2,
}
# {code of two different positions: those columns, as bits}
COLUMNS = {code: 1 << (code & 3) | 1 << (code >> 2) for code in FULL.values()}
# {code: the slots that hold a kept weight, as bits}
_SLOTS = {
    code: (columns >> (FULL[code] & 3) & 1) | (columns >> (FULL[code] >> 2) & 1) << 1 for columns, code in CODES.items()
}


def layout_of(index: Tensor | None) -> str:
    """The layout of a weight by its metadata or row offsets."""
    return "dense" if index is None else "2:4" if index.dtype == torch.uint8 else "bitmap"


def index_for(
    layout: str,
    bits: Tensor,
    in_features: int,
    itemsize: float,
    explicit_bytes: int,
    offsets: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """The metadata or row offsets that a mask has in a layout; of "auto" in the smallest one.

    Args:
        itemsize: bytes of each stored value.
        explicit_bytes: of the mask, where a dense weight would be stored with it.
        offsets: how row offsets are counted; None: :func:`row_offsets`.

    Raises:
        ValueError: the mask does not fit the layout, or is on the meta device, where it has no values to go by (there
            "auto" is dense).
    """
    N, K = bits.shape[0], in_features
    offsets = row_offsets if offsets is None else offsets
    if layout == "auto" and bits.device.type != "meta":
        metadata = sparse24_metadata(bits, K) if K % 4 == 0 else None
        if metadata is not None and not (metadata < 0).any():
            return metadata.to(torch.uint8)
        bitmap = int(row_offsets(bits)[-1]) * itemsize + bits.nbytes + 8 * (N + 1)
        return offsets(bits) if bitmap < N * K * itemsize + explicit_bytes else None
    if layout == "2:4":
        check_sparse24_mask(bits, K)
        return sparse24_metadata(bits, K).to(torch.uint8)
    if layout != "bitmap":
        return None
    if bits.device.type == "meta":
        raise ValueError(
            "weight is on the meta device, where it has no values to compress; layout 'bitmap' must know how many are "
            "kept. Use layout='dense' or '2:4', or convert the model after its weights are loaded."
        )
    return offsets(bits)


# ---- masks as bits --------------------------------------------------------------------------------------------------


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask [N, K] as int32 [N, ceil(K/32)]: bit k % 32 of word k / 32 is column k; bits beyond K are 0."""
    N, K = mask.shape
    words = (K + 31) // 32
    flags = torch.nn.functional.pad(mask, (0, 32 * words - K)).flatten().view(torch.int64)  # eight columns, a byte each
    # The factor has bits 7, 14, ..., 56: the products of byte i that reach the highest byte are that of bit 56 - 7 i.
    return (flags * 0x0102040810204080 >> 56).to(torch.uint8).view(torch.int32).view(N, words)


def unpack_mask(bits: Tensor, in_features: int) -> Tensor:
    """The bool mask [N, in_features] of :func:`pack_mask`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (_bytes(bits).unsqueeze(-1) >> shifts & 1).bool().flatten(1)[:, :in_features].contiguous()


def _bytes(bits: Tensor) -> Tensor:
    """uint8 [N, 4 words] of int32 [N, words]."""
    return bits.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # contiguous() may leave odd strides


# ---- both layouts: the kept weights ---------------------------------------------------------------------------------


def kept_values(weight: Tensor, bits: Tensor) -> Tensor:
    """The kept weights of [N, K], row by row and by column; -0.0 as +0.0."""
    if weight.device.type == "cpu":
        return lors.compress(weight, bits)
    return plain_kept_values(weight, bits)


def plain_kept_values(weight: Tensor, bits: Tensor) -> Tensor:
    """The same in plain torch, bit for bit."""
    values = weight[unpack_mask(bits, weight.shape[1])]
    return values.masked_fill_(values == 0, 0.0)


# ---- 2:4 ------------------------------------------------------------------------------------------------------------


def byte_table(codes: Mapping[int, int]) -> Tensor:
    """int16 [256]: what a byte of two codes becomes; -1 where one of them is not in ``codes``."""
    table = torch.full((256,), -1, dtype=torch.int16)
    for low, new_low in codes.items():
        for high, new_high in codes.items():
            table[low | high << 4] = new_low | new_high << 4
    return table


def translate(data: Tensor, codes: Mapping[int, int], columns: int) -> Tensor:
    """Look up both halves of every byte of uint8 [N, ceil(columns/8)]; where a row's last byte describes one group, its
    high half stays 0.

    Returns:
        int16 of the same shape, -1 where a half is not in ``codes`` or an unused one is not 0.
    """
    table = byte_table(codes).to(data.device)
    if columns % 8 == 0:
        return table[data.int()]
    # The unused half is no code. Any known one takes its place for the lookup.
    padded = data.clone()
    unused = padded[:, -1] & 0xF0
    padded[:, -1] = padded[:, -1] & 0x0F | next(iter(codes)) << 4
    result = table[padded.int()]
    last = result[:, -1]
    result[:, -1] = torch.where((unused == 0) & (last >= 0), last & 0x0F, -1)
    return result


def sparse24_metadata(bits: Tensor, in_features: int) -> Tensor:
    """int16 [N, ceil(K/8)]: the metadata of a mask, -1 where a byte's groups keep more than two."""
    return translate(_bytes(bits)[:, : (in_features + 7) // 8], CODES, in_features)


def sparse24_mask(metadata: Tensor, in_features: int) -> Tensor:
    """The mask bits int32 [N, ceil(K/32)] of valid metadata."""
    return _as_words(translate(metadata, {code: columns for columns, code in CODES.items()}, in_features))


def compress_sparse24(weight: Tensor, bits: Tensor, metadata: Tensor) -> Tensor:
    """The values [N, K/2] of a dense weight whose mask has the metadata ``metadata``."""
    N, K = weight.shape
    if weight.device.type == "meta":
        return weight.new_empty(N, K // 2)
    full = _as_words(translate(metadata, {code: COLUMNS[full] for code, full in FULL.items()}, K))
    # Every slot's position is taken, so that each group gives two values; those without a kept weight are 0 before.
    return kept_values(torch.where(unpack_mask(bits, K), weight, 0.0), full).view(N, K // 2)


def _as_words(data: Tensor) -> Tensor:
    """int32 [N, ceil(K/32)] of bytes [N, ceil(K/8)]."""
    return torch.nn.functional.pad(data.to(torch.uint8), (0, -data.shape[1] % 4)).view(torch.int32)


def check_sparse24_mask(bits: Tensor, in_features: int) -> None:
    """Refuse a mask that keeps more than two in an aligned group of four columns."""
    shape = (bits.shape[0], in_features)
    if in_features % 4:
        raise ValueError(
            f"weight has shape {shape}; layout '2:4' needs in_features to be a multiple of 4. Use layout='bitmap' or "
            "layout='auto'."
        )
    if bits.device.type == "meta" or not (sparse24_metadata(bits, in_features) < 0).any():
        return
    offending = unpack_mask(bits, in_features).view(shape[0], -1, 4).sum(-1) > 2
    row, group = offending.nonzero()[0].tolist()
    raise ValueError(
        f"weight of shape {shape} is not 2:4: {int(offending.sum())} of {offending.numel()} aligned groups of four "
        f"keep more than two weights, the first at row {row}, column {4 * group}. Prune it to 2:4 (`lors-cuda prune "
        "--pattern 2:4`), or use layout='bitmap' or layout='auto'."
    )


def check_sparse24(values: Tensor, metadata: Tensor) -> None:
    """Refuse bytes that are no 2:4 weight: values [N, K/2] and metadata of the right shapes, with any content."""
    if values.device.type == "meta":
        return
    N, K = values.shape[0], 2 * values.shape[1]
    slots = translate(metadata, _SLOTS, K)
    wrong = slots < 0
    if wrong.any():
        row, byte = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"The 2:4 weight of shape {(N, K)} is corrupted in {int(wrong.sum())} of {metadata.numel()} bytes of its "
            f"metadata, first in row {row}, columns {8 * byte} to {min(8 * byte + 8, K) - 1}: the byte is "
            f"0x{int(metadata[row, byte]):02x}, which is no code of two positions. {_AGAIN}"
        )
    shifts = torch.tensor([0, 1, 4, 5], dtype=torch.int16, device=slots.device)
    used = (slots.unsqueeze(-1) >> shifts & 1).bool().flatten(1)[:, : K // 2]
    wrong = (values.contiguous().view(_BITS[values.itemsize]) != 0) & ~used
    if wrong.any():
        row, slot = wrong.nonzero()[0].tolist()
        group = 4 * (slot // 2)
        raise ValueError(
            f"The 2:4 weight of shape {(N, K)} is corrupted in {int(wrong.sum())} of its values, first in row {row}, "
            f"columns {group} to {group + 3}: value {slot} of the row, {values[row, slot].item()}, belongs to no kept "
            f"weight and must be 0. {_AGAIN}"
        )


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AGAIN = "Compress the dense weight again, or load another copy of the file."


# ---- bitmap ---------------------------------------------------------------------------------------------------------


def row_offsets(bits: Tensor) -> Tensor:
    """int64 [N + 1]: where the values of each row begin, from 0 to the number of kept weights."""
    ones = torch.tensor([byte.bit_count() for byte in range(256)], device=bits.device)
    counts = ones[_bytes(bits).int()].sum(1)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def padded_offsets(bits: Tensor) -> Tensor:
    """:func:`row_offsets` of int4 codes, of which each row has an even number of slots."""
    counts = row_offsets(bits).diff()
    return torch.nn.functional.pad((counts + counts % 2).cumsum(0), (1, 0))


def check_bitmap(
    values: Tensor, bits: Tensor, offsets: Tensor, in_features: int, expect: Callable[[Tensor], Tensor] = row_offsets
) -> None:
    """Refuse bytes that are no bitmap weight: tensors of the right shapes, with any content.

    Args:
        expect: the row offsets of mask bits: :func:`row_offsets` or :func:`padded_offsets`.
    """
    if values.device.type == "meta":
        return
    corrupted = f"The bitmap weight of shape {(bits.shape[0], in_features)} is corrupted"
    _check_last_bits(bits, in_features, corrupted)
    expected = expect(bits)
    wrong = offsets != expected
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{corrupted} in {int(wrong.sum())} of {len(offsets)} row offsets, first in that of row {row}: it is "
            f"{int(offsets[row])}, and {int(expected[row])} by the bits that are set in the rows before. {_AGAIN}"
        )
    if expected[-1] != values.shape[0]:
        raise ValueError(
            f"{corrupted}: it has {values.shape[0]} values, and {int(expected[-1])} by the bits that are set. {_AGAIN}"
        )


def _check_last_bits(bits: Tensor, in_features: int, corrupted: str) -> None:
    if in_features % 32:
        beyond = (bits[:, -1] & -(1 << in_features % 32)) != 0
        if beyond.any():
            raise ValueError(
                f"{corrupted} in {int(beyond.sum())} rows, first in row {int(beyond.nonzero()[0])}: bits beyond the "
                f"last column are set. {_AGAIN}"
            )


# ---- dense with a mask of its own -----------------------------------------------------------------------------------


def check_dense(values: Tensor, bits: Tensor) -> None:
    """Refuse values [N, K] that are not zero off the mask of these bits, which have the right shape."""
    if values.device.type == "meta":
        return
    corrupted = f"The dense weight of shape {tuple(values.shape)} is corrupted"
    _check_last_bits(bits, values.shape[1], corrupted)
    wrong = (values != 0) & ~unpack_mask(bits, values.shape[1])
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{corrupted} in {int(wrong.sum())} of its values, first in row {row}, column {column}: the value, "
            f"{values[row, column].item()}, is off the mask and must be 0. {_AGAIN}"
        )
