# SPDX-License-Identifier: Apache-2.0
# Short runs of transformers.Trainer on the converted tiny Llama: shared by the Trainer's and the callback's tests.
"""Trainers for tests: the same model, data and seed whenever one is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lors_cuda import LoRSConfig, get_lors_model
from models import tiny_llama, tokens

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lors_cuda.hf import LoRSTrainerMixin  # noqa: E402  (it needs transformers)

STEPS = 6


class AdapterTrainer(LoRSTrainerMixin, transformers.Trainer):
    """What the documentation tells users to write."""


def converted(seed: int = 0, **fields: Any) -> nn.Module:
    return get_lors_model(tiny_llama(seed), LoRSConfig(**{"r": 4, "lora_alpha": 8, **fields}))


def dataset(count: int = 24) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in tokens(1, batch=count)]


def make_trainer(
    directory: Path,
    *,
    model: nn.Module | None = None,
    kind: type = AdapterTrainer,
    callbacks: list[Any] | None = None,
    **arguments: Any,
) -> Any:
    """A Trainer of 6 steps of 2 x 2 sequences, which logs every step and saves after the third."""
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return kind(
        model=converted() if model is None else model,
        args=transformers.TrainingArguments(output_dir=str(directory), **{**defaults, **arguments}),
        train_dataset=dataset(),
        eval_dataset=dataset(4),
        callbacks=callbacks,
    )


def losses(trainer: Any) -> list[float]:
    """The training loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def checkpoint(directory: Path, step: int = 3) -> Path:
    return directory / f"checkpoint-{step}"
