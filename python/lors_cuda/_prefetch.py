# SPDX-License-Identifier: Apache-2.0
# The merged weight is given to the operators as merge_cache gives it, but never saved: backward takes it anew.
#
# On one device, c is the current stream and s the second one. At a call of layer i (forward, recomputation, backward):
#   c waits for the merge that was made ahead, which is i's or is dropped
#   s waits for c: for the matmul that read the other merged weight, and for whatever wrote the adapters
#   s merges the layer that followed i the last time, into memory of its own, where the other merged weight was
#   c multiplies by i's merged weight
# Memory is torch's: what is freed of s's pool is used again by s alone, in the order of its work.
"""prefetch: the next layer's merge on a second CUDA stream, behind this layer's matmul."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._draws import NO_DRAWS, Draws
from ._grid import NOT_REQUANTIZED, Requantization
from ._library import lors
from ._merged_weight import MergedWeight, counted, may_be_kept
from .model import keep_merged_weights
from .sparse_linear import SparseLayer
from .weight import SparseWeight

_Key = tuple[object, ...]


class _Ahead(NamedTuple):
    """A merge that was queued before it was asked for."""

    merged: Tensor
    key: _Key
    sources: list[Tensor]  # alive, so that their addresses in the key, and their memory, are not used for others
    ready: torch.cuda.Event


def _cuda_device(tensor: Tensor) -> torch.device | None:
    return tensor.device if tensor.is_cuda else None


class _Call:
    """One call of a layer: what its merge is made of."""

    def __init__(
        self,
        layer: Prefetched,
        device: _Device,
        weight: SparseWeight,
        adapter: tuple[Tensor, Tensor],
        scaling: float,
        input: Tensor,
        draws: Draws,
        requantize: Requantization,
    ) -> None:
        self.layer, self.device = layer, device
        self.stored = (weight.values, weight.mask_bits, weight.index)
        self.grid = weight.grid(requantize)
        self.adapter, self.scaling, self.dtype = adapter, scaling, input.dtype
        self.tokens = input.numel() // weight.shape[1]
        self.frozen = self.frozen_now()
        self.key = self.key_now(draws)

    def frozen_now(self) -> _Key:
        """What an optimizer does not change."""
        adapter = [(t.data_ptr(), t.dtype, t.shape) for t in self.adapter]
        stored = (*self.stored, self.grid.scales, self.grid.zero_points)
        return self.scaling, self.dtype, self.grid[3:], *adapter, *(counted(t) for t in stored if t is not None)

    def key_now(self, draws: Draws) -> _Key:
        noise = None if draws.noise is None else counted(draws.noise)
        return *self.frozen, *(t._version for t in self.adapter), draws.rounding_seed, noise, draws.noise_seed

    def merge(self, stream: torch.cuda.Stream) -> _Ahead | None:
        """The merge with the adapters of now, queued on ``stream``; None if another tensor has taken a place."""
        if self.frozen_now() != self.frozen:
            return None
        with torch.no_grad(), torch.cuda.stream(stream):
            draws = self.layer.draws()
            args = (*self.stored, *self.adapter, self.scaling, self.dtype, self.tokens, *draws, *self.grid)
            sources = [t.detach() for t in args if isinstance(t, Tensor)]
            key = self.key_now(draws)
            merged = lors.merged_operand(*args)
            return _Ahead(merged, key, sources, stream.record_event())

    @contextlib.contextmanager
    def taken(self, in_backward: bool) -> Iterator[Tensor | None]:
        """The merged weight, or None where it was not made ahead. What reads it is queued inside the block."""
        # torch's number of the running backward: a forward inside one recomputes, in another order than the first.
        kind = "backward" if in_backward else "forward" if torch._C._current_graph_task_id() < 0 else "recomputation"
        with self.device.lock:
            yield self.device.take(self, kind)


class _Device:
    """The second stream of one device, with at most two merged weights: the one in use, and the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.lock = threading.RLock()  # two threads may call one model
        self.open = True
        self.used: _Ahead | None = None
        self.ahead: _Ahead | None = None
        self.reader: torch.cuda.Stream | None = None  # of self.used
        self.calls: dict[Prefetched, _Call] = {}  # the last one of each layer
        self.followed: dict[tuple[Prefetched, str], tuple[Prefetched, str]] = {}
        self.last: tuple[Prefetched, str] | None = None

    def take(self, call: _Call, kind: str) -> Tensor | None:
        """The merged weight of this call, if it was made ahead; queues the merge of the next one."""
        if not self.open:
            return None
        ahead = self.join()
        self.used = ahead if ahead is not None and ahead.key == call.key else None
        place = (call.layer, kind)
        if self.last is not None:
            self.followed[self.last] = place
        self.last, self.calls[call.layer] = place, call
        if place in self.followed:
            self.ahead = self.calls[self.followed[place][0]].merge(self.stream)
        return None if self.used is None else self.used.merged

    def join(self) -> _Ahead | None:
        """What was made ahead, after both streams have waited for each other: nothing that either reads is in use."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph is captured inside lors_cuda.prefetch, which merges ahead on a stream that is no part of "
                "the graph. Capture it outside the block: the captured layers then merge for themselves."
            )
        current = torch.cuda.current_stream(self.device)
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            current.wait_event(ahead.ready)
        for stream in {current, self.reader or current}:
            self.stream.wait_stream(stream)
        self.used, self.reader = None, current
        return ahead

    def forget(self) -> None:
        with self.lock:
            if self.used is not None or self.ahead is not None:
                self.join()

    def close(self) -> None:
        with self.lock:
            self.forget()
            self.open = False
            self.calls.clear()
            self.followed.clear()


class Prefetched:
    """In the place of a layer's :class:`MergedWeight`. See :func:`lors_cuda.prefetch`."""

    def __init__(self, layer: SparseLayer, devices: dict[torch.device, _Device]) -> None:
        self._layer, self._devices = layer, devices

    def draws(self) -> Draws:
        """The layer's, as it would draw now."""
        return self._layer.draws(self._layer.training)

    def operand(
        self,
        weight: SparseWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        input: Tensor,
        draws: Draws = NO_DRAWS,
        requantize: Requantization = NOT_REQUANTIZED,
    ) -> _Call | None:
        """The call, in the place of its merged weight; None where it merges for itself: on other devices than CUDA, in
        a graph, under torch.func, and where an adapter is computed for the call alone."""
        adapter = (lora_A, lora_B)
        if not may_be_kept(weight) or not all(isinstance(factor, nn.Parameter) for factor in adapter):
            return None
        device = _cuda_device(weight.values)
        if device is None:
            return None
        stored = (weight.values, weight.mask_bits, weight.index, *weight.grid()[:2], draws.noise)
        MergedWeight.check_countable(t for t in (*adapter, *stored) if t is not None)
        if device not in self._devices:
            self._devices[device] = _Device(device)
        return _Call(self, self._devices[device], weight, adapter, scaling, input, draws, requantize)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies merge for themselves


