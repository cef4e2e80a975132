# SPDX-License-Identifier: Apache-2.0
"""The adapter methods in two processes: the same training as in one, and every draw alike."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import STEPS, batch_of, train_shared
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lors_cuda import LoRSConfig, get_lors_model
from lors_cuda._distributed import whole
from lors_cuda.methods import get_method
from models import tiny_llama

pytest_plugins = ["pair"]

METHODS = {
    "sora": {"threshold": 0.01},
    "rm-lora": {"active": 2, "interval": 2},
    "lora-mini": {"a": 6, "b": 6},
    "mora": {},
    "xgblora": {"steps_per_booster": 2, "layers": 0.5},
    "geolora": {"cycle": 1, "max_rank": 4},
    "sherl": {"late": 1},
    "flat-lora": {"sigma": 0.3},
}
RATE = 2e-2


def started(name):
    method = get_method(name, **METHODS[name])
    model = tiny_llama()
    config = method.configure(LoRSConfig(r=3, lora_alpha=6, gradient=method.gradient), model)
    model = get_lors_model(model, config)
    return model.train(), method.start(model, steps=STEPS)


def alone(name):
    """The state after training on the batches of both processes."""
    model, run = started(name)
    optimizer = run.optimizer(RATE)
    for step in range(STEPS):
        loss = (model(**batch_of(step, 0)).loss + model(**batch_of(step, 1)).loss) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained(run)


def trained(run):
    """What the method keeps, and what it trains beside the adapters."""
    beside = {name: p.detach() for name, p in run.model.named_parameters() if name.startswith("side_network.")}
    return {**run.state_dict()["tensors"], **beside}


def train_two(rank, name, sharded):
    expected = alone(name)
    model, run = started(name)
    if sharded:
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    train_shared(wrapped, rank, optimizer=run.optimizer(RATE))
    for key, tensor in trained(run).items():
        # AdamW divides by the gradient's size: where that is rounding alone, a step is any number up to the rate.
        error = (whole(tensor) - expected[key]).double().norm() / expected[key].double().norm().clamp_min(1e-6)
        assert float(error) < 1e-3, (key, float(error))


@pytest.mark.parametrize("name", METHODS)
def test_ddp_trains_as_one_process(pair, name):
    pair.run(train_two, name, False)


@pytest.mark.parametrize("name", ["sora", "lora-mini", "mora", "flat-lora"])
def test_fully_shard_trains_as_one_process(pair, name):
    pair.run(train_two, name, True)


def needs_whole_factors(rank):
    for name, shown in (("rm-lora", "RM-LoRA"), ("xgblora", "XGBLoRA"), ("geolora", "GeoLoRA")):
        model, run = started(name)
        wrapped = fully_shard(model)
        with pytest.raises(ValueError, match=f"{shown}.*fully_shard"):
            train_shared(wrapped, rank, optimizer=run.optimizer(RATE))
    with pytest.raises(ValueError, match="start the method before fully_shard"):
        get_method("sora").start(fully_shard(get_lors_model(tiny_llama(), LoRSConfig(r=3))))
    assert torch.distributed.get_rank() == rank


def test_what_needs_whole_factors_is_refused(pair):
    pair.run(needs_whole_factors)
