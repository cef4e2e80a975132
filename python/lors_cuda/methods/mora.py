# SPDX-License-Identifier: Apache-2.0
# dW[n, k] = Q[ro(n), co(k)] with one square Q [q, q], q = sqrt((N + K) r): rank q for as many numbers as rank r has.
# As a pair: lora_A = Q[:, co] / s, lora_B = one-hot(ro), frozen. The rotation form is block diagonal instead: block i
# is Q R(theta_i), with RoPE's angles i 10000^(-2 j / q), of rank up to min(N, K). MoRA, arXiv 2405.12130.
"""MoRA: a square matrix in the place of two thin ones."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_choice
from ._method import Method
from ._pair import Pair
from ._run import Run

TYPES = ("sharing", "decoupling", "mixed-3", "mixed-4", "rotation")


@dataclasses.dataclass(frozen=True)
class MoRA(Method):
    """Trains one square matrix per layer, zero at the start, which is spread over the whole update.

    Saved as an ordinary pair of rank q. lora_alpha is ignored, as in the authors' code, so that dW is Q itself. A layer
    whose q would exceed min(N, K) takes that. Source: arXiv 2405.12130; types 1 to 4 and 6 of its code.

    NOTE: the pair of "rotation" has rank min(N, K) and as many numbers as the weight, so that its merge and its file
    cost as much as a dense update's. It is for layers that are small, or for comparison.

    Args:
        type: how rows and columns of the update share those of Q: "sharing" takes the remainder by q of both (type 1),
            "decoupling" runs of neighbours (2), "mixed-3" remainders of rows and runs of columns, "mixed-4" runs of
            rows and remainders of columns; "rotation" (6), for small r, has a rotated Q on every diagonal block, and q
            is rounded down to an even number.
    """

    type: str = "sharing"
    name: ClassVar[str] = "mora"
    has_own_start: ClassVar[bool] = True
    gradient: ClassVar[str] = "exact"

    def __post_init__(self) -> None:
        check_choice("type", self.type, TYPES)

    def parametrise(self, pair: Pair, run: Run) -> None:
        N, K = pair.layer.out_features, pair.layer.in_features
        q = min(round(math.sqrt((N + K) * pair.r)), N, K)
        if self.type == "rotation":
            self._rotate(pair, q // 2 * 2)
            return
        remainder = self.type in ("sharing", "mixed-4")
        rows = _remainders(N, q) if self.type in ("sharing", "mixed-3") else _runs(N, q)
        columns = _remainders(K, q) if remainder else _runs(K, q)
        wrap = -K % q if remainder else 0
        lora_A, lora_B = pair["lora_A"], pair["lora_B"]
        pair.replace(lora_A.new_zeros(q, K), nn.functional.one_hot(rows, q).to(lora_B))
        pair.stored("lora_B").requires_grad_(False)
        how = Spread(columns.to(lora_A.device), wrap, 1 / pair.scaling)
        pair.parametrise("lora_A", how, torch.zeros(q, q))

    def _rotate(self, pair: Pair, q: int) -> None:
        N, K = pair.layer.out_features, pair.layer.in_features
        if q < 2:
            raise ValueError(
                f"'{pair.name}' of {N} x {K} has q = 1 at rank {pair.r}, and a rotation needs two numbers: raise r, or "
                "leave the layer out (exclude_modules)."
            )
        blocks = -(-K // q)
        rows = torch.arange(N) % (blocks * q)  # where there are more rows than blocks have, they repeat
        distinct = min(N, blocks * q)
        lora_A, lora_B = pair["lora_A"], pair["lora_B"]
        if distinct <= K:  # lora_A is the update, row by row
            which, still = "lora_A", "lora_B"
            pair.replace(lora_A.new_zeros(distinct, K), nn.functional.one_hot(rows, distinct).to(lora_B))
            rows = torch.arange(distinct)
        else:
            which, still = "lora_B", "lora_A"
            pair.replace(torch.eye(K).to(lora_A), lora_B.new_zeros(N, K))
        pair.stored(still).requires_grad_(False)
        how = Rotate(rows.to(lora_A.device), K, blocks, 1 / pair.scaling)
        pair.parametrise(which, how, torch.zeros(q, q))


def _remainders(count: int, q: int) -> Tensor:
    """Row or column i takes that of Q at i mod q."""
    return torch.arange(count) % q


def _runs(count: int, q: int) -> Tensor:
    """q runs of neighbours; the first count mod q are one longer."""
    short, longer = divmod(count, q)
    lengths = torch.full((q,), short)
    lengths[:longer] += 1
    return torch.arange(q).repeat_interleave(lengths)


class Spread(nn.Module):
    """Q[:, columns] / s for Q [q, q]; the first ``wrap`` columns get those of Q that are left over at the end as well.

    The authors' code pads the input to a multiple of q with its own beginning, which is the same.
    """

    columns: Tensor

    def __init__(self, columns: Tensor, wrap: int, factor: float) -> None:
        super().__init__()
        self.wrap, self.factor = wrap, factor
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, stored: Tensor) -> Tensor:
        spread = stored[:, self.columns]
        if self.wrap:
            left_over = stored[:, stored.shape[1] - self.wrap :]
            spread = spread + nn.functional.pad(left_over, (0, spread.shape[1] - self.wrap))
        return spread * self.factor


class Rotate(nn.Module):
    """Rows of the block-diagonal update [len(rows), K] / s for Q [q, q], whose last block wraps around as above."""

    rows: Tensor

    def __init__(self, rows: Tensor, K: int, blocks: int, factor: float) -> None:
        super().__init__()
        self.K, self.blocks, self.factor = K, blocks, factor
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, stored: Tensor) -> Tensor:
        q = len(stored)
        rates = 10000.0 ** (-torch.arange(0, q, 2, dtype=stored.dtype, device=stored.device) / q)
        angles = torch.arange(self.blocks, dtype=stored.dtype, device=stored.device).outer(rates).unsqueeze(1)
        first, second = stored[:, : q // 2], stored[:, q // 2 :]
        turned = [first * angles.cos() + second * angles.sin(), second * angles.cos() - first * angles.sin()]
        update = torch.block_diag(*torch.cat(turned, -1))
        left_over = update[:, self.K :]
        spread = update[:, : self.K] + nn.functional.pad(left_over, (0, self.K - left_over.shape[1]))
        return spread[self.rows] * self.factor
