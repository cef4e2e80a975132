# SPDX-License-Identifier: Apache-2.0
# dW = s B diag(g) A; after every optimizer step g <- softshrink(g, xi_t), xi_t = xi lr_t / lr_0. Zero gates and their
# rows go at the end. SoRA, arXiv 2311.11696.
"""SoRA: sparse low-rank adaptation, in which every layer finds its rank."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softshrink

from .._checks import check_choice, check_count, check_number
from ._method import Method
from ._pair import Pair
from ._run import Run

_STARTS = ("normal", "ones")


@dataclasses.dataclass(frozen=True)
class SoRA(Method):
    """Rows of lora_A carry gates, whose proximal step for an L1 penalty drives those of little use to zero.

    Start with the largest rank that may be needed. Source: arXiv 2311.11696, algorithm 1. Where its code differs from
    the paper we follow the paper: the proximal operator is softshrink, and the threshold follows the learning rate.

    Args:
        threshold: xi at the peak learning rate, 0 or more; 0 trains gates and prunes none.
        final_threshold: what xi has grown to in the last stage, evenly from stage to stage; None: as ``threshold``.
        stages: equal parts of the training, at least 1; more than 1 needs ``steps`` at the start.
        gate_start: "normal" draws the gates from N(0, 1) as the paper does; "ones" (ours) begins as LoRS.
    """

    threshold: float = 3e-4
    final_threshold: float | None = None
    stages: int = 1
    gate_start: str = "normal"
    name: ClassVar[str] = "sora"

    def __post_init__(self) -> None:
        check_choice("gate_start", self.gate_start, _STARTS)
        for field in ("threshold", "final_threshold"):
            value = getattr(self, field)
            if value is not None:
                check_number(field, value, "0 or more", lambda x: 0 <= x < math.inf)
        check_count("stages", self.stages)
        if (self.final_threshold is None) != (self.stages == 1):
            raise ValueError("stages and final_threshold belong together: give both, or neither.")

    def parametrise(self, pair: Pair, run: Run) -> None:
        if self.stages > 1 and run.steps is None:
            raise ValueError("stages divide the training: give the number of its steps, start(model, steps=...).")
        gate = torch.ones(pair.r, 1)
        if self.gate_start == "normal":
            gate.normal_(generator=run.generator(f"{pair.name}.gate"))
        pair.parametrise("lora_A", Gate(gate.to(pair["lora_A"])))

    def threshold_at(self, run: Run) -> float:
        """xi of the stage that the run is in, before the learning rate's share."""
        if self.final_threshold is None:
            return self.threshold
        assert run.steps is not None
        stage = min(self.stages - 1, run.step * self.stages // run.steps)
        return self.threshold + (self.final_threshold - self.threshold) * stage / (self.stages - 1)

    def after_step(self, run: Run) -> None:
        threshold = self.threshold_at(run)
        for pair in run.pairs:
            gate = pair.parametrisation("lora_A").gate
            gate.copy_(softshrink(gate, threshold * run.rate(gate)))

    def folded(self, pair: Pair) -> None:
        # A gate that is zero has left a row of zeros in lora_A.
        kept = pair["lora_A"].any(dim=1)
        lora_A, lora_B = pair["lora_A"][kept], pair["lora_B"][:, kept]
        if not bool(kept.any()):  # a pair of rank 0 has no place in a file
            lora_A, lora_B = pair["lora_A"][:1], torch.zeros_like(pair["lora_B"][:, :1])
        if lora_A.shape[0] < pair.r:
            pair.replace(lora_A, lora_B)


class Gate(nn.Module):
    """diag(g) A for A [r, K] and g [r, 1]."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(gate)

    def forward(self, lora_A: Tensor) -> Tensor:
        return self.gate * lora_A
