# SPDX-License-Identifier: Apache-2.0
# dW[n, k] = Q[ro(n), co(k)] with one square Q [q, q], q = sqrt((N + K) r): rank q for as many numbers as rank r has.
# As a pair: lora_A = Q[:, co] / s, lora_B = one-hot(ro), frozen. MoRA, arXiv 2405.12130.
"""MoRA: a square matrix in the place of two thin ones."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_choice
from ._method import Method, Run
from ._pair import Pair

TYPES = ("sharing", "decoupling", "mixed-3", "mixed-4")


@dataclasses.dataclass(frozen=True)
class MoRA(Method):
    """Trains one square matrix per layer, zero at the start, which is spread over the whole update.

    Saved as an ordinary pair of rank q. lora_alpha is ignored, as in the authors' code, so that dW is Q itself. A layer
    whose q would exceed min(N, K) takes that. Source: arXiv 2405.12130; types 1 to 4 of its code. Its rotation (type 6)
    is no product of two factors and is not offered.

    Args:
        type: how rows and columns of the update share those of Q: "sharing" takes the remainder by q of both (type 1),
            "decoupling" runs of neighbours (2), "mixed-3" remainders of rows and runs of columns, "mixed-4" runs of
            rows and remainders of columns.
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
        remainder = self.type in ("sharing", "mixed-4")
        rows = _remainders(N, q) if self.type in ("sharing", "mixed-3") else _runs(N, q)
        columns = _remainders(K, q) if remainder else _runs(K, q)
        wrap = -K % q if remainder else 0
        lora_A, lora_B = pair["lora_A"], pair["lora_B"]
        pair.replace(lora_A.new_zeros(q, K), nn.functional.one_hot(rows, q).to(lora_B))
        pair.stored("lora_B").requires_grad_(False)
        how = Spread(columns.to(lora_A.device), wrap, 1 / pair.scaling)
        pair.parametrise("lora_A", how, torch.zeros(q, q))


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
