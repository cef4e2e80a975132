# SPDX-License-Identifier: Apache-2.0
# A byte of 2:4 metadata (docs/formats.md) stands for two groups of four columns, low half first, and so does a byte of
# other formats. One table of 256 entries therefore translates metadata into another format's bytes, or back.
"""Translation of 2:4 metadata, a byte at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# {our code: the code with two different positions}: that of two kept weights is itself; where a group keeps fewer, a
# slot that is zero gets a position too. The choices are torch's (sparse_semi_structured_from_dense_cutlass), and each
# leaves every weight in the slot that it has.
FULL = {
    **{first | second << 2: first | second << 2 for first in range(4) for second in range(first + 1, 4)},
    0b0000: 0 | 2 << 2,
    0b0101: 1 | 2 << 2,
    0b1010: 2 | 3 << 2,
    0b1111: 2 | 3 << 2,
    0b0001: 2 | 3 << 2,  # "first 1, second 0": nothing is kept
}
# {code with two different positions: the bits of its columns}
COLUMNS = {code: 1 << (code & 3) | 1 << (code >> 2) for code in FULL.values()}


def byte_table(codes: Mapping[int, int]) -> Tensor:
    """int16 [256]: what a byte of two codes becomes; -1 where one of them is not in ``codes``."""
    table = torch.full((256,), -1, dtype=torch.int16)
    for low, new_low in codes.items():
        for high, new_high in codes.items():
            table[low | high << 4] = new_low | new_high << 4
    return table


def translate(data: Tensor, table: Tensor, columns: int) -> Tensor:
    """Look every byte of uint8 [N, ceil(columns/8)] up; where a row's last byte holds one group, its high half stays 0.

    Returns:
        int16 of the same shape, -1 where a byte is not in the table or an unused high half is not 0.
    """
    if columns % 8 == 0:
        return table.to(data.device)[data.int()]
    # The unused half is no code. Any valid one takes its place for the lookup.
    padded = data.clone()
    unused = padded[:, -1] & 0xF0
    valid = int((table >= 0).nonzero()[0]) >> 4
    padded[:, -1] = padded[:, -1] & 0x0F | valid << 4
    result = table.to(data.device)[padded.int()]
    last = result[:, -1]
    result[:, -1] = torch.where((unused == 0) & (last >= 0), last & 0x0F, -1)
    return result
