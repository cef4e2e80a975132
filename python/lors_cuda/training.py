# SPDX-License-Identifier: Apache-2.0
# The training loop of `lors-cuda finetune` and of the demo: AdamW, warmup, clipping, a log, resumable checkpoints.
# Trains whatever requires grad; training_files.py reads and writes what a run leaves behind.
"""Train a causal language model's adapters, and measure perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._processes import (
    copy_from_first,
    from_first,
    gathered,
    process_count,
    process_rank,
    sum_gradients,
    summed,
    together,
)
from ._running import annotate, device_of, progress_bar, running, to_device
from ._sharded import is_sharded
from .data import ShuffledOrder, TokenDataset, count_loss_tokens
from .training_files import CHECKPOINT_NAME, Checkpoint, StepLog, load_checkpoint, save_checkpoint

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Args:
        steps: number of optimizer steps.
        batch_size: sequences per forward pass, in each process.
        accumulate: forward passes per step, in each process; the step's loss is the mean over the tokens of all of
            them in all processes.
        lr: peak learning rate of AdamW, reached after the warmup.
        schedule: "cosine" (down to zero at the last step) or "constant", after the warmup.
        warmup_steps: linear warmup; None: 3 % of the steps.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; None: not clipped.
        seed: order of the data and dropout, which differs between processes.
        checkpoint_every: steps between checkpoints; 0: only at the end.

    Raises:
        ValueError: a value that cannot work.
    """

    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulate", 1), ("checkpoint_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; it must be 'cosine' or 'constant'.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}; it must be finite and greater than 0.")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be between 0 and steps = {self.steps}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be finite and at least 0.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; it must be greater than 0, or None.")

    def lr_factor(self, step: int) -> float:
        """Learning rate of step ``step`` (counted from 0) as a fraction of ``lr``."""
        warmup = math.ceil(0.03 * self.steps) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


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


