# SPDX-License-Identifier: Apache-2.0
# What the processes of one torch.distributed group do together: agree on errors, add up, hand round. In a single
# process all of it is the identity. Used by init.py, training.py, checkpoint.py and the command line.
"""Several processes as one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


class OtherProcessFailed(RuntimeError):
    """Another process failed; it says why, and this one ends with it."""


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def check_launcher() -> None:
    """Refuse another launcher's processes, which would all do the whole work and write over each other.

    Raises:
        RuntimeError: the environment says that this is one of several, and torchrun did not start them.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not launched() and all(name in os.environ for name in names) and os.environ["WORLD_SIZE"] not in ("", "0", "1"):
        raise RuntimeError(
            f"This is process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} by its environment, and torchrun did "
            "not start it. Start it by torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE for a single process."
        )


def is_first() -> bool:
    """Whether this is the process that speaks and writes: the only one, or number 0; also before it met the others."""
    return not launched() or int(os.environ["RANK"]) == 0


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Run a block, before the processes have met, that fails in all of them or in none; the first one says why."""
    try:
        yield
    except Exception as error:
        if is_first():
            raise
        raise OtherProcessFailed("Every process failed; process 0 says why.") from error


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Meet the processes that torchrun has started, with the collectives for ``device``; leave them at the end."""
    if not launched() or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def process_count() -> int:
    """Number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a block that does not itself communicate; where it fails in one process, none goes on.

    Raises:
        Exception: what the block raised, in the first process where it did. OtherProcessFailed: in all others.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = torch.zeros(process_count(), dtype=torch.int64)
    # A process that only heard of a failure is not where it began.
    failed[process_rank()] = error is not None and not isinstance(error, OtherProcessFailed)
    places = summed(failed).nonzero().flatten().tolist()
    if places and places[0] != process_rank():
        raise OtherProcessFailed(
            f"Process {places[0]} of {process_count()} failed ({len(places)} in all), and this one ends with it; see "
            "the error there."
        ) from error
    if error is not None:
        raise error


def summed(tensor: Tensor) -> Tensor:
    """The sum of every process's ``tensor``, which is not changed, in each of them; on the tensor's device."""
    if process_count() == 1:
        return tensor
    total = tensor.to(_device(), copy=True)
    _collective(dist.all_reduce, total)
    return total.to(tensor.device)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace each gradient by the sum over all processes, one collective per dtype; a missing one counts as zero.

    A parameter that has none in any process is left without, as in a single one.
    """
    if process_count() == 1:
        return
    used = summed(torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int64))
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter, uses in zip(parameters, used.tolist(), strict=True):
        if uses:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        total = summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def from_first(item: Item) -> Item:
    """The first process's ``item`` in all of them; what the others give is ignored."""
    if process_count() == 1:
        return item
    items: list[Any] = [item if process_rank() == 0 else None]
    _collective(dist.broadcast_object_list, items, src=0, device=_device())
    return items[0]


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite ``tensors`` by the first process's."""
    if process_count() > 1:
        for tensor in tensors:
            sent = tensor.detach().to(_device(), copy=True)
            _collective(dist.broadcast, sent, src=0)
            with torch.no_grad():
                tensor.copy_(sent)


def gathered(tensor: Tensor) -> Tensor:
    """[processes, ...]: every process's ``tensor``, of one shape and dtype, in each of them; on the CPU."""
    if process_count() == 1:
        return tensor.cpu()[None]
    sent = tensor.to(_device())
    parts = [torch.empty_like(sent) for _ in range(process_count())]
    _collective(dist.all_gather, parts, sent)
    return torch.stack(parts).cpu()


def _device() -> torch.device:
    """Where the group's collectives take their tensors: the CPU if a backend serves it, else the accelerator."""
    on_cpu = "cpu:" in dist.get_backend_config()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _collective(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    try:
        call(*arguments, **options)
    except RuntimeError as error:  # gloo's and NCCL's own types are subclasses
        raise ConnectionError(
            "Another process ended or cannot be reached, so this one ends too; see what it said, or whether the system "
            f"ended it (out of memory). The connection reported: {str(error).splitlines()[0]}"
        ) from error
