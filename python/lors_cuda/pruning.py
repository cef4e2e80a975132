# SPDX-License-Identifier: Apache-2.0
# Magnitude and Wanda pruning: score every weight, keep the highest scores of each group or row.
# Wanda: score[n, k] = |weight[n, k]| * ||X[:, k]||_2 (arXiv 2306.11695); wanda.py measures ||X[:, k]||_2.
# Called by `lors-cuda prune` and the demo; writes exact zeros into the dense weights and changes nothing else.
"""Make a dense model sparse: magnitude and Wanda pruning, N:M or unstructured.

Why no library: torchao removed its sparsity package, WandaSparsifier included, in 2026 (pytorch/ao pull request 4728),
and torch 2.13's own pruners do not look at activations: ``torch.ao.pruning.WeightNormSparsifier`` and
``torch.nn.utils.prune`` score the weight alone, and the latter selects per tensor where Wanda selects per row.
Magnitude is the same selection with a simpler score; the tests compare it with both of torch's pruners.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._batches import progress_bar, running
from ._checks import DTYPES, all_finite, check_choice, is_packed, listed, shortened
from .config import LoRSConfig
from .sparse_linear import SparseLayer
from .sparsity import (
    EXPERTS,
    LayerSparsity,
    ModelSparsity,
    Weight,
    choose,
    measure_sparsity,
    measured,
    total_sparsity,
    weights_of,
)
from .targets import has_peft_adapters
from .wanda import calibrated

__all__ = [
    "METHODS",
    "LayerSparsity",
    "ModelSparsity",
    "SparsityPattern",
    "measure_sparsity",
    "prune",
    "select_mask",
    "total_sparsity",
]

METHODS = ("magnitude", "wanda")
# Scores sorted at a time: a 4096 x 11008 layer at once would need 0.7 GB of indices and scores.
_SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class SparsityPattern:
    """``kept`` of each aligned group of ``group`` weights along a row, or the fraction ``sparsity`` of zeros.

    Attributes:
        sparsity: the fraction of zeros, 1 - kept / group for an N:M pattern.
        kept: N of an N:M pattern, e.g. 2; None for an unstructured one.
        group: M, e.g. 4; None for an unstructured one.
    """

    sparsity: float
    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, pattern: str | float | SparsityPattern) -> SparsityPattern:
        """Read "2:4" (2 of 4 kept; any N:M), "50%" or 0.5 (the fraction that becomes zero).

        Raises:
            ValueError: something else, or nothing or everything would be kept.
        """
        if isinstance(pattern, SparsityPattern):
            return pattern
        text = str(pattern).strip()
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            kept, group = int(match[1]), int(match[2])
            if not 1 <= kept < group:
                raise ValueError(f"pattern is {text!r}; of N:M, N are kept, so N must be at least 1 and less than M.")
            return cls(1 - kept / group, kept, group)
        if match := re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text):
            sparsity = float(match[1]) / (100 if match[2] else 1)
            if 0 < sparsity < 1:
                return cls(sparsity)
        raise ValueError(
            f"pattern is {text!r}; it must be N:M (such as 2:4), a percentage of zeros (such as 50%), or a fraction "
            "between 0 and 1 (such as 0.5)."
        )


def prune(
    model: nn.Module,
    pattern: str | float | SparsityPattern = "2:4",
    *,
    method: str = "wanda",
    batches: Sequence[Mapping[str, Any]] | None = None,
    config: LoRSConfig | None = None,
    progress: bool = True,
) -> ModelSparsity:
    """Set the least important weights of every linear and every expert to exactly +0, in place.

    ``"magnitude"`` scores |W|; ``"wanda"`` scores |W[n, k]| * ||X[:, k]||_2 over the calibration tokens without padding
    (arXiv 2306.11695). N:M patterns keep the best N of each aligned group of M along a row. Unstructured: Wanda
    compares within each output row, magnitude within each layer (as the Wanda paper's baseline) or expert. Of equal
    scores the lower column is kept. Wanda prunes the model's blocks in order, so that each block is calibrated on the
    outputs of the pruned blocks before it; it stores one hidden state per calibration token and one [K] sum per layer
    and expert.

    Linears are nn.Linear, what is derived from it, and transformers' Conv1D, whose weight [K, N] is pruned along K.
    Whether a linear could be adapted does not matter. Experts are the stacked parameters of transformers' mixtures of
    experts, pruned along their input whatever way they are stored: each as if it were a linear, with ||X[:, k]||_2 over
    the tokens that are routed to it (of down_proj: over what the gate makes of them).

    Warned of is what stays as it is (experts of a class that does not say how it stores them; computed and quantized
    weights), and which layers and experts saw no calibration token, so that magnitude pruned them.

    Args:
        model: any model with floating-point linears.
        pattern: see :meth:`SparsityPattern.parse`.
        method: "magnitude" or "wanda".
        batches: for Wanda: keyword arguments of the model, iterated several times. Labels are dropped, unless it is an
            encoder-decoder, which makes its decoder's input of them.
        config: its target_modules and exclude_modules choose linears by name, its target_parameters experts; None: all
            except the output head and the routers of experts.
        progress: show a progress bar on a terminal.

    Returns:
        The sparsity of the pruned layers, in the model's order, and of the whole model.

    Raises:
        ValueError: an unknown method or pattern; Wanda without batches; a weight or activation that is not finite;
            nothing to prune. Layers pruned before an error stay pruned.
    """
    parsed = SparsityPattern.parse(pattern)
    check_choice("method", method, METHODS)
    if method == "wanda" and not batches:
        raise ValueError("method 'wanda' needs calibration batches, and none were given; or use method='magnitude'.")
    targets, left_out = _targets(model, config)
    for target in targets:
        if not all_finite(target.values):
            raise ValueError(f"The weight of '{target.name}' has NaN or infinity; nothing was pruned.")
    unseen: list[str] = []
    unrouted: list[str] = []
    with torch.no_grad(), running(model, training=False):
        if method == "wanda":
            for target, norms in calibrated(model, targets, batches or [], progress):
                _prune_layer(target, parsed, norms)
                missing = sum(one is None for one in norms)
                if missing == len(norms):
                    unseen.append(target.name)
                elif missing:
                    which = ", ".join(str(expert) for expert, one in enumerate(norms) if one is None)
                    unrouted.append(f"{missing} of {len(norms)} of '{target.name}' ({which})")
        else:
            bar = progress_bar(targets, total=len(targets), description="pruning", unit="layer", shown=progress)
            for target in bar:
                _prune_layer(target, parsed, [None] * len(target.matrices))
    if unseen:
        left_out.append(
            f"{listed(unseen)} saw no calibration token, and magnitude pruned them instead of Wanda. Check that the "
            "calibration data reaches them."
        )
    if unrouted:
        left_out.append(
            f"No calibration token was routed to some experts, and magnitude pruned them instead of Wanda: "
            f"{shortened(unrouted, '; ')}. More calibration data reaches more experts."
        )
    if left_out:
        warnings.warn(" ".join(left_out), UserWarning, stacklevel=2)
    return measured(model, {target.name for target in targets})


def _targets(model: nn.Module, config: LoRSConfig | None) -> tuple[list[Weight], list[str]]:
    """The linears and experts to prune, and sentences about those that are left out.

    Raises:
        ValueError: none is left, or the model has adapters of PEFT.
    """
    if has_peft_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters of PEFT, which were trained for the weights as they are. Prune the "
            "base model (model.unload() gives it back)."
        )
    weights = list(weights_of(model))
    everything = max(sum(weight.numel for weight in weights), 1)

    def described(found: Sequence[Weight]) -> str:
        share = sum(weight.numel for weight in found) / everything
        return f"{listed([weight.name for weight in found])} ({share:.1%} of the model's weights)"

    targets, reasons = [], dict[str, list[Weight]]()
    for weight in choose(weights, config):
        reason = _cannot_prune(weight)
        if reason is None:
            targets.append(weight)
        else:
            reasons.setdefault(reason, []).append(weight)
    left_out = [f"Not pruned: {described(found)}, because {reason}." for reason, found in reasons.items()]
    if not targets:
        nothing = f"{type(model).__name__} has no linear and no experts to prune."
        raise ValueError(" ".join([nothing, *left_out]))
    return targets, left_out


def _cannot_prune(weight: Weight) -> str | None:
    """Why zeros cannot be written into a weight; the words follow 'because'. None if they can."""
    if isinstance(weight.module, SparseLayer):
        return "their weights are stored sparse already (merge_and_unload gives plain ones)"
    name = weight.name.rpartition(".")[2] if weight.kind == EXPERTS else "weight"
    if weight.module._parameters.get(name) is not weight.values:
        return "their weights are computed (torch.nn.utils.prune or parametrize); make that permanent first"
    if weight.values.is_meta:
        return "their weights have no values in memory (on the meta device, or offloaded)"
    if is_packed(weight.values) or weight.values.dtype not in DTYPES or weight.values.layout != torch.strided:
        return "their weights are quantized, or packed; load the model in an ordinary dtype"
    if weight.kind == EXPERTS and not weight.is_stack:
        return (
            f"they are experts of the class {type(weight.module).__name__}, which is not one of transformers' "
            "use_experts_implementation, so that the order of their dimensions is not known"
        )
    if getattr(weight.module, "_is_expert_parallel", False):
        return "the experts are divided among processes (expert parallelism); load the model in one"
    return None


def select_mask(scores: Tensor, pattern: SparsityPattern) -> Tensor:
    """Choose the kept weights, row by row.

    Args:
        scores: [N, K] finite floats, larger = more important.
        pattern: N:M: per aligned group of M along K (a last, shorter group keeps at most N); unstructured: per row.

    Returns:
        bool [N, K], True = kept; of equal scores the lower column is kept.
    """
    N, K = scores.shape
    if pattern.kept is None or pattern.group is None:
        kept, group = K - round(pattern.sparsity * K), K
    else:
        kept, group = pattern.kept, pattern.group
    # -inf pads the last group: padding is chosen last, and removed again.
    padded = nn.functional.pad(scores, (0, -K % group), value=-math.inf).view(N, -1, group)
    best = padded.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    mask = torch.zeros(padded.shape, dtype=torch.bool, device=scores.device).scatter_(-1, best, True)
    return mask.view(N, -1)[:, :K]


def _prune_layer(target: Weight, pattern: SparsityPattern, input_norms: Sequence[Tensor | None]) -> None:
    """Zero the lowest scores of each of its matrices; ``input_norms``: [K] float32 of each, or None for magnitude."""
    for weight, norms in zip(target.matrices, input_norms, strict=True):  # views of what the layer stores
        _prune_matrix(weight, pattern, norms)


def _prune_matrix(weight: Tensor, pattern: SparsityPattern, input_norms: Tensor | None) -> None:
    if input_norms is None and pattern.group is None:
        # Over the whole layer: sorting gives the exact count even if magnitudes are equal.
        order = weight.abs().flatten().sort(stable=True, descending=True).indices
        off = torch.zeros(order.numel(), dtype=torch.bool, device=weight.device)
        off[order[order.numel() - round(pattern.sparsity * order.numel()) :]] = True
        weight.masked_fill_(off.view(weight.shape), 0.0)
        return
    for rows in torch.split(weight, max(1, _SCORES_AT_ONCE // weight.shape[1])):
        scores = rows.abs().float()
        rows.masked_fill_(~select_mask(scores if input_norms is None else scores * input_norms, pattern), 0.0)