def train(
    model: nn.Module,
    data: TokenDataset,
    config: TrainingConfig,
    *,
    directory: Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train the parameters that require grad, in place.

    A run is a function of the model, the data and the configuration. With a ``directory`` it leaves
    ``training.jsonl`` (one line per step) and ``checkpoint.pt`` there, and a run that was killed goes on from its last
    checkpoint with the same loss curve: on the CPU with the same number of threads, bit for bit. The global random
    state is left as it was.

    With torch.distributed initialised, every process calls it with its own copy of the model and the same data and
    configuration. Step by step they share the batches that one process with ``accumulate`` times as large takes, so
    that the curve is the same up to the order of sums (and dropout); the first process alone writes. An error in one
    process ends all.

    Args:
        model: ``model(**batch).loss`` is the mean loss over the batch's label tokens, as in transformers.
        data: the examples; each step takes ``accumulate`` batches of ``config``'s shuffled order.
        directory: where the log and the checkpoints go; None: nowhere.
        resume: continue from the directory's checkpoint; from the beginning if it has none yet.
        identity: what else must be equal for resuming to make sense (JSON values), such as the adapters' settings.
        progress: show a bar on a terminal.
        on_step: called with each step's entry.

    Returns:
        One entry per step, those before a resume included: step (from 1), loss, lr, grad_norm, tokens, seconds.

    Raises:
        ValueError: nothing to train or to resume with these settings; a model under DistributedDataParallel or
            fully_shard.
        OSError: the log or a checkpoint could not be written; the last checkpoint is complete.
        FloatingPointError: the loss or the gradient of a step is not finite; the parameters are those before that step.
        RuntimeError: another process failed, and says why.
    """
    parameters = _trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, config.lr_factor)
    settings = {**asdict(config), "data": data.fingerprint, "processes": process_count(), **(identity or {})}
    del settings["checkpoint_every"]  # the only one that does not change the curve
    order = ShuffledOrder(len(data), config.batch_size, config.seed)
    device = device_of(model)
    on_cuda = device.type == "cuda"
    first = process_rank() == 0
    saving = from_first(directory is not None)
    directory = directory if first else None
    with torch.random.fork_rng([device] if on_cuda else []), running(model, training=True):
        _seed(config.seed + process_rank(), device)
        checkpoint = None
        with together():
            if resume and directory is not None:
                checkpoint = load_checkpoint(directory, settings, parameters)
            elif directory is not None:
                # A checkpoint of an earlier run must not be what this one is resumed from.
                (directory / CHECKPOINT_NAME).unlink(missing_ok=True)
        checkpoint = from_first(checkpoint)
        start = 0 if checkpoint is None else checkpoint.step
        with together():
            if checkpoint is not None:
                _restore(checkpoint, parameters, optimizer, scheduler, device)
            log = StepLog(directory, start)
        log.entries = from_first(log.entries)
        copy_from_first(list(parameters.values()))
        with log:
            bar = progress_bar(
                range(start, config.steps),
                total=config.steps - start,
                description="training",
                unit="step",
                shown=progress and first,
            )
            for step in bar:
                began = time.perf_counter()
                with together():
                    batches, tokens = _share(data, order, step, config.accumulate)
                    lr = scheduler.get_last_lr()[0]
                    loss = _accumulate(model, batches, tokens, step + 1, device)
                # One collective after backward, not DistributedDataParallel's during it: adapters are small, and a
                # process that fails in its backward can still tell the others.
                loss = float(summed(torch.tensor(loss, dtype=torch.float64)))
                sum_gradients(list(parameters.values()))
                with together():
                    norm = _clip(list(parameters.values()), config.max_grad_norm, step + 1)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    scheduler.step()
                    entry = {
                        "step": step + 1,
                        "loss": loss,
                        "lr": lr,
                        "grad_norm": norm,
                        "tokens": tokens,
                        "seconds": time.perf_counter() - began,
                    }
                    log.append(entry)
                    annotate(bar, f"loss {loss:.3f}")
                    if on_step is not None:
                        on_step(entry)
                is_last = step + 1 == config.steps
                if saving and (is_last or _is_due(step + 1, config.checkpoint_every)):
                    state = _snapshot(step + 1, settings, parameters, optimizer, scheduler, device)
                    with together():
                        if directory is not None:
                            log.flush()
                            save_checkpoint(directory, state)
    return log.entries


@torch.no_grad()
def evaluate(model: nn.Module, data: TokenDataset, *, batch_size: int = 8, progress: bool = True) -> Evaluation:
    """Perplexity of ``data``: the exponential of the mean loss over all its label tokens, whatever their batches.

    Args:
        model: ``model(**batch).loss`` is the mean loss over the batch's label tokens, as in transformers. It runs in
            eval mode without gradients, and is left in the mode it was in.
        data: the examples, each used once.
        batch_size: sequences per forward pass.
        progress: show a bar on a terminal.

    Raises:
        FloatingPointError: the loss of a batch is not finite.
    """
    device = device_of(model)
    total, tokens = 0.0, 0
    with running(model, training=False):
        batches: Iterator[dict[str, Tensor]] = data.batches(batch_size)
        count = -(-len(data) // batch_size)
        bar = progress_bar(batches, total=count, description="evaluating", unit="batch", shown=progress)
        for number, batch in enumerate(bar, start=1):
            count = count_loss_tokens(batch["labels"])
            loss = model(**to_device(batch, device)).loss.item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"The loss of batch {number} of {data.source} is {loss}. Check the weights.")
            total += loss * count
            tokens += count
    mean = total / tokens
    # exp overflows a float above 709: such a model is as bad as infinity says.
    return Evaluation(mean, math.exp(mean) if mean < 700 else math.inf, tokens)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters to train, by name.

    Raises:
        ValueError: there are none, or the model is one that averages gradients itself.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "The model is wrapped in DistributedDataParallel, but train adds the gradients of all processes up itself; "
            "pass model.module."
        )
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError("No parameter of the model requires grad, so there is nothing to train.")
    if any(is_sharded(parameter) for parameter in parameters.values()):
        raise ValueError(
            "The model is sharded by fully_shard, but train needs a whole copy of it in each process; pass the model "
            "before fully_shard, or write the loop yourself (examples/train_distributed.py)."
        )
    return parameters


def _share(data: TokenDataset, order: ShuffledOrder, step: int, accumulate: int) -> tuple[list[dict[str, Tensor]], int]:
    """This process's batches of a step, and the number of label tokens in those of all processes."""
    every = range(step * accumulate * process_count(), (step + 1) * accumulate * process_count())
    indices = [order.indices(number) for number in every]
    mine = [data.batch(chosen) for chosen in indices[process_rank() :: process_count()]]
    return mine, sum(count_loss_tokens(data.examples[index][1]) for chosen in indices for index in chosen)


def _accumulate(
    model: nn.Module, batches: list[dict[str, Tensor]], total: int, step: int, device: torch.device
) -> float:
    """Backward through this process's batches, each weighted by its part of the step's ``total`` label tokens.

    Returns:
        Their part of the step's mean loss.
    """
    part = 0.0
    for batch in batches:
        loss = model(**to_device(batch, device)).loss
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The loss is {value} at step {step}; training stopped before that step. Use a lower learning rate, or "
                "check the data and the model."
            )
        share = count_loss_tokens(batch["labels"]) / total
        (loss if share == 1 else loss * share).backward()
        part += value * share
    return part


def _clip(parameters: list[nn.Parameter], max_norm: float | None, step: int) -> float:
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"The gradient's norm is {norm} at step {step}; training stopped before that step. Use a lower learning "
            "rate, or a dtype of larger range."
        )
    return norm


def _seed(seed: int, device: torch.device) -> None:
    # Not torch.manual_seed: it would also seed devices whose state is not kept here.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _snapshot(
    step: int,
    settings: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    device: torch.device,
) -> Checkpoint:
    return Checkpoint(
        step=step,
        settings=settings,
        parameters={name: parameter.detach().cpu() for name, parameter in parameters.items()},
        optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict(),
        cpu_rng=gathered(torch.get_rng_state()),
        cuda_rng=gathered(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    )


def _restore(
    checkpoint: Checkpoint,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    device: torch.device,
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.parameters[name])
    optimizer.load_state_dict(checkpoint.optimizer)
    scheduler.load_state_dict(checkpoint.scheduler)
    rank = process_rank()
    torch.set_rng_state(checkpoint.cpu_rng[rank].clone())  # a copy: torch 2.13 dies of a view into a larger tensor
    if checkpoint.cuda_rng is not None and device.type == "cuda":
        torch.cuda.set_rng_state(checkpoint.cuda_rng[rank].clone(), device)
