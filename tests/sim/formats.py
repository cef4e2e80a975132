# SPDX-License-Identifier: Apache-2.0
"""The compressed layouts as lors/sparse24.h and lors/types.h word them, and weights for them."""

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
    groups, given = kept.view(N, K // 4, 4), weight.view(N, K // 4, 4)
    some = groups.any(-1)
    first = torch.where(some, groups.int().argmax(-1), 1)
    second = torch.where(some, 3 - groups.flip(-1).int().argmax(-1), 0)
    two, one = first < second, first == second
    values = torch.zeros((N, K // 4, 2), dtype=weight.dtype)
    for slot, at, held in ((0, first, two | (one & (first != 3))), (1, second, two | (one & (first == 3)))):
        values[..., slot] = torch.where(held, given.gather(-1, at[..., None])[..., 0] + 0.0, values[..., slot])
    codes = np.zeros((N, (K + 7) // 8 * 2), dtype=np.uint8)
    codes[:, : K // 4] = (first | second << 2).numpy()
    return values.view(N, K // 2), codes[:, ::2] | codes[:, 1::2] << 4


def pack_bitmap(weight: Tensor, kept: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """values, bits and row_offsets of layout bitmap."""
    offsets = np.concatenate([[0], kept.sum(1).cumsum(0).numpy()]).astype(np.int64)
    return weight[kept] + 0.0, pack(kept), offsets
