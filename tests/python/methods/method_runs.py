# SPDX-License-Identifier: Apache-2.0
# Converted tiny Llamas in training by a method: shared by test_contract.py and test_methods_peft.py.
"""Runs of every method."""

from __future__ import annotations

import pytest
import torch

from lors_cuda import LoRSConfig, get_lors_model
from lors_cuda.methods import get_method
from models import batch, logits, tiny_llama
from trainer_runs import STEPS, checkpoint, losses, make_trainer

OPTIONS = {
    "sora": {"threshold": 0.05},
    "rm-lora": {"active": 2, "interval": 2},
    "lora-mini": {"a": 6, "b": 5},
    "gelora": {"points": 100},
    "flat-lora": {"sigma": 0.3, "refresh": 2},
}


def method_of(name):
    if "lora-rite" in name:
        pytest.importorskip("pytorch_optimizer")
    options = {key: value for each in name.split("+") for key, value in OPTIONS.get(each, {}).items()}
    return get_method(name, **options)


def batches(count=60):
    return [batch(seed) for seed in range(count)]


def made(name, *, layout="2:4", dtype=torch.float32, seed=0, **fields):
    """A converted model and its run."""
    method = method_of(name)
    model = tiny_llama(dtype=dtype)
    config = LoRSConfig(r=4, lora_alpha=8, layout=layout, gradient=method.gradient, **fields)
    model = get_lors_model(model, method.configure(config, model, batches()))
    return model.train(), method.start(model, steps=20, seed=seed)


def train(model, run, steps, first=0, optimizer=None, accumulate=1):
    optimizer = run.optimizer(lr=1e-2) if optimizer is None else optimizer
    found = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            data = batch(step)
            rows = {key: value.chunk(accumulate)[part] for key, value in data.items()}
            loss = model(**rows).loss / accumulate
            loss.backward()
        found.append(loss.item())
        optimizer.step()
    return found


def check_a_resumed_trainer(tmp_path, made, name):
    """Train with a checkpoint on the way, and again from there."""

    def trainer():
        model, run = made(name)
        one = make_trainer(tmp_path, model=model)
        one.optimizer = run.optimizer(lr=1e-2)
        return one, run

    first, run = trainer()
    first.train()
    assert run.step == STEPS
    again, other = trainer()
    again.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    assert other.step == STEPS
    assert losses(again)[-3:] == losses(first)[-3:]
    run.finish()
    other.finish()
    assert torch.equal(logits(again.model), logits(first.model))
