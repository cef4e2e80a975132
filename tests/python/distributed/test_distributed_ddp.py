# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel: the same training as one process, and nothing sent but the adapters' gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    STEPS,
    assert_close,
    converted,
    every_layout,
    train_alone,
    train_shared,
    trained_values,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from adapter_directories import assert_same_files
from lors_cuda import LoRSConfig, get_lors_model, load_adapter, save_adapter
from models import batch, logits, tiny_llama, tiny_net

pytest_plugins = ["pair"]


def train_two(rank: int, layout: str, dtype: torch.dtype) -> None:
    alone = converted(layout, dtype)
    expected = train_alone(alone)
    model = converted(layout, dtype)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train_shared(DistributedDataParallel(model), rank)
    assert losses == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 4e-3)
    assert expected[2] < 0.99 * expected[0]
    assert expected[3] < 0.99 * expected[1]
    if dtype == torch.float32:
        assert_close(trained_values(model), trained_values(alone))
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value), name


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_that_of_one_process(pair, layout, dtype):
    pair.run(train_two, layout, dtype)


def count_what_is_sent(rank: int, layout: str) -> tuple[int, int, dict[str, int]]:
    model = get_lors_model(tiny_net(), LoRSConfig(r=3, layout=layout, init_lora_weights=False))
    wrapped = DistributedDataParallel(model)
    reduced = []

    def reduce(state, bucket):
        reduced.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, reduce)
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(rank))
    for _ in range(2):  # the second forward lays the buckets out anew and tells the others
        wrapped(inputs).square().mean().backward()
    reduced.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        wrapped(inputs).square().mean().backward()
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith(("gloo:", "c10d::"))}
    return sum(reduced), sum(p.numel() for p in model.parameters() if p.requires_grad), calls


@every_layout
def test_only_the_adapters_gradients_are_sent(pair, layout):
    for reduced, trained, calls in pair.run(count_what_is_sent, layout):
        assert reduced == trained > 0
        assert "gloo:all_reduce" in calls, calls
        assert not any("broadcast" in name or "gather" in name for name in calls), calls


def reduce_gradients(rank: int) -> None:
    model = converted("bitmap")
    wrapped = DistributedDataParallel(model)
    wrapped(**batch(rank)).loss.backward()
    alone = converted("bitmap")
    for number in (0, 1):
        (alone(**batch(number)).loss / 2).backward()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) != p.requires_grad, name
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: name + text)


def test_gradients_are_the_mean_of_both(pair):
    pair.run(reduce_gradients)


def save_one(rank: int, directory: str) -> None:
    model = converted("2:4")
    wrapped = DistributedDataParallel(model)
    train_shared(wrapped, rank, steps=STEPS)
    if rank == 0:
        save_adapter(model, f"{directory}/inner")
        save_adapter(wrapped, f"{directory}/wrapped")
    dist.barrier()
    fresh = DistributedDataParallel(converted("2:4"))
    load_adapter(fresh, f"{directory}/wrapped")
    assert torch.equal(logits(fresh), logits(model))


def test_adapter_is_saved_and_loaded_through_the_wrapper(pair, tmp_path):
    pair.run(save_one, str(tmp_path))
    assert_same_files(tmp_path / "wrapped", tmp_path / "inner")
    alone = load_adapter(tiny_llama(), tmp_path / "wrapped")
    assert any(isinstance(module, nn.Linear) for module in alone.modules())
