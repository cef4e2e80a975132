# SPDX-License-Identifier: Apache-2.0
# Converted tiny Llamas in training by a method: and one linear in float64: shared by the tests of this folder.
"""Runs of every method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lors_cuda import LoRSConfig, estimate_gradients, get_lors_model
from lors_cuda.methods import get_method
from models import batch, logits, prune_two_of_four, tiny_llama
from trainer_runs import STEPS, checkpoint, losses, make_trainer

OPTIONS = {
    "sora": {"threshold": 0.05},
    "rm-lora": {"active": 2, "interval": 2},
    "lora-mini": {"a": 6, "b": 5},
    "gelora": {"points": 100},
    "xgblora": {"steps_per_booster": 3},
    "geolora": {"cycle": 3, "tolerance": 0.3},
    "flat-lora": {"sigma": 0.3, "refresh": 2},
}


VARIANTS = {"mora-rotation": {"type": "rotation"}, "lora-mini-gradient": {"a": 6, "b": 5, "aux": "gradient"}}


def method_of(name):
    if "lora-rite" in name:
        pytest.importorskip("pytorch_optimizer")
    if name in VARIANTS:
        return get_method(name.rpartition("-")[0], **VARIANTS[name])
    options = {key: value for each in name.split("+") for key, value in OPTIONS.get(each, {}).items()}
    return get_method(name, **options)


def batches(count=60):
    return [batch(seed) for seed in range(count)]


def made(name, *, layout="2:4", dtype=torch.float32, seed=0, **fields):
    """A converted model and its run."""
    method = method_of(name)
    model = tiny_llama(dtype=dtype)
    config = LoRSConfig(**{"r": 4, "lora_alpha": 8, "layout": layout, "gradient": method.gradient, **fields})
    gradients = estimate_gradients(model, batches(2), config=config) if method.needs_gradients else None
    model = get_lors_model(model, method.configure(config, model, batches()))
    return model.train(), method.start(model, steps=20, seed=seed, gradients=gradients)


def fresh(name, dtype=torch.float32):
    """A sparse model into which an adapter of the method can be loaded."""
    model = tiny_llama(dtype=dtype)
    if name == "sherl":
        method_of(name).attach(model)
    return model


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


def net(shape=(24, 20), r=6, seed=0, **fields):
    """One sparse linear in float64, with an adapter."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64))
    prune_two_of_four(model)
    return get_lors_model(model, LoRSConfig(**{"r": r, "lora_alpha": 9, "gradient": "exact", **fields}))


def step(model, run, optimizer, seed=0):
    width = model[0].in_features
    x = torch.randn(32, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
