# SPDX-License-Identifier: Apache-2.0
# The demo's comparison methods as layers, and what a training step of any method costs in time and memory.
# A peer takes over the tensors of a LoRSLinear, so that every method starts from the same adapters. Library users have
# no business here: these layers exist to be compared with.
"""Plain LoRA and masking under autograd, beside LoRS; the cost of a step."""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from .._batches import running
from .._library import release_scratch
from ..linear import LoRSLinear
from ..model import named_lors_layers


class PeerLinear(nn.Module):
    """A frozen sparse linear with an adapter: ``weight`` and ``mask`` [N, K], ``lora_A`` [r, K], ``lora_B`` [N, r]."""

    weight: Tensor
    mask: Tensor

    def __init__(self, layer: LoRSLinear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.sparse_weight.to_dense())
        self.register_buffer("mask", layer.sparse_weight.mask())
        self.lora_A, self.lora_B, self.bias, self.scaling = layer.lora_A, layer.lora_B, layer.bias, layer.scaling

    def merged(self) -> Tensor:
        """The weight [N, K] with the adapter added."""
        raise NotImplementedError


class PlainLoRA(PeerLinear):
    """LoRA as PEFT computes it, ``Y = X W^T + s (X A^T) B^T``; B A is dense, and so is the merged weight."""

    def forward(self, input: Tensor) -> Tensor:
        side = F.linear(F.linear(input, self.lora_A), self.lora_B)
        return F.linear(input, self.weight, self.bias) + self.scaling * side

    def merged(self) -> Tensor:
        return self.weight + self.scaling * (self.lora_B @ self.lora_A)


class AutogradMasking(PeerLinear):
    """Masked LoRA left to autograd, ``Y = X (W + M o (s B A))^T`` (as SQFT's SparsePEFT, arXiv 2410.03750).

    Autograd keeps the merged weight of every layer until backward reaches it, and forms its whole gradient.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.merged(), self.bias)

    def merged(self) -> Tensor:
        return self.weight + self.mask * (self.scaling * (self.lora_B @ self.lora_A))


def replace_layers(model: nn.Module, peer: type[PeerLinear]) -> None:
    """Put a peer in the place of every LoRSLinear, with its tensors, in place."""
    for name, layer in list(named_lors_layers(model)):
        _set(model, name, peer(layer))


@torch.no_grad()
def merge_layers(model: nn.Module) -> None:
    """Put an nn.Linear with the merged weight in the place of every peer, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PeerLinear):
            N, K = layer.weight.shape
            linear = nn.Linear(K, N, bias=layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(layer.merged(), requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            _set(model, name, linear)


@dataclass(frozen=True)
class StepCost:
    """Forward and backward of one batch: the median time, and the most memory it takes at once beside the model."""

    milliseconds: float
    peak_bytes: int


def measure_steps(
    models: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]], rounds: int
) -> dict[str, StepCost]:
    """Time a step of every model, in rounds that go through all of them: what disturbs one disturbs its neighbours.

    Each round begins with another model and takes another batch; the parameters stay as they are.
    """
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        _step(models[name], batches[0])  # warms up the allocator and the caches of the matmuls
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            _step(models[name], batches[number % len(batches)])
            seconds[name].append(time.perf_counter() - began)
    return {
        name: StepCost(1e3 * statistics.median(seconds[name]), _peak_bytes(models[name], batches[0])) for name in names
    }


def _step(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    with running(model, training=True):
        model(**batch).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None


def _peak_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """The most bytes alive at once of what a step allocates, from the profiler's memory events.

    Every tensor counts, those inside the C++ kernels included; what stood there before the step does not.
    """
    # Kineto announces every profile on stderr; it reads the level when the first one starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    gc.collect()
    release_scratch()  # so that the step allocates it, and it counts
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _step(model, batch)
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    memory.sort(key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0)))
    alive = peak = 0
    for event in memory:
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
