# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer on a converted model: completions only, resuming, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_state import own_accelerate  # noqa: F401  (a fixture)
from byte_model import byte_llama, byte_tokenizer
from lors_cuda import LoRSConfig, get_lors_model, load_adapter, merge_and_unload, named_lors_layers
from models import prune_two_of_four

trl = pytest.importorskip("trl", reason="trl is not installed (pip install -r requirements-dev.txt)")
datasets = pytest.importorskip("datasets")

from lors_cuda.hf import LoRSTrainerMixin, SparsityCallback  # noqa: E402  (it needs transformers)

STEPS = 6


class AdapterSFTTrainer(LoRSTrainerMixin, trl.SFTTrainer):
    """What the documentation tells users to write."""


def base() -> nn.Module:
    return prune_two_of_four(byte_llama())


def make_trainer(directory: Path, **arguments: Any) -> AdapterSFTTrainer:
    records = [{"prompt": f"{n} bottles", "completion": f" of beer on the wall, {n}"} for n in range(24)]
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_length": 64,
        "logging_steps": 1,
        "save_steps": 3,
        "bf16": True,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return AdapterSFTTrainer(
        model=get_lors_model(base(), LoRSConfig(r=4, lora_alpha=8)),
        args=trl.SFTConfig(output_dir=str(directory), **{**defaults, **arguments}),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=byte_tokenizer(),
        callbacks=[SparsityCallback(every=2)],
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_learns_resumes_and_keeps_every_zero(tmp_path):
    first = make_trainer(tmp_path)
    masks = {name: layer.sparse_weight.mask() for name, layer in named_lors_layers(first.model)}
    trained = {name for name, parameter in first.model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{which}" for name in masks for which in ("lora_A", "lora_B")}
    first.train()
    assert losses(first)[-1] < 0.95 * losses(first)[0], losses(first)
    assert [entry["sparsity"] for entry in first.state.log_history if "sparsity" in entry] == [0.5, 0.5, 0.5, 0.5]

    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(first)

    saved = load_adapter(base(), tmp_path / f"checkpoint-{STEPS}")
    for name, layer in named_lors_layers(saved):
        assert torch.equal(layer.lora_B, first.model.get_submodule(name).lora_B), name
    merged = merge_and_unload(saved)
    for name, mask in masks.items():
        assert not merged.get_submodule(name).weight[~mask].any(), name


def test_gradient_checkpointing_in_both_modes_is_the_same_training(tmp_path):
    curves = []
    for options in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        trainer = make_trainer(tmp_path, save_strategy="no", max_steps=3, **options)
        trainer.train()
        curves.append(losses(trainer))
    assert len(curves[0]) == 3
    assert curves[1] == curves[0]
    assert curves[2] == curves[0]
