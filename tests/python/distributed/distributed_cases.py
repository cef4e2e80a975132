# SPDX-License-Identifier: Apache-2.0
# A converted tiny Llama trained a few steps, in one process on all batches or in each of two on its own: what
# test_distributed_*.py compare. Everything here runs inside a process of the pair.
"""Training that must not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lors_cuda import LoRSConfig, get_lors_model
from models import batch, fill_adapters, tiny_llama

LAYOUTS = ("dense", "2:4", "bitmap")
STEPS = 4

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def converted(layout: str, dtype: torch.dtype = torch.float32, **fields) -> nn.Module:
    """A tiny Llama with adapters of rank 3: two processes cannot divide the rows of lora_A evenly."""
    model = get_lors_model(tiny_llama(dtype=dtype), LoRSConfig(r=3, lora_alpha=6, layout=layout, **fields))
    fill_adapters(model)
    return model.train()


def batch_of(step: int, rank: int) -> dict[str, Tensor]:
    """Each process sees two batches in turn, so that a few steps learn something."""
    return batch(2 * (step % 2) + rank)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def train_alone(model: nn.Module, steps: int = STEPS) -> list[float]:
    """The mean loss of each step over the batches of both processes."""
    optimizer, losses = adam(model), []
    for step in range(steps):
        loss = (model(**batch_of(step, 0)).loss + model(**batch_of(step, 1)).loss) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_shared(
    model: nn.Module,
    rank: int,
    steps: int = STEPS,
    optimizer: torch.optim.Optimizer | None = None,
    after_backward: Callable[[], None] = lambda: None,
    first: int = 0,
) -> list[float]:
    """The same by two processes, each with the batches of its rank."""
    optimizer, losses = optimizer or adam(model), []
    for step in range(first, first + steps):
        loss = model(**batch_of(step, rank)).loss
        loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_of_both(loss.detach()).item())
    return losses


def mean_of_both(value: Tensor) -> Tensor:
    total = value.float().clone()
    dist.all_reduce(total)
    return total / 2


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter, whole."""
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in values.items()}


def assert_close(values: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Adam divides by the gradient's size, so its rounding is magnified: relative to the step, not to the value."""
    assert list(values) == list(expected)
    for name, value in values.items():
        assert (value - expected[name]).abs().max() <= tolerance, name


def shard(model: nn.Module, **options) -> None:
    """fully_shard on every block and on the whole, as a user does it."""
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
