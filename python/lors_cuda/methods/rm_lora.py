# SPDX-License-Identifier: Apache-2.0
# loss + penalty * mean over the 2 L factors of ||A A^T - I||_F and ||B^T B - I||_F; in each interval only `active`
# directions are updated. RM-LoRA, arXiv 2407.12074.
"""RM-LoRA: orthogonality of the factors, and updates of some directions at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_count, check_number
from .._distributed import gathered, whole
from ._method import Method
from ._pair import FACTORS, Pair
from ._run import Run


@dataclasses.dataclass(frozen=True)
class RMLoRA(Method):
    """Pulls lora_A's rows and lora_B's columns to orthonormality, so that the update uses its rank.

    The penalty's gradient is added in the optimizer's step, so that the loss stays the model's own. NOTE: a Trainer
    clips gradients before the step, so the penalty is not clipped. Source: arXiv 2407.12074 and its repository's
    description; its training code was not found.

    Args:
        penalty: weight of the mean of the norms, 0 or more; the authors' example has 0.1.
        active: how many of the r directions are updated at a time, at least 1; None: all (ours).
        interval: optimizer steps between two draws of the active directions; needed with ``active``.
    """

    penalty: float = 0.1
    active: int | None = None
    interval: int | None = None
    name: ClassVar[str] = "rm-lora"

    def __post_init__(self) -> None:
        check_number("penalty", self.penalty, "0 or more", lambda x: 0 <= x < math.inf)
        if (self.active is None) != (self.interval is None):
            raise ValueError("active and interval belong together: give both, or neither.")
        for field in ("active", "interval"):
            value = getattr(self, field)
            if value is not None:
                check_count(field, value)

    def resting(self, pair: Pair, run: Run) -> Tensor | None:
        """The directions that are not updated in this interval; None if all are."""
        if self.active is None or self.interval is None or self.active >= pair.r:
            return None
        order = torch.randperm(pair.r, generator=run.generator(pair.name, run.step // self.interval))
        return order[self.active :].to(pair.stored("lora_A").device)

    def before_step(self, run: Run) -> None:
        for pair in run.pairs:
            for which in FACTORS:
                factor = pair.stored(which)
                if factor.grad is None:
                    continue
                rows = _rows(which, whole(factor.detach()))
                with gathered(factor.grad) as gradient:
                    if self.penalty:
                        change = self.penalty / (2 * len(run.pairs)) * orthogonality_gradient(rows)
                        _rows(which, gradient).add_(change.to(gradient.dtype))
                    resting = self.resting(pair, run)
                    if resting is not None:
                        # An optimizer with momentum or decay moves a parameter whose gradient is zero: its rows are
                        # put back after the step.
                        _rows(which, gradient)[resting] = 0
                        run.tensors[f"{pair.name}.{which}"] = rows[resting].clone()

    def after_step(self, run: Run) -> None:
        for pair in run.pairs:
            for which in FACTORS:
                saved = run.tensors.pop(f"{pair.name}.{which}", None)
                resting = self.resting(pair, run)
                if saved is not None and resting is not None:
                    with gathered(pair.stored(which)) as factor:
                        _rows(which, factor)[resting] = saved


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """d ||R R^T - I||_F / dR for R [r, n]: 2 (R R^T - I) R / ||R R^T - I||_F, and 0 where the norm is 0."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    gram = rows @ rows.T - torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
    norm = gram.norm()
    return 2 * (gram @ rows) / norm.clamp_min(torch.finfo(rows.dtype).tiny)


def _rows(which: str, tensor: Tensor) -> Tensor:
    """A view whose rows are the r directions."""
    return tensor if which == "lora_A" else tensor.T
