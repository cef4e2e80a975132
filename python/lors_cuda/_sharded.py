# SPDX-License-Identifier: Apache-2.0
# Parameters that fully_shard (FSDP2) has cut into DTensors: looked at, gathered, written. Gathering is a collective:
# every process must take part, in the same order. Used where whole tensors are needed: checkpoints, loading.
"""Sharded parameters, and whole tensors of them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor: a part of one that several processes hold."""
    # Where that class was never imported nothing can be of it; importing it takes longer than all of lors_cuda.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or, of a sharded one, all of it, gathered from every process."""
    sharded: Any = tensor.detach()
    return sharded.full_tensor() if is_sharded(tensor) else tensor


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
        if is_sharded(target):
            sharded: Any = target
            from torch.distributed.tensor import distribute_tensor

            source = source.to(sharded.device, sharded.dtype)
            # Every process has the source: nothing is sent.
            source = distribute_tensor(source, sharded.device_mesh, sharded.placements, src_data_rank=None)
        target.copy_(source)


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
