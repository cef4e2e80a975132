# SPDX-License-Identifier: Apache-2.0
"""The compressed layouts as lors/sparse24.h and lors/types.h word them, element by element, and weights for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from numerics import pack, random


def sparse_weight(seed: int, N: int, K: int, dtype: str, *, explicit: bool, sparse24: bool) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and its mask: implicit (half of its zeros -0), or explicit, zeros on it and garbage off it."""
    kept = torch.rand((N, K), generator=torch.Generator().manual_seed(seed)) < 0.6
    if sparse24:
        groups = kept.view(N, K // 4, 4)
        kept = (groups & (groups.cumsum(-1) <= 2)).view(N, K)
    weight = random(seed + 1, N, K, dtype=dtype)
    if explicit:
        weight.view(-1)[::7] = 0.0
        weight.view(-1)[3::14] = -0.0
    else:
        zeros = torch.zeros_like(weight)
        zeros.view(-1)[::2] = -0.0
        weight = torch.where(kept, weight, zeros)
        kept = weight != 0
    return weight, kept


def masked(weight: Tensor, kept: Tensor) -> Tensor:
    """The dense weight that a compressed one stands for: +0 off the mask and for -0 on it."""
    return torch.where(kept, weight + 0.0, torch.zeros_like(weight))


def compress(weight: Tensor, kept: Tensor) -> tuple[Tensor, np.ndarray]:
    """values [N, K/2] and metadata [N, ceil(K/8)] of layout 2:4."""
    N, K = weight.shape
    values, metadata = torch.zeros((N, K // 2), dtype=weight.dtype), np.zeros((N, (K + 7) // 8), dtype=np.uint8)
    for n in range(N):
        for g in range(K // 4):
            at = kept[n, 4 * g : 4 * g + 4].nonzero().flatten().tolist()
            first, second = (at[0], at[-1]) if at else (1, 0)
            for i in at:
                slot = (1 if i == second else 0) if first != second else (1 if i == 3 else 0)
                values[n, 2 * g + slot] = weight[n, 4 * g + i] + 0.0
            metadata[n, g // 2] |= (first | second << 2) << 4 * (g % 2)
    return values, metadata


def pack_bitmap(weight: Tensor, kept: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """values, bits and row_offsets of layout bitmap."""
    offsets = np.concatenate([[0], kept.sum(1).cumsum(0).numpy()]).astype(np.int64)
    return weight[kept] + 0.0, pack(kept), offsets
