# SPDX-License-Identifier: Apache-2.0
"""Streams without a GPU: tensors of the CPU, whose operators are queued and run late, in any order that events allow.

As on CUDA, memory belongs to the stream it was allocated on, is free for that stream as soon as no tensor has it,
and holds anything until it is written. Two accesses that no event orders are a race, whatever the order they ran in.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

import lors_cuda._prefetch
from lors_cuda import SparseWeight

Clock = dict["Stream", int]


class Event:
    """A place in a stream's work: done once that work is."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.count, self.clock = stream, stream.clock[stream], dict(stream.clock)


class Stream:
    """A queue. `clock` says how much of each stream's work is done before what is queued next."""

    def __init__(self, world: FakeDevice, device: torch.device) -> None:
        self.world, self.device = world, device
        self.queue: deque[tuple[list[Event], Callable[[], object]]] = deque()
        self.waiting: list[Event] = []  # for these the next work waits
        self.clock: Clock = {self: 0}
        self.done = 0
        self.pool: list[Block] = []  # memory that no tensor has

    def wait_event(self, event: Event) -> None:
        if "wait_event" not in self.world.broken:
            self.wait(event)

    def wait_stream(self, stream: Stream) -> None:
        if "wait_stream" not in self.world.broken:
            self.wait(stream.record_event())

    def wait(self, event: Event) -> None:
        self.waiting.append(event)
        for stream, count in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)

    def record_event(self) -> Event:
        return Event(self)

    def push(self, work: Callable[[], object]) -> None:
        self.clock[self] += 1
        self.queue.append((self.waiting, work))
        self.waiting = []

    def can_run(self) -> bool:
        return bool(self.queue) and all(event.stream.done >= event.count for event in self.queue[0][0])


class Block:
    """Memory of one tensor, and who has accessed it."""

    def __init__(self, stream: Stream, memory: bytearray) -> None:
        self.stream, self.memory, self.nbytes = stream, memory, len(memory)
        self.owner: StorageWeakRef | None = None
        self.written: tuple[Stream, int] | None = None
        self.read: Clock = {}


