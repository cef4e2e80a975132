# SPDX-License-Identifier: Apache-2.0
# Wanda's calibration (arXiv 2306.11695), block by block: the norms ||X[:, k]||_2 of every linear's and expert's input.
# Called by pruning.py, which scores and prunes; changes nothing itself.
"""Collect the inputs' norms that Wanda scores weights by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._batches import device_of, progress_bar, to_device
from ._checks import all_finite
from ._expert_runs import Product, expert_product, running_experts
from .sparsity import Weight


class _StopForward(Exception):
    """Ends a forward pass once the last block has run."""


@dataclass
class _BlockCall:
    """One block's arguments for one batch, without the hidden state, which is stored for the current block only."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # the hidden state is passed as hidden_states=


class _InputNorms:
    """Sums of squares of the input columns of each target's matrices; padding tokens are not counted."""

    def __init__(self, targets: Sequence[Weight]) -> None:
        self.sums = {t.name: torch.zeros(t.matrices[:, 0].shape, dtype=torch.float64) for t in targets}
        self.tokens = {t.name: [0] * len(t.matrices) for t in targets}
        self.attention_mask: Tensor | None = None
        self._targets = targets

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        stacks: dict[nn.Module, dict[str, str]] = {}
        with contextlib.ExitStack() as undone:
            for target in self._targets:
                if target.is_stack:
                    stacks.setdefault(target.module, {})[target.name.rpartition(".")[2]] = target.name
                else:
                    hook = self._hook(target.name)
                    undone.callback(target.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for experts, names in stacks.items():
                undone.enter_context(running_experts(experts, self._product(experts, names)))
            yield

    def norms(self, target: Weight) -> list[Tensor | None]:
        """[K] of each matrix, the norms of its input's columns; None if it had no input."""
        sums = self.sums[target.name]
        if not all_finite(sums):
            raise ValueError(f"The inputs of '{target.name}' have NaN or infinity on the calibration data.")
        norms = sums.sqrt().to(target.values.device, torch.float32)
        return [norm if tokens else None for norm, tokens in zip(norms, self.tokens[target.name], strict=True)]

    def _add(self, name: str, index: int, tokens: Tensor) -> None:
        self.tokens[name][index] += tokens.shape[0]
        if tokens.shape[0]:
            norm = torch.linalg.vector_norm(tokens, dim=0, dtype=torch.promote_types(tokens.dtype, torch.float32))
            self.sums[name][index] += norm.to("cpu", torch.float64).square()

    def _product(self, experts: nn.Module, names: Mapping[str, str]) -> Product:
        """``names``: of the stacks that are targets, by their parameters' names."""

        def product(name: str, expert: int, input: Tensor, tokens: Tensor, total: int) -> Tensor:
            if name in names:
                mask = self.attention_mask
                counted = input if mask is None or mask.numel() != total else input[mask.flatten()[tokens]]
                self._add(names[name], expert, counted)
            return expert_product(experts, name, expert, input)

        return product

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            input = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            mask = self.attention_mask
            # A layer that regroups tokens has no [batch, sequence] dims and gets no padding.
            if mask is not None and input.shape[:-1] == mask.shape and not bool(mask.all()):
                input = input[mask]
            self._add(name, 0, input.reshape(-1, input.shape[-1]))

        return add


def calibrated(
    model: nn.Module, targets: Sequence[Weight], batches: Sequence[Mapping[str, Any]], progress: bool
) -> Iterator[tuple[Weight, list[Tensor | None]]]:
    """Each target with the norms [K] of the columns of its input, one for each of its matrices (of a linear one, of a
    stack one for each expert); None if the calibration data did not reach it.

    One block after another, and linears outside all blocks last. The caller prunes each target before it takes the
    next, so that every block is calibrated on the outputs of the pruned blocks before it.

    Raises:
        ValueError: an input has NaN or infinity.
    """
    blocks, outside = _group_by_block(model, targets)
    device = device_of(model)
    # An encoder-decoder makes its decoder's input of the labels; others would compute a loss for nothing.
    dropped = () if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else ("labels",)
    inputs = [to_device({k: v for k, v in batch.items() if k not in dropped}, device) for batch in batches]
    masks = [batch["attention_mask"].bool() if "attention_mask" in batch else None for batch in inputs]
    modules = [block for block, _ in blocks]
    recorded = [_record(model, modules, batch) for batch in inputs] if blocks else []
    # If a block takes more than its predecessor's output (an encoder's output, say), the whole model is run for every
    # block: the same result, but slower.
    hidden = [entry[0] for entry in recorded if entry is not None]
    calls = [entry[1] for entry in recorded if entry is not None]
    is_chain = len(calls) == len(inputs)
    bar = progress_bar(blocks, total=len(blocks), description="pruning", unit="block", shown=progress)
    for index, (block, members) in enumerate(bar):
        norms = _InputNorms(members)
        with norms.collected():
            for number, batch in enumerate(inputs):
                norms.attention_mask = masks[number]
                if is_chain:
                    _run_block(block, hidden[number], calls[number][index])
                else:
                    model(**batch)
        for target in members:
            yield target, norms.norms(target)
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
            yield target, norms.norms(target)


def _group_by_block(
    model: nn.Module, targets: Sequence[Weight]
) -> tuple[list[tuple[nn.Module, list[Weight]]], list[Weight]]:
    """Group targets by their outermost ModuleList entry; those in none, or in several, are returned separately."""
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    members: dict[str, list[Weight]] = {}
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
