# SPDX-License-Identifier: Apache-2.0
"""The grid of a quantised weight, as the operators take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Grid(NamedTuple):
    """The grid of a weight's codes and what its merge does with it, the last arguments of the operators
    (csrc/core/include/lors/quantization.h)."""

    scales: Tensor | None = None  # [N, K / group]
    zero_points: Tensor | None = None  # int8 [N, K / group]; None: 0
    grid: str = ""  # "int8", "int4" or "e4m3"; "": the weight holds values
    requantize_steps: int = 0  # 0: the merged weight is not requantised; 1 or 16
    dither_seed: int = -1  # below 0: no dither


NO_GRID = Grid()
