# SPDX-License-Identifier: Apache-2.0
# W~ + M o E in training, row i of E ~ N(0, (f sigma ||w~_i||)^2 / n_i), f = (1 - cos(pi t / T)) / 2; gradients are
# those of LoRA at the perturbed point. n_i: kept weights of the row. Flat-LoRA, arXiv 2409.14396.
"""Flat-LoRA: noise on the merged weight in training, for a flatter minimum."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from .._checks import check_count, check_number
from .._draws import derived_seed
from ..functional import merge
from ..weight import SparseWeight
from ._method import Method
from ._pair import Pair
from ._run import Run


@dataclasses.dataclass(frozen=True)
class FlatLoRA(Method):
    """Trains at a randomly perturbed merged weight; evaluation, files and merging see none of it.

    The noise is part of the merge: a hash of seed, layer, step and place, computed again in backward, so that no weight
    is written and nothing of its size is stored. The authors' code adds it to the stored weight and takes it off again.
    Source: arXiv 2409.14396 and its repository. On a sparse row the variance is divided by the kept weights (ours): by
    all, the noise would have half of the energy at half density.

    Args:
        sigma: the noise's norm, as a share of its row's; 0 or more. Where ``start`` was told the number of ``steps`` it
            grows from 0 over the training, by a cosine; where not, it is constant (ours).
        refresh: optimizer steps for which noise and row norms stay the same, at least 1.
    """

    sigma: float = 0.05
    refresh: int = 1
    name: ClassVar[str] = "flat-lora"

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, "0 or more", lambda x: 0 <= x < math.inf)
        check_count("refresh", self.refresh)

    def begin_step(self, run: Run) -> None:
        if run.step % self.refresh == 0:
            growth = 1.0 if run.steps is None else (1 - math.cos(math.pi * min(1.0, run.step / run.steps))) / 2
            for pair in run.pairs:
                run.tensors[f"{pair.name}.noise"] = growth * self.sigma * row_deviations(pair)
        drawn = run.step - run.step % self.refresh
        for pair in run.pairs:
            pair.layer.noise = (run.tensors[f"{pair.name}.noise"], derived_seed(run.seed, drawn, f"{pair.name}.noise"))


def row_deviations(pair: Pair) -> Tensor:
    """||w~_i|| / sqrt(n_i) of each row of the merged weight, rounded to nearest: the root mean square of what is kept.
    Float32 [N]; 0 for a row that keeps nothing."""
    weight: SparseWeight = pair.layer.storage.whole_weight()
    rows = merge(weight, pair.whole("lora_A"), pair.whole("lora_B"), pair.scaling)
    kept = weight.mask().sum(1).clamp_min(1)
    return (rows.float().norm(dim=1) / kept.sqrt()).float()
