# SPDX-License-Identifier: Apache-2.0
"""The adapter methods in two processes: the same training as in one, and every draw alike."""

from __future__ import annotations

import contextlib
import copy
import importlib.util

import pytest
import torch
from distributed_cases import STEPS, batch_of, train_shared
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lors_cuda import LoRSConfig, get_lors_model, load_adapter, named_lors_layers, save_adapter
from lors_cuda._distributed import whole
from lors_cuda.methods import get_method
from models import logits, refused, tiny_llama

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


def started(name, dtype=torch.float32, **fields):
    options = {key: value for each in name.split("+") for key, value in METHODS.get(each, {}).items()}
    method = get_method(name, **options)
    model = tiny_llama(dtype=dtype)
    config = method.configure(LoRSConfig(r=3, lora_alpha=6, gradient=method.gradient, **fields), model)
    model = get_lors_model(model, config)
    return model.train(), method.start(model, steps=STEPS)


def shared(model, sharded):
    if not sharded:
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


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
    wrapped = shared(model, sharded)
    train_shared(wrapped, rank, optimizer=run.optimizer(RATE))
    for key, tensor in trained(run).items():
        # AdamW divides by the gradient's size: where that is rounding alone, a step is any number up to the rate.
        error = (whole(tensor) - expected[key]).double().norm() / expected[key].double().norm().clamp_min(1e-6)
        assert float(error) < 1e-3, (key, float(error))


@pytest.mark.parametrize("name", METHODS)
def test_ddp_trains_as_one_process(pair, name):
    pair.run(train_two, name, False)


PLAIN = ["sora", "lora-mini", "mora", "flat-lora", "rm-lora", "xgblora", "sherl"]
SHARDED = [*PLAIN, "mora+flat-lora", "lora-mini+rm-lora"]


@pytest.mark.parametrize("name", SHARDED)
def test_fully_shard_trains_as_one_process(pair, name):
    pair.run(train_two, name, True)


def needs_whole_factors(rank):
    for name, shown in (("geolora", "GeoLoRA"), ("lora-rite", "LoRA-RITE")):
        if name == "lora-rite" and importlib.util.find_spec("pytorch_optimizer") is None:
            continue
        model, run = started(name)
        early = run.optimizer(RATE)
        fully_shard(model)
        refused(ValueError, early.step, "other parameters than the optimizer", "Make it afterwards")
        model, run = started(name)
        fully_shard(model)
        refused(ValueError, lambda run=run: run.optimizer(RATE), shown, "fully_shard")
    with pytest.raises(ValueError, match="start the method before fully_shard"):
        get_method("sora").start(fully_shard(get_lors_model(tiny_llama(), LoRSConfig(r=3))))
    assert torch.distributed.get_rank() == rank


def test_what_needs_whole_factors_is_refused(pair):
    pair.run(needs_whole_factors)


def goes_on(rank, name, sharded, directory):
    model, run = started(name)
    wrapped = shared(model, sharded)
    optimizer = run.optimizer(RATE)
    train_shared(wrapped, rank, 2, optimizer)
    if sharded or rank == 0:
        save_adapter(model, directory)
    torch.distributed.barrier()
    moments = copy.deepcopy(optimizer.state_dict())
    saved = {key: whole(tensor).clone() for key, tensor in trained(run).items()}
    rest = train_shared(wrapped, rank, 2, optimizer, first=2)
    again, other = started(name)
    wrapped = shared(again, sharded)
    load_adapter(again, directory)
    assert other.step == 2
    resumed = other.optimizer(RATE)
    resumed.load_state_dict(moments)
    assert train_shared(wrapped, rank, 2, resumed, first=2) == rest
    own, same = trained(run), trained(other)
    assert own.keys() == same.keys()
    for key, tensor in own.items():
        assert torch.equal(whole(tensor), whole(same[key])), key
    if sharded and any(pair.is_parametrised(which) for pair in run.pairs for which in ("lora_A", "lora_B")):
        refused(ValueError, run.finish, "fully_shard", "save_adapter")
        save_adapter(model, f"{directory}-end")
    else:
        run.finish()
        if sharded or rank == 0:
            save_adapter(model, f"{directory}-end")
    return saved, logits_of(wrapped if sharded else again)


def logits_of(model):
    model.eval()
    return logits(model)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fully_shard"])
@pytest.mark.parametrize("name", SHARDED)
def test_a_checkpoint_goes_on_bit_for_bit(pair, tmp_path, name, sharded):
    (state, running), _ = pair.run(goes_on, name, sharded, str(tmp_path / "adapter"))
    # What was written is an adapter for one process, without the method, and a checkpoint of it with the method.
    plain = tiny_llama()
    if name == "sherl":
        get_method(name, **METHODS[name]).attach(plain)
    torch.testing.assert_close(logits_of(load_adapter(plain, tmp_path / "adapter-end")), running)
    model, run = started(name)
    load_adapter(model, tmp_path / "adapter")
    assert run.step == 2
    found = trained(run)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def bits_of_every_forward(rank, name, sharded, accumulate, directory):
    """Merged weights in each forward, and losses; a second run goes on from a checkpoint after two steps."""

    def begin():
        model, run = started(name, torch.bfloat16, rounding="stochastic")
        seen = []
        _, layer = next(named_lors_layers(model))
        layer.register_forward_hook(lambda *_: seen.append(layer._merged(layer.draws(training=True)).detach().clone()))
        return shared(model, sharded), model, run, seen

    def train(wrapped, optimizer, first):
        losses = []
        for step in range(first, first + 2):
            for part in range(accumulate):
                last = part == accumulate - 1
                if sharded:
                    wrapped.set_requires_gradient_sync(last)
                with contextlib.nullcontext() if last or sharded else wrapped.no_sync():
                    loss = wrapped(**batch_of(step + part, rank)).loss
                    loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    wrapped, model, run, seen = begin()
    optimizer = run.optimizer(RATE)
    losses = train(wrapped, optimizer, 0)
    if sharded or rank == 0:
        save_adapter(model, directory)
    torch.distributed.barrier()
    moments = copy.deepcopy(optimizer.state_dict())
    rest = train(wrapped, optimizer, 2)
    again, other_model, other, seen_again = begin()
    load_adapter(other_model, directory)
    resumed = other.optimizer(RATE)
    resumed.load_state_dict(moments)
    assert train(again, resumed, 2) == rest
    assert all(torch.equal(a, b) for a, b in zip(seen[2 * accumulate :], seen_again, strict=True))
    assert losses
    return [bits.view(torch.int16) for bits in seen]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fully_shard"])
@pytest.mark.parametrize("name", ["lors", "flat-lora", "sora"])
def test_every_process_draws_the_same_bits_once_a_step(pair, tmp_path, name, sharded, accumulate):
    one, two = pair.run(bits_of_every_forward, name, sharded, accumulate, str(tmp_path / "adapter"))
    assert len(one) == 4 * accumulate
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for step in range(4):
        assert all(torch.equal(one[step * accumulate], bits) for bits in one[step * accumulate :][:accumulate])
    assert all(not torch.equal(one[step * accumulate], one[(step + 1) * accumulate]) for step in range(3))
    # The draws are those of one process: before anything has moved the weights are the same bits.
    model, _ = started(name, torch.bfloat16, rounding="stochastic")
    _, layer = next(named_lors_layers(model))
    assert torch.equal(layer._merged(layer.draws(training=True)).detach().view(torch.int16), one[0])
