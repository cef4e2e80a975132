# SPDX-License-Identifier: Apache-2.0
# rank of block i = max(d_{i+1} - d_i, 0) + 1, where d_i is the intrinsic dimension of the states that enter block i,
# by TwoNN (Facco et al. 2017). GeLoRA, arXiv 2412.09250.
"""GeLoRA: ranks from the intrinsic dimensions of the hidden states."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._batches import device_of, running, to_device
from .._checks import check_choice, check_count, check_number
from .._linears import is_linear, weight_of
from ..config import LoRSConfig
from ._method import Method

_POOLS = ("mean", "last")
_FEWEST = 100


@dataclasses.dataclass(frozen=True)
class GeLoRA(Method):
    """Gives every block of a transformer its own rank before conversion, by rank_pattern; the scaling stays as it was.

    ``configure`` takes a LoRSConfig or lors_cuda.peft's LoRSLoraConfig.

    NOTE: TwoNN underestimates high dimensions; the ranks use differences, so ``multiplier`` scales them to a budget.
    Source: arXiv 2412.09250. Which vector stands for a sequence is not known to us; we take the mean.

    Args:
        multiplier: of every rank, more than 0 (ours).
        pool: what stands for a sequence: "mean" of its states, or the "last" token's.
        points: sequences at most, at least 100.
        discard: share of the largest ratios that the fit leaves out, 0 to less than 1.
    """

    multiplier: float = 1.0
    pool: str = "mean"
    points: int = 1000
    discard: float = 0.1
    name: ClassVar[str] = "gelora"

    def __post_init__(self) -> None:
        check_choice("pool", self.pool, _POOLS)
        check_number("multiplier", self.multiplier, "more than 0", lambda x: 0 < x < math.inf)
        check_count("points", self.points, _FEWEST)
        check_number("discard", self.discard, "at least 0 and less than 1", lambda x: 0 <= x < 1)

    def configure(
        self, config: LoRSConfig, model: nn.Module | None = None, batches: Iterable[Any] | None = None
    ) -> LoRSConfig:
        if model is None or batches is None:
            raise ValueError("GeLoRA looks at the model's hidden states: configure(config, model, batches).")
        dimensions = intrinsic_dimensions(model, batches, pool=self.pool, points=self.points, discard=self.discard)
        ranks = block_ranks(dimensions, self.multiplier)
        name, blocks = model_blocks(model, len(ranks))
        configured = copy.deepcopy(config)
        scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        rank_pattern, alpha_pattern = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
        for number, (block, rank) in enumerate(zip(blocks, ranks, strict=True)):
            sides = [side for module in block.modules() if is_linear(module) for side in weight_of(module).shape]
            r = min([rank, *sides])
            key = rf"^{re.escape(f'{name}.{number}.')}.*"
            rank_pattern[key], alpha_pattern[key] = r, scaling * (math.sqrt(r) if config.use_rslora else r)
        configured.rank_pattern, configured.alpha_pattern = rank_pattern, alpha_pattern
        return configured


def model_blocks(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The model's list of blocks, and its name.

    Raises:
        ValueError: it has no list of ``count`` modules.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(f"{type(model).__name__} has {count} blocks, and no list of {count} modules.")


def block_ranks(dimensions: list[float], multiplier: float = 1.0) -> list[int]:
    """The rank of each block, from the dimensions of the states before, between and after the blocks."""
    return [max(1, round(multiplier * (max(after - before, 0.0) + 1))) for before, after in pairwise(dimensions)]


@torch.no_grad()
def intrinsic_dimensions(
    model: nn.Module, batches: Iterable[Any], *, pool: str = "mean", points: int = 1000, discard: float = 0.1
) -> list[float]:
    """The intrinsic dimension of the hidden states before, between and after the blocks of a transformers model.

    Args:
        model: takes ``output_hidden_states=True``; runs in evaluation mode.
        batches: mappings of the model's arguments, as for :func:`lors_cuda.estimate_gradients`.
        pool: "mean" over the attention mask, or "last" token.
        points: sequences at most.
        discard: as :func:`two_nn`.

    Raises:
        ValueError: fewer than 100 distinct points.
    """
    states: list[list[Tensor]] = []
    with running(model, training=False):
        for batch in batches:
            batch = to_device(batch, device_of(model))
            output = model(**batch, output_hidden_states=True)
            mask = batch.get("attention_mask")
            pooled = [_pooled(state, mask, pool) for state in output.hidden_states]
            states = states or [[] for _ in pooled]
            for kept, new in zip(states, pooled, strict=True):
                kept.append(new.double().cpu())
            if sum(len(each) for each in states[0]) >= points:
                break
    if not states:
        raise ValueError(f"The batches are empty, and the dimension needs at least {_FEWEST} distinct points.")
    return [two_nn(torch.cat(each)[:points], discard) for each in states]


def _pooled(state: Tensor, mask: Tensor | None, pool: str) -> Tensor:
    """[batch, tokens, width] to [batch, width]."""
    weight = state.new_ones(state.shape[:2]) if mask is None else mask.to(state.dtype)
    if pool == "mean":
        return (state * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True)
    positions = torch.arange(state.shape[1], device=state.device)
    last = (weight.to(torch.bool) * positions).argmax(1)
    return state[torch.arange(len(state), device=state.device), last]


def two_nn(points: Tensor, discard: float = 0.1) -> float:
    """Intrinsic dimension of points [count, width]: slope through the origin of -log(1 - i / n) over log(mu_(i)).

    mu is the distance to the second neighbour over that to the first; the largest share ``discard`` is left out.
    Source: Facco et al., Scientific Reports 7, 2017.

    Raises:
        ValueError: fewer than 100 distinct points.
    """
    points = torch.unique(points.double(), dim=0)
    if len(points) < _FEWEST:
        raise ValueError(
            f"There are {len(points)} distinct points, and an intrinsic dimension needs at least {_FEWEST}: give more "
            'batches, or pool="mean" (the last token\'s embedding is the same in many sequences).'
        )
    nearest = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").topk(3, largest=False).values
    mu = (nearest[:, 2] / nearest[:, 1]).sort().values
    count = len(mu)
    kept = int(count * (1 - discard))
    x = mu[:kept].log()
    y = -torch.log1p(-torch.arange(1, count + 1, dtype=torch.float64)[:kept] / count)
    finite = torch.isfinite(y)
    x, y = x[finite], y[finite]
    return float((x @ y) / (x @ x))
