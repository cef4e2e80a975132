# SPDX-License-Identifier: Apache-2.0
# Models in parts: the processes of one torch.distributed group (agreeing on errors, adding up; in a single process the
# identity), parameters that fully_shard (FSDP2) has made DTensors (gathering one is a collective: every process takes
# part, in the same order), and models that accelerate has placed by device_map.
"""Ranks, shards and placement."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")


# ---- processes ----


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
    """Whether this is the process that prints and writes: the only one, or number 0; also before it met the others."""
    return not launched() or int(os.environ["RANK"]) == 0


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Run a block, before the processes have met, that fails in all of them or in none; the first one says why."""
    with ended_together(Exception):
        yield


@contextlib.contextmanager
def ended_together(*kinds: type[Exception]) -> Iterator[None]:
    """Run a block that communicates by itself; of an error of these kinds, raised in every process, one prints.

    Raises:
        ConnectionError: another process ended while this one waited for it.
    """
    try:
        yield
    except kinds as error:
        if is_first():
            raise
        raise OtherProcessFailed("Every process failed; process 0 says why.") from error
    except RuntimeError as error:
        if process_count() > 1 and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            raise _unreachable(error) from error
        raise


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


def from_first(item: Item) -> Item:
    """The first process's ``item`` in all of them; what the others give is ignored."""
    if process_count() == 1:
        return item
    items: list[Any] = [item if process_rank() == 0 else None]
    _collective(dist.broadcast_object_list, items, src=0, device=_device())
    return items[0]


def _device() -> torch.device:
    """Where the group's collectives take their tensors: the CPU if a backend supports it, else the accelerator."""
    on_cpu = "cpu:" in dist.get_backend_config()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _collective(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    try:
        call(*arguments, **options)
    except RuntimeError as error:  # gloo's and NCCL's own types are subclasses
        raise _unreachable(error) from error


def _unreachable(error: RuntimeError) -> ConnectionError:
    return ConnectionError(
        "Another process ended or cannot be reached, so this one ends too; see what it said, or whether the system "
        f"ended it (out of memory). The connection reported: {str(error).splitlines()[0]}"
    )


def end_buffer_broadcasts(kind: type[nn.Module]) -> None:
    """Keep the buffers of modules of this kind out of what DistributedDataParallel, if its forward is running, sends.

    It broadcasts buffers when it is made, which is right, and then before every forward, although these never change.
    All processes must call this in their first forward; the list of what to leave out is read at each.
    """
    ddp: Any = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or getattr(ddp, "_lors_buffers_left_out", False):
        return
    for name, module in ddp.module.named_modules():
        if isinstance(module, kind):
            ddp.parameters_to_ignore.update(key for key, _ in module.named_buffers(name, recurse=False))
    ddp._assign_modules_buffers()  # or it would broadcast an empty list once more
    ddp._lors_buffers_left_out = True


# ---- parameters that several processes share ----


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor: a part of one that several processes hold."""
    # Where that class was never imported nothing can be of it; importing it takes longer than all of lors_cuda.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or, of a sharded one, all of it, gathered from every process."""
    sharded: Any = tensor.detach()
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def whole_attribute(module: nn.Module, name: str) -> Tensor:
    """``whole`` of a module's tensor; one that is parametrised is computed from what it is made of, gathered first."""
    if name not in getattr(module, "parametrizations", ()):
        return whole(getattr(module, name))
    chain: Any = module.parametrizations
    stored = {key: whole(parameter) for key, parameter in chain[name].named_parameters()}
    computed: Tensor = torch.func.functional_call(chain[name], stored, ())
    return computed


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor."""
    sharded: Any = tensor
    return sharded.to_local()


def check_gathered(model: nn.Module) -> None:
    """Refuse a model whose parameters DeepSpeed's ZeRO-3 has emptied; only DeepSpeed can gather them.

    Raises:
        ValueError: a parameter is partitioned.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "ds_shape", parameter.shape) != parameter.shape:
            raise ValueError(
                f"The parameter '{name}' is partitioned by DeepSpeed's ZeRO-3, and is empty here. Call this inside "
                "`with deepspeed.zero.GatheredParameters(list(model.parameters())):` (modifier_rank=0 to change them)."
            )


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole ``source`` into ``target``; where that is sharded, each process copies its part."""
    with torch.no_grad():
        target.copy_(sharded_like(target, source))


@contextlib.contextmanager
def gathered(tensor: Tensor) -> Iterator[Tensor]:
    """The whole of a tensor, to be changed in place: what is written into it is the tensor's at the end."""
    full = whole(tensor.detach())
    yield full
    if is_sharded(tensor):
        copy_whole(tensor.detach(), full)


def sharded_like(target: Tensor, source: Tensor) -> Tensor:
    """A whole ``source``, which every process has, as ``target`` is held: itself, or cut into the same parts."""
    if not is_sharded(target):
        return source
    sharded: Any = target
    from torch.distributed.tensor import distribute_tensor

    source = source.to(sharded.device, sharded.dtype)
    # Every process has the source: nothing is sent.
    cut: Tensor = distribute_tensor(source, sharded.device_mesh, sharded.placements, src_data_rank=None)
    return cut


def reshard(model: nn.Module) -> bool:
    """Bring every module under fully_shard back to its sharded parameters; whether there is any.

    A forward without a backward leaves the outermost module's parameters gathered; what is written into those is lost.
    """
    sharded = [module for module in model.modules() if isinstance(module, _fsdp_class())]
    for module in sharded:
        module.reshard()
    return bool(sharded)


def is_partitioned(model: nn.Module) -> bool:
    """Whether a process holds a part of the model only, by fully_shard or DeepSpeed's ZeRO-3."""
    # A module under fully_shard may have its parameters gathered at the moment.
    return any(isinstance(module, _fsdp_class()) for module in model.modules()) or any(
        is_sharded(parameter) or hasattr(parameter, "ds_shape") for parameter in model.parameters()
    )


def original_class(model: nn.Module) -> type:
    """The model's class, without the one that fully_shard has put in front of it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, _fsdp_class()))


def _fsdp_class() -> Any:
    # Where the module was never imported no model can be under it; importing it takes half a second.
    module = sys.modules.get("torch.distributed.fsdp")
    return () if module is None else module.FSDPModule


# ---- models placed by accelerate's device_map ----


def placement_hook(module: nn.Module) -> Any:
    """The hook by which accelerate runs `module` on its device; None without one, or if it does something else."""
    hook = vars(module).get("_hf_hook")
    return None if type(hook).__name__ != "AlignDevicesHook" or is_offloaded(module) else hook


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere and brings them for each forward."""
    return bool(getattr(vars(module).get("_hf_hook"), "offload", False))


def original_forward(module: nn.Module) -> Any:
    """The function that computes the module's forward, seen through accelerate's placement; None if it was replaced."""
    own = vars(module).get("forward")
    if own is None:
        return type(module).forward
    if placement_hook(module) is not None and isinstance(own, functools.partial):
        return getattr(vars(module).get("_old_forward"), "__func__", None)
    return None


def hand_over_placement(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the placement hook of the module it replaces, if that has one."""
    hook = placement_hook(old)
    if hook is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # where the hook comes from

    # Not the same object: it may remember tied weights by their addresses, which are not this module's.
    add_hook_to_module(
        new,
        AlignDevicesHook(
            execution_device=hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys
        ),
    )
