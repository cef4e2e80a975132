# SPDX-License-Identifier: Apache-2.0
# How finetune and the demo train: transformers' Trainer with our mixin, arguments of few options, callbacks that write
# training.jsonl and report. The log of a run is the Trainer's own (trainer_state.json); training.jsonl is a view of it.
"""transformers' Trainer for the command line."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._batches import Progress
from .._distributed import launched
from .._files import not_written, replace_file
from ..data import TokenDataset, count_loss_tokens
from ..evaluation import evaluate
from ..hf import LoRSTrainerMixin
from ._run_directory import default_warmup


def arguments(
    directory: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    schedule: str = "cosine",
    warmup_steps: int | None = None,
    **more: Any,
) -> TrainingArguments:
    """TrainingArguments of a run that logs every step; ``warmup_steps`` None: `default_warmup`."""
    # Since 5.20 or so; the older name goes with version 6.
    checkpointing = more.pop("gradient_checkpointing", False)
    if checkpointing:
        newer = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
        more["activation_checkpointing" if newer else "gradient_checkpointing"] = True
    made = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine" if schedule == "cosine" else "constant_with_warmup",
        warmup_steps=default_warmup(steps) if warmup_steps is None else warmup_steps,
        seed=seed % 2**32,  # numpy takes no more
        logging_steps=1,
        logging_nan_inf_filter=False,  # the mixin stops instead
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        log_level="error",
        ddp_backend="gloo" if device.type == "cpu" and launched() else None,
        **{"report_to": "none", **more},
    )
    made._n_gpu = min(made.n_gpu, 1)  # one process, one GPU: never nn.DataParallel
    return made


class CommandTrainer(LoRSTrainerMixin, Trainer):
    """A Trainer on a TokenDataset whose log has the tokens and seconds of a step, and perplexity by tokens."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data: TokenDataset,
        eval_data: TokenDataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        # Else DistributedDataParallel searches in every step, finds nothing in a dense model, and says so.
        fields = getattr(model, "config", None)
        args.ddp_find_unused_parameters = fields is not None and any("expert" in name for name in fields.to_dict())
        super().__init__(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=eval_data,
            data_collator=data.collate,
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
        self.remove_callback(PrinterCallback)
        if not self.model_accepts_loss_kwargs and args.gradient_accumulation_steps * args.world_size > 1:
            raise ValueError(
                f"{type(model).__name__} cannot normalise its loss over the tokens of several batches (its forward "
                "takes no num_items_in_batch). Train it in one process without --accumulate."
            )
        self._eval_data = eval_data
        self._began, self._tokens = time.perf_counter(), 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's cosine or constant rate, but with a warmup whose first step trains too."""
        if self.lr_scheduler is None:
            warmup, constant = int(self.args.warmup_steps), self.args.lr_scheduler_type != "cosine"

            def factor(step: int) -> float:
                if step < warmup:
                    return (step + 1) / (warmup + 1)
                if constant:
                    return 1.0
                return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_training_steps - warmup)))

            scheduled: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(scheduled, factor)
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR):
            # The optimizer's rate for the next step is of the schedule that was saved; this one may have more steps.
            scheduled = self.lr_scheduler
            pairs = zip(scheduled.base_lrs, scheduled.lr_lambdas, strict=True)
            scheduled._last_lr = [base * factor(scheduled.last_epoch) for base, factor in pairs]  # what is logged
            for group, rate in zip(scheduled.optimizer.param_groups, scheduled._last_lr, strict=True):
                group["lr"] = rate

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], Any]:
        self._began = time.perf_counter()
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        self._tokens = sum(count_loss_tokens(b["labels"]) for b in batches) if tokens is None else int(tokens)
        return batches, tokens

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {"tokens": self._tokens, "seconds": time.perf_counter() - self._began}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """As `lors-cuda eval` measures; the Trainer's own mean is over batches, whatever their tokens."""
        assert self._eval_data is not None  # eval_strategy is "no" without
        measured = evaluate(self.model_wrapped, self._eval_data, batch_size=self.args.eval_batch_size, progress=False)
        metrics = {f"{metric_key_prefix}_{key}": getattr(measured, key) for key in ("loss", "perplexity")}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def steps_of(state: TrainerState) -> list[dict[str, Any]]:
    """One entry per step that was trained: step (from 1), loss, lr, grad_norm, tokens, seconds."""
    return [entry for entry in map(_entry, state.log_history) if "loss" in entry]


class StepLog(TrainerCallback):
    """Keeps ``training.jsonl``: a line for each step and each evaluation.

    At the start it is written from the checkpoint's log, so that what a killed run logged after it is gone. Every
    line reaches the operating system at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            replace_file(self._path, "".join(map(_line, state.log_history)).encode())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(_line(state.log_history[-1]))
            except OSError as error:
                raise not_written(self._path, error, error.errno) from error


class Report(TrainerCallback):
    """Shows a bar on a terminal, else calls ``each`` with every step's entry and every evaluation's."""

    def __init__(self, *, bar: bool = False, each: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._shown, self._each = bar, each
        self._bar: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        steps = state.max_steps - state.global_step
        shown = self._shown and state.is_world_process_zero
        self._bar = Progress(steps, description="training", unit="step", shown=shown)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        entry = _entry(state.log_history[-1])
        if self._bar is not None and "loss" in entry:
            self._bar.advance(f"loss {entry['loss']:.3f}")
        if self._each is not None and state.is_world_process_zero and len(entry) > 1:
            self._each(entry)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


_NAMES = {"learning_rate": "lr", **{name: name for name in ("loss", "grad_norm", "tokens", "seconds")}}
_NAMES |= {name: name for name in ("eval_loss", "eval_perplexity", "sparsity", "expert_sparsity", "model_sparsity")}


def _entry(logged: dict[str, Any]) -> dict[str, Any]:
    """Of an entry of the Trainer's log, what training.jsonl has; the step alone for its summary at the end."""
    return {"step": logged["step"], **{_NAMES[name]: value for name, value in logged.items() if name in _NAMES}}


def _line(logged: dict[str, Any]) -> str:
    entry = _entry(logged)
    return json.dumps(entry) + "\n" if len(entry) > 1 else ""


def plot_loss(entries: list[dict[str, Any]], path: Path, *, title: str = "LoRS fine-tuning") -> None:
    """Draw the loss of every step and its running mean into a PNG file; needs matplotlib.

    Raises:
        OSError: the file could not be written.
    """
    # Without pyplot: no display is asked for and no figure stays alive.
    from matplotlib.figure import Figure

    steps, losses = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    window = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    axes.plot(steps, means, color="tab:blue", linewidth=2, label=f"mean of the last {window}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    replace_file(path, buffer.getvalue())