class FakeDevice(TorchDispatchMode):
    """Queues every operator of this thread on the current stream; reading a value on the host runs all queues.

    Args:
        order: of streams that could go on: "first" (the one made first), "last", or a seed.
        broken: "wait_event", "wait_stream": what streams do not heed.
        devices: how many there are.
    """

    def __init__(self, order: str | int = "last", broken: tuple[str, ...] = (), devices: int = 1) -> None:
        super().__init__()
        self.order, self.broken, self.random = order, broken, random.Random(str(order))
        self.devices = [torch.device("cuda", index) for index in range(devices)]
        self.streams: list[Stream] = []
        self.current = {device: self.new_stream(device) for device in self.devices}
        self.placed: dict[int, torch.device] = {}  # tensors made before, by address; others are on the first device
        self.where: torch.device | None = None  # inside `on`
        self.capturing = False
        self.blocks: dict[int, Block] = {}  # by address
        self.outside: dict[int, Block] = {}  # of tensors made before
        self.races: list[str] = []
        self.log: list[tuple[Stream, str, list[bool]]] = []  # of each operator: its arguments that are None
        self.peak = 0  # bytes of tensors of all streams but the first of each device

    # ---- torch.cuda ----

    def install(self, monkeypatch: Any) -> None:
        """In the place of torch.cuda's streams, for lors_cuda._prefetch."""
        fingerprint = SparseWeight.fingerprint

        def on_the_host(weight: SparseWeight) -> str:  # it reads bytes past torch's operators
            self.synchronize()
            with _disable_current_modes():
                return fingerprint(weight)

        monkeypatch.setattr(SparseWeight, "fingerprint", on_the_host)
        monkeypatch.setattr(lors_cuda._prefetch, "_cuda_device", self.device_of)
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current[device])
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def new_stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(self, device))
        return self.streams[-1]

    def device_of(self, tensor: Tensor) -> torch.device:
        address = tensor.untyped_storage().data_ptr()
        if address in self.blocks:
            return self.blocks[address].stream.device
        return self.placed.get(address, self.devices[0])

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current[stream.device] = self.current[stream.device], stream
        where, self.where = self.where, stream.device
        try:
            yield
        finally:
            self.current[stream.device], self.where = before, where

    # ---- work ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        returns = func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return func(*args, **kwargs)  # a view
        if not returns or not all("Tensor" in str(r.type) for r in returns):
            self.synchronize()
            return func(*args, **kwargs)
        assert torch.Tag.nondeterministic_seeded not in func.tags, "random numbers are drawn outside"
        name = str(func)
        stream = self.current[self.where or (self.device_of(inputs[0]) if inputs else self.devices[0])]
        writes = self.written_arguments(func, args, kwargs)
        aliased = tree_map_only(Tensor, self.alias, (args, kwargs))
        if writes:
            results = func(*tree_map_only(Tensor, torch.clone, args), **tree_map_only(Tensor, torch.clone, kwargs))
            kept = iter(writes)
            outputs, copies = tree_map_only(Tensor, lambda _: next(kept), results), []
        else:
            try:
                outputs = func(*args, **kwargs)  # of whatever is there now: for its shape
            except IndexError:  # an index that is not there yet
                self.synchronize()
                outputs = func(*args, **kwargs)
            known = {t.untyped_storage().data_ptr() for t in inputs if t.numel()}
            if isinstance(outputs, Tensor) and outputs.untyped_storage().data_ptr() in known:
                return outputs  # a view that its schema does not call one
            outputs = tree_map_only(Tensor, lambda t: self.allocate(t, stream), outputs)
            copies = [self.alias(t) for t in tree_flatten(outputs)[0] if isinstance(t, Tensor)]
            writes = [t for t in tree_flatten(outputs)[0] if isinstance(t, Tensor)]

        def work() -> None:
            got = func(*aliased[0], **aliased[1])
            for copy, value in zip(copies, tree_flatten(got)[0] if copies else (), strict=True):
                copy.copy_(value)

        self.log.append((stream, name, [argument is None for argument in args]))
        self.push(stream, name, inputs, writes, work)
        return outputs

    @staticmethod
    def written_arguments(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        written = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                written += [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
        return written

    def push(self, stream: Stream, name: str, reads: list[Tensor], writes: list[Tensor], work: Callable) -> None:
        stream.push(work)
        for tensor in reads:
            if tensor.numel():
                self.access(self.block_of(tensor), stream, name, is_write=False)
        for tensor in writes:
            if tensor.numel():
                self.access(self.block_of(tensor), stream, name, is_write=True)

    def access(self, block: Block, stream: Stream, name: str, is_write: bool) -> None:
        before = [] if block.written is None else [block.written]
        if is_write:
            before += block.read.items()
        if any(stream.clock.get(other, 0) < count for other, count in before):
            self.races.append(f"{name} {'writes' if is_write else 'reads'} what no event orders")
        if is_write:
            block.written, block.read = (stream, stream.clock[stream]), {}
        else:
            block.read[stream] = stream.clock[stream]

    def synchronize(self) -> None:
        """Run everything that is queued."""
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            while any(stream.queue for stream in self.streams):
                able = [stream for stream in self.streams if stream.can_run()]
                assert able, "every stream waits for another"
                stream = {"first": able[0], "last": able[-1]}.get(str(self.order)) or self.random.choice(able)
                stream.queue.popleft()[1]()
                stream.done += 1
        for stream in self.streams:
            for event in stream.waiting:
                assert event.stream.done >= event.count

    # ---- memory ----

    def block_of(self, tensor: Tensor) -> Block:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.blocks and address not in self.outside:
            self.outside[address] = Block(self.streams[0], bytearray())
        return self.blocks.get(address) or self.outside[address]

    def alias(self, tensor: Tensor) -> Tensor:
        """The same memory, and no claim to it."""
        block = self.blocks.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if block is None:
            return tensor.detach()
        flat = torch.frombuffer(block.memory, dtype=torch.uint8).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def collect(self) -> None:
        """Give memory without a tensor back to its stream, as the host sees it: its work may be queued yet."""
        for address, block in list(self.blocks.items()):
            if block.owner is not None and block.owner.expired():
                block.stream.pool.append(self.blocks.pop(address))
        side = self.streams[len(self.devices) :]
        self.peak = max(self.peak, sum(block.nbytes for block in self.blocks.values() if block.stream in side))

    def allocate(self, like: Tensor, stream: Stream) -> Tensor:
        if like.numel() == 0:
            return like
        self.collect()
        nbytes = (sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) + 1) * like.element_size()
        fitting = [block for block in stream.pool if len(block.memory) >= nbytes]
        if fitting:
            block = min(fitting, key=lambda block: len(block.memory))
            stream.pool.remove(block)
        else:
            block = Block(stream, bytearray(-(-nbytes // 64) * 64))
        block.nbytes = nbytes
        flat = torch.frombuffer(block.memory, dtype=torch.uint8)
        tensor = flat.view(like.dtype).as_strided(like.shape, like.stride())
        block.owner = StorageWeakRef(tensor.untyped_storage())
        self.blocks[tensor.untyped_storage().data_ptr()] = block
        poison = torch.frombuffer(block.memory, dtype=torch.uint8)
        self.push(stream, "allocation", [], [tensor], lambda: poison.fill_(255))
        del flat
        self.collect()
        return tensor
