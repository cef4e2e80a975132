# SPDX-License-Identifier: Apache-2.0
"""What a weight, a mask and its adapters must be: the one place where Python checks them, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._distributed import is_sharded
from ._library import check_device

if TYPE_CHECKING:
    from .weight import SparseWeight

GRADIENTS = ("lors", "exact")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_gradient(gradient: str) -> None:
    """Refuse a name of adapter gradients other than "lors" and "exact"."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient is {gradient!r}; it must be 'lors' or 'exact'.")


def check_whole(name: str, tensor: Tensor) -> None:
    """Refuse a DTensor."""
    if is_sharded(tensor):
        raise ValueError(
            f"{name} is a DTensor, a part of a tensor that several processes hold, and LoRS computes on whole ones. "
            "Under fully_shard call the module that it was applied to, which gathers its parameters; convert and merge "
            "a model outside fully_shard; tensor parallelism is not supported."
        )


def check_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor, a DTensor, or one of torch's own sparse layouts."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor.")
    check_whole(name, value)
    if value.layout != torch.strided:
        raise ValueError(f"{name} has the layout {value.layout}; it must be strided: call its to_dense().")


def check_weight(weight: Tensor) -> None:
    """A frozen dense weight [N, K] on a device with kernels."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; it must be a torch.Tensor or a SparseWeight.")
    check_tensor("weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be [out_features, in_features], both at least 1."
        )
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight has dtype {weight.dtype}; it must be float32, bfloat16, float16 or float64.")
    check_frozen(weight)
    check_device(weight.device)


def check_frozen(weight: Tensor) -> None:
    """Refuse a weight that would be given a gradient."""
    if weight.requires_grad:
        raise ValueError(
            "weight requires grad, but LoRS freezes it: no gradient of the base weight is formed. Call "
            "weight.requires_grad_(False), or pass weight.detach()."
        )


def check_mask(mask: Tensor, weight: Tensor) -> None:
    """A bool mask of the weight's shape, on its device."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"mask is {mask.dtype} with shape {tuple(mask.shape)}; it must be bool with the weight's shape "
            f"{tuple(weight.shape)}."
        )
    if mask.device != weight.device:
        raise ValueError(f"mask is on {mask.device} and weight on {weight.device}; move them to the same device.")


def check_adapters(weight: Tensor | SparseWeight, lora_A: Tensor, lora_B: Tensor) -> None:
    """lora_A [r, K] and lora_B [N, r] of any floating dtype, on the weight's device."""
    check_tensor("lora_A", lora_A)
    check_tensor("lora_B", lora_B)
    N, K = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != K:
        raise ValueError(f"lora_A has shape {tuple(lora_A.shape)}; it must be [r, {K}] for a weight of shape {(N, K)}.")
    r = lora_A.shape[0]
    if lora_B.shape != (N, r):
        raise ValueError(
            f"lora_B has shape {tuple(lora_B.shape)}; it must be ({N}, {r}) for a weight of shape {(N, K)} and lora_A "
            f"of shape {tuple(lora_A.shape)}."
        )
    if r < 1:
        raise ValueError("lora_A has no rows; the rank r must be at least 1.")
    for name, adapter in (("lora_A", lora_A), ("lora_B", lora_B)):
        if adapter.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {adapter.dtype}; it must be float32, bfloat16, float16 or float64.")
        if adapter.device != weight.device:
            raise ValueError(
                f"{name} is on {adapter.device} and weight on {weight.device}; move them to the same device."
            )
