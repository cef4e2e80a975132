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


class Requantization(NamedTuple):
    """What the merge of a quantised weight does with its result."""

    steps: int = 0  # 0: nothing; 1: rounds it to the grid of the codes; 16: to an int4 grid 16 times as coarse
    dither_seed: int = -1  # below 0: no dither


NOT_REQUANTIZED = Requantization()
