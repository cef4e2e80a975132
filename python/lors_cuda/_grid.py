# SPDX-License-Identifier: Apache-2.0
"""What a quantised weight has beside its codes, as the operators take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Grid(NamedTuple):
    """The grid of a weight's codes, the last arguments of the operators (csrc/core/include/lors/quantization.h)."""

    scales: Tensor | None = None  # float32, bfloat16 or float16 [N, K / group]
    zero_points: Tensor | None = None  # int8 like scales; None: 0
    grid: str = ""  # "int8", "int4" or "e4m3"; "": the weight holds values
    requantize_steps: int = 0  # 0: the merged weight stays off the grid; 1: on it; 16: int8 codes of an int4 grid
    dither_seed: int = -1  # below 0: no dither

    def frozen_at_zero(self) -> Grid:
        """The same grid on which every code is zero: of the tangents of a merged weight, which is not requantised."""
        if self.scales is None:
            return self
        return Grid(self.scales.new_zeros(()).expand(self.scales.shape), self.zero_points, self.grid)


NO_GRID = Grid()
