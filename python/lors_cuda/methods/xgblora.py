# SPDX-License-Identifier: Apache-2.0
# dW = s (b_1 a_1 + ... + b_T a_T): boosters of rank one, trained one after the other, each for `steps_per_booster`
# steps on what the earlier ones have left. As a pair: lora_A = [a_1; ...; a_T], lora_B = [b_1 ... b_T], of which the
# last row and column are trained and the others are frozen. XGBLoRA, arXiv 2410.19694.
"""XGBLoRA: gradient boosting with adapters of rank one."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_count, check_number
from .._distributed import copy_whole, whole
from ..config import LoRSConfig
from ._method import Method
from ._pair import FACTORS, Pair
from ._run import Run


@dataclasses.dataclass(frozen=True)
class XGBLoRA(Method):
    """Trains rank one at a time and stacks what was trained, so that the rank grows by one per booster.

    ``configure`` sets the rank to one, at the same scaling. Where the paper merges a booster into the weight, here it
    joins the stack: the same sum, rounded once, and the stored weight is not written. A new booster begins with a
    random lora_A, lora_B = 0 and without moments (ours), so that nothing jumps. The rank cannot exceed min(N, K) of any
    layer. Source: arXiv 2410.19694; no code of its authors was found, and both defaults are ours.

    Args:
        steps_per_booster: optimizer steps of one booster, at least 1 (the paper's kappa).
        layers: share of the adapters that a booster trains, more than 0 and at most 1; others are drawn for the next.
    """

    steps_per_booster: int = 25
    layers: float = 1.0
    name: ClassVar[str] = "xgblora"

    def __post_init__(self) -> None:
        check_count("steps_per_booster", self.steps_per_booster)
        check_number("layers", self.layers, "more than 0 and at most 1", lambda x: 0 < x <= 1)

    def configure(
        self, config: LoRSConfig, model: nn.Module | None = None, batches: Iterable[Any] | None = None
    ) -> LoRSConfig:
        if config.rank_pattern or config.alpha_pattern:
            raise ValueError("XGBLoRA trains rank one everywhere; leave rank_pattern and alpha_pattern out.")
        configured = copy.deepcopy(config)
        configured.lora_alpha = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        configured.r = 1
        return configured

    def parametrise(self, pair: Pair, run: Run) -> None:
        if pair.r != 1:
            raise ValueError(
                f"'{pair.name}' has rank {pair.r}, and XGBLoRA trains rank one: convert the model with "
                "method.configure(config)."
            )
        self._check_room(pair, 1 if run.steps is None else math.ceil(run.steps / self.steps_per_booster))
        for which, features, dim in (("lora_A", pair.layer.in_features, 0), ("lora_B", pair.layer.out_features, 1)):
            pair.parametrise(which, Stack(pair[which].detach().new_zeros(0, features), dim))

    def _check_room(self, pair: Pair, boosters: int) -> None:
        if boosters > _largest(pair):
            raise ValueError(
                f"{boosters} boosters have rank {boosters}, and '{pair.name}' of {pair.layer.out_features} x "
                f"{pair.layer.in_features} takes at most {_largest(pair)}: raise steps_per_booster (it is "
                f"{self.steps_per_booster}), train fewer steps, or leave the layer out (exclude_modules)."
            )

    def picked(self, run: Run) -> list[Pair]:
        """The adapters that the booster of this step trains."""
        count = max(1, round(self.layers * len(run.pairs)))
        order = torch.randperm(len(run.pairs), generator=run.generator("boosted", run.step // self.steps_per_booster))
        return [run.pairs[i] for i in sorted(order[:count].tolist())]

    def before_step(self, run: Run) -> None:
        picked = {id(pair) for pair in self.picked(run)}
        for pair in run.pairs:
            for parameter in pair.trained() if id(pair) not in picked else ():
                parameter.grad = None  # an optimizer passes over it, decay and momentum too

    def after_step(self, run: Run) -> None:
        if (run.step + 1) % self.steps_per_booster:
            return
        picked = self.picked(run)
        if run.step + 1 == run.steps and any(pair.r == _largest(pair) for pair in picked):
            return  # no room for another booster, and none will begin
        for pair in picked:
            self._check_room(pair, pair.r + 1)
        for pair in picked:
            for which in FACTORS:
                pair.parametrisation(which).push(whole(pair.stored(which)))
            lora_A = pair.stored("lora_A")
            drawn = torch.rand(lora_A.shape, generator=run.generator(pair.name, run.step + 1))
            # Kaiming-uniform, as the adapters start at conversion.
            copy_whole(lora_A, (2 * drawn - 1) / math.sqrt(pair.layer.in_features))
            pair.stored("lora_B").zero_()
            pair.note_rank()
            run.forget(pair.trained())

    def folded(self, pair: Pair) -> None:
        kept = pair["lora_B"].any(dim=0)  # a booster that has just begun, or had no gradient, adds nothing
        kept[0] |= not bool(kept.any())
        if not bool(kept.all()):
            pair.replace(pair["lora_A"][kept], pair["lora_B"][:, kept])


def _largest(pair: Pair) -> int:
    return min(pair.layer.out_features, pair.layer.in_features)


class Stack(nn.Module):
    """The trained row (``dim`` 0) or column (1) below or beside those of the finished boosters.

    Attributes:
        history: [boosters, features], frozen.
    """

    history: Tensor

    def __init__(self, history: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("history", history, persistent=False)

    def push(self, stored: Tensor) -> None:
        self.history = torch.cat([self.history, stored if self.dim == 0 else stored.T])

    def forward(self, stored: Tensor) -> Tensor:
        return torch.cat([self.history if self.dim == 0 else self.history.T, stored], self.dim)

    def get_extra_state(self) -> Tensor:
        return self.history  # of another length in every checkpoint

    def set_extra_state(self, state: Tensor) -> None:
        if state.dim() != 2 or state.shape[1] != self.history.shape[1]:
            raise ValueError(f"boosters of shape {list(state.shape)} do not fit {self.history.shape[1]} features.")
        self.history = state.to(self.history, copy=True)
