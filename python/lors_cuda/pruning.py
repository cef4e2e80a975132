# SPDX-License-Identifier: Apache-2.0
# Magnitude and Wanda pruning: score every weight, keep the highest scores of each group or row.
# Wanda: score[n, k] = |weight[n, k]| * ||X[:, k]||_2 (arXiv 2306.11695), calibrated block by block.
# Called by `lors-cuda prune` and the demo; writes exact zeros into the dense weights and changes nothing else.
"""Make a dense model sparse: magnitude and Wanda pruning, N:M or unstructured.

Why no library: torchao removed its sparsity package, WandaSparsifier included, in 2026 (pytorch/ao pull request 4728),
and torch 2.13's own pruners do not look at activations: ``torch.ao.pruning.WeightNormSparsifier`` and
``torch.nn.utils.prune`` score the weight alone, and the latter selects per tensor where Wanda selects per row.
Magnitude is the same selection with a simpler score; the tests compare it with both of torch's pruners.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._batches import device_of, progress_bar, running, to_device
from ._checks import check_choice
from .config import LoRSConfig
from .targets import Target, find_targets

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


@dataclass(frozen=True)
class LayerSparsity:
    """The number of zeros in a layer's weight.

    Attributes:
        name: the module's name in the model.
        shape: (N, K).
        zeros: weights that are 0, -0.0 included.
    """

    name: str
    shape: tuple[int, int]
    zeros: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / (self.shape[0] * self.shape[1])


def prune(
    model: nn.Module,
    pattern: str | float | SparsityPattern = "2:4",
    *,
    method: str = "wanda",
    batches: Sequence[Mapping[str, Any]] | None = None,
    config: LoRSConfig | None = None,
    targets: Sequence[Target] | None = None,
    progress: bool = True,
) -> list[LayerSparsity]:
    """Set the least important weights of every target linear to exactly +0, in place.

    ``"magnitude"`` scores |W|; ``"wanda"`` scores |W[n, k]| * ||X[:, k]||_2 over the calibration tokens without padding
    (arXiv 2306.11695). N:M patterns keep the best N of each aligned group of M along a row. Unstructured: Wanda
    compares within each output row, magnitude within each layer (as the Wanda paper's baseline). Of equal scores the
    lower column is kept. Wanda prunes the model's blocks in order, so that each block is calibrated on the outputs of
    the pruned blocks before it; it stores one hidden state per calibration token and one [K] sum per layer.

    Args:
        model: a model with nn.Linear layers, floating-point weights [N, K].
        pattern: see :meth:`SparsityPattern.parse`.
        method: "magnitude" or "wanda".
        batches: for Wanda: keyword arguments of the model (labels are dropped); iterated several times.
        config: selects the targets; None: every nn.Linear except the output head ("all-linear").
        targets: what `targets.find_targets` found in this model already, instead of `config`.
        progress: show a progress bar on a terminal.

    Returns:
        The sparsity of each pruned layer, in the model's order.

    Raises:
        ValueError: an unknown method or pattern; Wanda without batches; a weight or activation that is not finite; a
            layer that saw no calibration token; nothing to prune. Layers pruned before an error stay pruned.
    """
    parsed = SparsityPattern.parse(pattern)
    check_choice("method", method, METHODS)
    if method == "wanda" and not batches:
        raise ValueError("method 'wanda' needs calibration batches, and none were given; or use method='magnitude'.")
    if targets is None:
        targets = find_targets(model, LoRSConfig(r=1) if config is None else config)
    for target in targets:
        if not bool(torch.isfinite(target.weight).all()):
            raise ValueError(f"The weight of '{target.name}' has NaN or infinity; nothing was pruned.")
    with torch.no_grad(), running(model, training=False):
        if method == "wanda":
            _prune_blocks(model, targets, parsed, batches or [], progress)
        else:
            for target in _bar(targets, "pruning", "layer", progress):
                _prune_layer(target, parsed, None)
    return [_layer_sparsity(target) for target in targets]


def measure_sparsity(
    model: nn.Module, config: LoRSConfig | None = None, *, targets: Sequence[Target] | None = None
) -> list[LayerSparsity]:
    """Count the zeros of every linear that ``config`` selects (None: all but the output head), or of ``targets``, what
    `targets.find_targets` found in this model already."""
    if targets is None:
        targets = find_targets(model, LoRSConfig(r=1) if config is None else config)
    return [_layer_sparsity(target) for target in targets]


def total_sparsity(layers: Iterable[LayerSparsity]) -> float:
    """Fraction of zeros over all layers together; 0 for none."""
    counts = [(layer.zeros, layer.shape[0] * layer.shape[1]) for layer in layers]
    return sum(zeros for zeros, _ in counts) / max(sum(weights for _, weights in counts), 1)


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


def _prune_layer(target: Target, pattern: SparsityPattern, input_norms: Tensor | None) -> None:
    """Zero a layer's lowest scores; ``input_norms`` [K] float32 for Wanda, None for magnitude."""
    weight = target.weight
    if input_norms is None and pattern.group is None:
        # Over the whole layer: sorting gives the exact count even if magnitudes are equal.
        order = weight.detach().abs().flatten().sort(stable=True, descending=True).indices
        removed = order[order.numel() - round(pattern.sparsity * order.numel()) :]
        weight[removed // weight.shape[1], removed % weight.shape[1]] = 0.0
        return
    for rows in torch.split(weight, max(1, _SCORES_AT_ONCE // weight.shape[1])):
        scores = rows.abs().float()
        rows.masked_fill_(~select_mask(scores if input_norms is None else scores * input_norms, pattern), 0.0)


def _layer_sparsity(target: Target) -> LayerSparsity:
    weight = target.weight.detach()
    N, K = weight.shape
    return LayerSparsity(target.name, (N, K), int((weight == 0).sum()))


# ---- Wanda's calibration, block by block ----------------------------------------------------------------------------


class _StopForward(Exception):
    """Ends a forward pass once the last block has run."""


@dataclass
class _BlockCall:
    """One block's arguments for one batch, without the hidden state, which is stored for the current block only."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # the hidden state is passed as hidden_states=


class _InputNorms:
    """Sums of squares of each target's input columns, collected by hooks; padding tokens are not counted."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.sums = {t.name: torch.zeros(t.weight.shape[1], dtype=torch.float64) for t in targets}
        self.tokens = dict.fromkeys(self.sums, 0)
        self.attention_mask: Tensor | None = None
        self._targets = targets

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        handles = [target.module.register_forward_pre_hook(self._hook(target.name)) for target in self._targets]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def norms(self, target: Target) -> Tensor:
        sums = self.sums[target.name]
        if self.tokens[target.name] == 0:
            raise ValueError(
                f"'{target.name}' saw no calibration token, so Wanda cannot score its weights. Give more calibration "
                "data, or leave the layer out."
            )
        if not bool(torch.isfinite(sums).all()):
            raise ValueError(f"The inputs of '{target.name}' have NaN or infinity on the calibration data.")
        return sums.sqrt().to(target.weight.device, torch.float32)

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            input = args[0]
            mask = self.attention_mask
            # A layer that regroups tokens (an expert) has no [batch, sequence] dims and gets no padding.
            if mask is not None and input.shape[:-1] == mask.shape and not bool(mask.all()):
                input = input[mask]
            tokens = input.reshape(-1, input.shape[-1])
            self.tokens[name] += tokens.shape[0]
            if tokens.shape[0]:
                norm = torch.linalg.vector_norm(tokens, dim=0, dtype=torch.float32)
                self.sums[name] += norm.to("cpu", torch.float64).square()

        return add


def _prune_blocks(
    model: nn.Module,
    targets: Sequence[Target],
    pattern: SparsityPattern,
    batches: Sequence[Mapping[str, Any]],
    progress: bool,
) -> None:
    """Calibrate and prune one block after another; linears outside all blocks last."""
    blocks, outside = _group_by_block(model, targets)
    device = device_of(model)
    inputs = [to_device({k: v for k, v in batch.items() if k != "labels"}, device) for batch in batches]
    masks = [batch["attention_mask"].bool() if "attention_mask" in batch else None for batch in inputs]
    modules = [block for block, _ in blocks]
    recorded = [_record(model, modules, batch) for batch in inputs] if blocks else []
    # If a block takes more than its predecessor's output (an encoder's output, say), the whole model is run for every
    # block: the same result, but slower.
    hidden = [entry[0] for entry in recorded if entry is not None]
    calls = [entry[1] for entry in recorded if entry is not None]
    is_chain = len(calls) == len(inputs)
    for index, (block, members) in enumerate(_bar(blocks, "pruning", "block", progress)):
        norms = _InputNorms(members)
        with norms.collected():
            for number, batch in enumerate(inputs):
                norms.attention_mask = masks[number]
                if is_chain:
                    _run_block(block, hidden[number], calls[number][index])
                else:
                    model(**batch)
        for target in members:
            _prune_layer(target, pattern, norms.norms(target))
        if is_chain:
            for number in range(len(inputs)):
                hidden[number] = _run_block(block, hidden[number], calls[number][index])
    if outside:
        norms = _InputNorms(outside)
        with norms.collected():
            for number, batch in enumerate(inputs):
                norms.attention_mask = masks[number]
                model(**batch)
        for target in outside:
            _prune_layer(target, pattern, norms.norms(target))


def _group_by_block(
    model: nn.Module, targets: Sequence[Target]
) -> tuple[list[tuple[nn.Module, list[Target]]], list[Target]]:
    """Group targets by their outermost ModuleList entry; those in none, or in several, are returned separately."""
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    members: dict[str, list[Target]] = {}
    outside = []
    for target in targets:
        found = {_block_name(name, lists) for name in target.names}
        block = found.pop()
        if block is None or found:
            outside.append(target)
        else:
            members.setdefault(block, []).append(target)
    return [(model.get_submodule(name), group) for name, group in members.items()], outside


def _block_name(name: str, lists: set[str]) -> str | None:
    parts = name.split(".")
    for end in range(len(parts)):
        if ".".join(parts[:end]) in lists:
            return ".".join(parts[: end + 1])
    return None


def _record(
    model: nn.Module, blocks: list[nn.Module], batch: Mapping[str, Any]
) -> tuple[Tensor, list[_BlockCall]] | None:
    """Run one batch and record each block's arguments.

    Returns:
        The first block's hidden state and every block's other arguments; None if the blocks are not a chain, in which
        each is called once, with the same tensor object that its predecessor returned.
    """
    order: list[nn.Module] = []
    calls: list[_BlockCall] = []
    first: list[Any] = []
    previous: list[Any] = []  # the last block's output only: all of them would be all activations
    linked = True

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal linked
        given = args[0] if args else kwargs.get("hidden_states")
        if not order:
            first.append(given)
        elif previous[0] is not given:
            linked = False
        order.append(module)
        calls.append(_BlockCall(args[1:], {k: v for k, v in kwargs.items() if args or k != "hidden_states"}, not args))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        previous[:] = [output[0] if isinstance(output, tuple) else output]
        if module is blocks[-1]:
            raise _StopForward

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        with contextlib.suppress(_StopForward):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    is_chain = linked and len(order) == len(blocks) and all(a is b for a, b in zip(order, blocks, strict=True))
    return (first[0], calls) if is_chain and isinstance(first[0], Tensor) else None


def _run_block(block: nn.Module, hidden: Tensor, call: _BlockCall) -> Tensor:
    named = {"hidden_states": hidden, **call.kwargs}
    output = block(**named) if call.by_name else block(hidden, *call.args, **call.kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _bar(items: Sequence[Any], description: str, unit: str, shown: bool) -> Iterable[Any]:
    return progress_bar(items, total=len(items), description=description, unit=unit, shown=shown)