@contextlib.contextmanager
def prefetch(model: nn.Module) -> Iterator[None]:
    """Merge each layer's weight behind the matmul of the layer before it, inside a `with` block; on CUDA only.

    For training and evaluation with adapters that change: while a layer's matmul runs, the merged weight of the layer
    that followed it the last time is made on a second stream, in forward, in recomputation by checkpointing and in
    backward. The results are those without it, up to the order of summation of the matmul. A layer that is called out
    of order, or whose weight, adapters, scaling, dtype or random numbers have changed since its merge was queued,
    merges for itself, as outside the block. It costs two merged weights of memory on each device at a time, instead of
    one, and host time in every call. Its speed has not been measured.

    Merging for themselves are, besides: experts, of which only those that tokens come to are merged; layers whose
    adapters are computed in each forward (parametrizations, several active PEFT adapters); calls under `torch.compile`
    and `torch.func`; a backward after the block. Inside :func:`lors_cuda.merge_cache` or around it, the inner block is
    in force.

    NOTE: a change is seen by the tensors' version counters, and every step of a `torch.optim.Optimizer` drops what was
    made ahead. Outside an optimizer do not write through `tensor.data` or a raw pointer inside the block: torch counts
    neither.

    Raises:
        ValueError: the model has no LoRS layers, or is sharded, or its parameters were made under
            `torch.inference_mode`.
        RuntimeError: in the forward or backward, if a CUDA graph is being captured.

    Warns:
        UserWarning: no adapted weight is on a CUDA device; the block then has no effect.
    """
    devices: dict[torch.device, _Device] = {}

    def forget(*_: object) -> None:
        for device in devices.values():
            device.forget()

    def keeper_of(layer: SparseLayer) -> Prefetched | None:
        return Prefetched(layer, devices) if layer.num_experts is None else None

    try:
        with keep_merged_weights(model, "prefetch", keeper_of, forget) as layers:
            if all(_cuda_device(layer.sparse_weight.values) is None for layer in layers):
                warnings.warn(
                    f"lors_cuda.prefetch has no effect: the weights are on {layers[0].sparse_weight.device}, and "
                    "merging ahead needs a second CUDA stream. Move the model to a CUDA device first, or leave it out.",
                    stacklevel=3,
                )
            yield
    finally:
        for device in devices.values():
            device.close()
