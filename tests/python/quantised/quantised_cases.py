# SPDX-License-Identifier: Apache-2.0
"""Quantised weights of every grid and layout, with what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lors_cuda import SparseWeight, reference

LAYOUTS = ("dense", "2:4", "bitmap")
# (kind, group or None for a whole row, symmetric)
GRIDS = (
    ("int4", 32, True),
    ("int4", 64, False),
    ("int4", None, True),
    ("int8", 32, False),
    ("int8", None, True),
    ("e4m3", 32, True),
    ("e4m3", None, True),
)

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=["-".join(map(str, grid)) for grid in GRIDS])


def dense_and_mask(seed: int, N: int, K: int, layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A dense weight [N, K] and the mask that its zeros do not tell: row 0 keeps nothing where there are others, and
    some kept weights are zero."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(N, K, generator=generator) < 0.4
    if layout == "2:4":
        groups = kept.view(N, -1, 4)
        kept = (groups & (groups.cumsum(-1) <= 2)).view(N, K)
    if N > 1:
        kept[0] = False
    weight = torch.randn(N, K, generator=generator) * torch.exp(torch.randn(N, 1, generator=generator))
    weight[torch.rand(N, K, generator=generator) < 0.05] = 0.0
    return weight.to(dtype), kept


def make(
    seed: int,
    N: int,
    K: int,
    grid: tuple[str, int | None, bool],
    layout: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SparseWeight:
    kind, group, symmetric = grid
    weight, mask = dense_and_mask(seed, N, K, layout, dtype)
    return SparseWeight.quantize(weight.to(device), mask.to(device), kind, group, symmetric=symmetric, layout=layout)


def values_of(weight: SparseWeight) -> Tensor:
    """What the weight stands for, by the reference. Float32 [N, K]."""
    grid = weight.quantization
    return reference.dequantize(weight.codes(), grid.scales, grid.zero_points, weight.mask())


def same_codes(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.view(torch.int8), two.view(torch.int8))
