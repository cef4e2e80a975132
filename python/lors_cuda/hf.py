# SPDX-License-Identifier: Apache-2.0
# For transformers.Trainer, TRL's trainers and accelerate: small, atomic checkpoints; a loss that is not finite stops;
# the callback of sparsity_callback.py. `import lors_cuda` imports neither file, because they need transformers.
"""Training with Hugging Face's trainers: masks checked on the way, checkpoints that are small and complete."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._distributed import from_first, summed, together
from ._files import damage, explained, move_directory, new_files, remove_directory, seal
from .adapter_directory import CONFIG_NAME
from .checkpoint import load_adapter, save_adapter
from .model import named_lors_layers, running_method
from .sparse_linear import SparseLayer
from .targets import has_peft_adapters

try:
    from .sparsity_callback import SparsityCallback
except ImportError as error:
    raise ImportError(
        "lors_cuda.hf needs transformers, which could not be imported. Install it with `pip install 'lors-cuda[hf]'`."
    ) from error

_ADAPTER_FOLDER = "adapter"
STAGING_NAME = ".incomplete"  # in the output directory: a checkpoint that is being written
_STATE_NAME = "trainer_state.json"


class LoRSTrainerMixin:
    """Makes a Trainer's checkpoints adapter directories that are complete or not there, and stops what diverges.

    ``class AdapterTrainer(LoRSTrainerMixin, Trainer): pass``; TRL's trainers likewise. ``save_model`` and the
    checkpoints then hold the adapters and ``modules_to_save`` instead of the whole model, as
    :func:`lors_cuda.save_adapter` writes them, and ``resume_from_checkpoint`` and ``load_best_model_at_end`` load them
    with the checks of :func:`lors_cuda.load_adapter`: another base mask, rank or target is refused. A whole-model
    checkpoint, written without the mixin, is resumed as the Trainer does it.

    A checkpoint is written to ``.incomplete``, listed with checksums, and renamed; only then are older ones deleted. So
    a kill or a full disk at any moment leaves the one before usable. ``resume_from_checkpoint=True`` takes the newest
    complete one and warns of every other (:func:`last_checkpoint`).

    A loss or gradient that is not finite raises FloatingPointError before the optimizer's step, in all processes
    alike. (Not the gradient where float16's scaler skips such steps, nor where FSDP or DeepSpeed shard it.)

    Under FSDP and DeepSpeed the Trainer's own, whole checkpoints stay: each process holds a part there. So do its
    checkpoints of models of lors_cuda.peft, which hold the adapters alone already. They are written in the same way.
    """

    _staging: Path | None = None  # where a checkpoint is being written
    _step_loss: Tensor | None = None  # of the batches of a step so far

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        with together():
            if resume_from_checkpoint is True:
                resume_from_checkpoint = _required(last_checkpoint(trainer.args.output_dir), trainer.args.output_dir)
            elif resume_from_checkpoint:
                problem = _incomplete(Path(resume_from_checkpoint))
                if problem is not None:
                    raise ValueError(f"The checkpoint '{resume_from_checkpoint}' is incomplete: {problem}. {_ANOTHER}")
        return super().train(from_first(resume_from_checkpoint), *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        trainer: Any = self
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if trainer.accelerator.sync_gradients:  # that was the last batch before the optimizer's step
            step_loss, self._step_loss = self._step_loss, None
            _check_finite(trainer, step_loss)
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        directory = Path(trainer._get_output_dir(trial=trial))
        name = f"checkpoint-{trainer.state.global_step}"
        staging, final = directory / STAGING_NAME, directory / name
        writes = trainer.args.should_save
        # A sharded save is a collective, which the others would wait for; there a process that fails ends by itself.
        agreeing = contextlib.nullcontext() if _is_sharded(trainer) else together()
        self._staging = staging
        try:
            with together(), explained(final):
                if writes:
                    remove_directory(staging)
                    staging.mkdir(parents=True)
            with agreeing, explained(final):
                super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]
            with together():  # every process has written its part
                pass
            with together(), explained(final):
                if writes:
                    best = trainer.state.best_model_checkpoint
                    if best is not None and Path(best).parent == staging:
                        trainer.state.best_model_checkpoint = str(directory / Path(best).name)
                        trainer.state.save_to_json(str(staging / name / _STATE_NAME))
                    seal(staging / name)
                    move_directory(staging / name, final, replace=True)
        finally:
            self._staging = None
            if writes:
                remove_directory(staging)
        if trainer.args.push_to_hub:
            trainer._push_from_checkpoint(str(final))
        if writes:
            _rotate(trainer, directory)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial=trial) if self._staging is None else str(self._staging)  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        trainer: Any = self
        directory = Path(output_dir if output_dir is not None else trainer.args.output_dir)
        if _is_sharded(trainer):
            with explained(directory):
                super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        # In a checkpoint all processes come here, and the Trainer may wait for them all right after it.
        with contextlib.nullcontext() if self._staging is None else together():
            if _is_peft(trainer):
                with new_files(directory) as temporary:
                    super()._save(str(temporary), state_dict)  # type: ignore[misc]
                    run = running_method(trainer.model)
                    if run is not None and trainer.args.should_save:
                        run.save(temporary)
            elif trainer.args.should_save:
                with new_files(directory) as temporary:
                    _save_adapter(trainer, temporary)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = self
        run = None if _is_sharded(trainer) else running_method(trainer.model)
        if run is not None and _is_peft(trainer):
            run.load(resume_from_checkpoint)
            return
        if _saves_by_itself(trainer) or not _is_adapter(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        load_adapter(trainer.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        trainer: Any = self
        best = trainer.state.best_model_checkpoint
        if _saves_by_itself(trainer) or not _is_adapter(best):
            super()._load_best_model()  # type: ignore[misc]
            return
        load_adapter(trainer.model, best)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, SparsityCallback):
                logs.update(callback.take_metrics())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


_ANOTHER = "Resume from another checkpoint, or start again."


def last_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a Trainer's output directory; None if there is none.

    One that is incomplete is skipped with a warning (UserWarning) that names it. A checkpoint that was written without
    the mixin counts as complete if its trainer_state.json is, which the Trainer writes last.
    """
    folder = Path(directory)
    numbers = {int(found[1]): path for path in folder.glob("checkpoint-*") if (found := _NAME.fullmatch(path.name))}
    skipped = [f"'{path}' was being written when the run ended" for path in folder.glob(f"{STAGING_NAME}/checkpoint-*")]
    newest = None
    for number in sorted(numbers, reverse=True):
        problem = _incomplete(numbers[number])
        if problem is None:
            newest = numbers[number]
            break
        skipped.append(f"'{numbers[number]}' is incomplete: {problem}")
    for text in skipped:
        warnings.warn(f"{text}; it is skipped.", UserWarning, stacklevel=2)
    return newest


_NAME = re.compile(r"checkpoint-(\d+)")


def _incomplete(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, as a part of a sentence; None if it is complete."""
    try:
        step = json.loads((checkpoint / _STATE_NAME).read_bytes())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {_STATE_NAME} is missing or cut short"
    return damage(checkpoint) if isinstance(step, int) else f"its {_STATE_NAME} has no step"


def _required(checkpoint: Path | None, directory: str) -> str:
    if checkpoint is None:
        raise ValueError(f"There is no complete checkpoint in '{directory}' to resume from; start without resuming.")
    return str(checkpoint)


def _check_finite(trainer: Any, loss: Tensor) -> None:
    """Raise FloatingPointError in every process if the step's loss, or its gradient, is not finite in any."""
    gradients = []
    if trainer.accelerator.scaler is None and not _is_sharded(trainer):
        gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    # Not finite in one process, not finite in the sum of all.
    values = summed(torch.stack([loss.detach().double(), norm.to(loss.device).double()])).tolist()
    step = f"at step {trainer.state.global_step + 1}; training stopped before that step. Use a lower learning rate, or"
    if not math.isfinite(values[0]):
        raise FloatingPointError(f"The loss is {values[0]} {step} check the data and the model.")
    if not math.isfinite(values[1]):
        raise FloatingPointError(f"The gradient's norm is {values[1]} {step} a dtype of larger range.")


def _rotate(trainer: Any, directory: Path) -> None:
    """Delete older checkpoints than ``save_total_limit`` allows, as the Trainer does, whose own call saw none."""
    if hasattr(trainer, "_rotate_checkpoints"):  # transformers 5.0
        trainer._rotate_checkpoints(use_mtime=True, output_dir=str(directory))
        return
    from transformers.trainer_utils import rotate_checkpoints

    rotate_checkpoints(
        output_dir=str(directory),
        save_total_limit=trainer.args.save_total_limit,
        best_model_checkpoint=trainer.state.best_model_checkpoint,
        use_mtime=True,
    )


def _save_adapter(trainer: Any, directory: Path) -> None:
    save_adapter(trainer.model, directory)
    tokenizer = trainer.processing_class
    if tokenizer is None:
        tokenizer = getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    torch.save(trainer.args, directory / "training_args.bin")


def _is_sharded(trainer: Any) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _is_peft(trainer: Any) -> bool:
    return any(isinstance(m, SparseLayer) and m.storage is not m for m in trainer.model.modules())


def _saves_by_itself(trainer: Any) -> bool:
    """Whether checkpoints are the Trainer's own: sharded ones, or those of PEFT."""
    return _is_sharded(trainer) or _is_peft(trainer)


def _is_adapter(directory: str | os.PathLike[str]) -> bool:
    return (Path(directory) / CONFIG_NAME).is_file()


def save_adapters_only(accelerator: Any) -> None:
    """Make ``accelerator.save_state`` write an adapter directory, ``adapter/``, instead of the converted model.

    ``load_state`` then loads it into the model, with the checks of :func:`lors_cuda.load_adapter`. Optimizer,
    scheduler, random state and other models are as without it. Call it once, on an ``accelerate.Accelerator``.

    Raises:
        ValueError: the accelerator uses FSDP or DeepSpeed, whose checkpoints are made of each process's part; at
            ``save_state`` and ``load_state``: not exactly one of the prepared models has LoRS layers.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED"):
        raise ValueError(
            f"The accelerator uses {kind}, which saves each process's part of the model by itself. Keep its own "
            "save_state there, and save the adapter from the gathered model after training."
        )

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], directory: str) -> None:
        index = _only_converted(models)
        weights.pop(index)
        if accelerator.is_main_process:
            save_adapter(models[index], Path(directory) / _ADAPTER_FOLDER)

    def load(models: list[nn.Module], directory: str) -> None:
        load_adapter(models.pop(_only_converted(models)), Path(directory) / _ADAPTER_FOLDER)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _only_converted(models: list[nn.Module]) -> int:
    converted = [index for index, model in enumerate(models) if any(named_lors_layers(model))]
    if not converted and any(map(has_peft_adapters, models)):
        raise ValueError(
            "The prepared model is a PEFT model, whose checkpoints are PEFT's: call model.save_pretrained(directory) "
            "beside accelerator.save_state, and leave save_adapters_only out."
        )
    if len(converted) != 1:
        raise ValueError(
            f"{len(converted)} of the {len(models)} prepared models have LoRS layers, and save_adapters_only has a "
            "place for one. Save the others with lors_cuda.save_adapter yourself."
        )
    return converted[0]
