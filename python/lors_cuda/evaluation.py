# SPDX-License-Identifier: Apache-2.0
# Perplexity, for `lors-cuda eval`, for finetune's --eval-data and for the demo. Changes no model.
"""Measure perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ._batches import device_of, progress_bar, running, to_device
from ._distributed import process_count, process_rank, summed
from .data import TokenDataset, count_loss_tokens


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        loss: mean loss per predicted token, natural logarithm.
        perplexity: its exponential; infinity where that overflows.
        tokens: how many were predicted.
    """

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, data: TokenDataset, *, batch_size: int = 8, progress: bool = True) -> Evaluation:
    """Perplexity of ``data``: the exponential of the mean loss over all its label tokens, whatever their batches.

    With torch.distributed initialised, all processes call it with the same data and share its batches.

    Args:
        model: ``model(**batch).loss`` is the mean loss over the batch's label tokens, as in transformers. It runs in
            eval mode without gradients, and is left in the mode it was in.
        data: the examples, each used once.
        batch_size: sequences per forward pass.
        progress: show a bar on a terminal.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = device_of(model)
    starts = range(0, len(data), batch_size)
    total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    with running(model, training=False):
        rounds = range(0, len(starts), process_count())
        bar = progress_bar(rounds, total=len(rounds), description="evaluating", unit="batch", shown=progress)
        for first in bar:
            # A sharded model needs all processes in every forward: one without a batch repeats the last and drops it.
            number = first + process_rank()
            start = starts[min(number, len(starts) - 1)]
            batch = data.batch(range(start, min(start + batch_size, len(data))))
            loss, tokens = model(**to_device(batch, device)).loss.item(), count_loss_tokens(batch["labels"])
            if number < len(starts):
                total += torch.tensor([loss * tokens, tokens], dtype=torch.float64)
    loss, tokens = summed(total).tolist()
    mean = loss / tokens
    if not math.isfinite(mean):
        raise FloatingPointError(f"The loss on {data.source} is {mean}. Check the weights.")
    # exp overflows a float above 709: such a model is as bad as infinity says.
    return Evaluation(mean, math.exp(mean) if mean < 700 else math.inf, int(tokens))
