# SPDX-License-Identifier: Apache-2.0
# What adapter files hold of the base weights they were trained on: fingerprints of mask and values, and the dtype. The
# same whatever the layout, device and sharding. Used by checkpoint.py and lors_cuda.peft.
"""Fingerprints of base weights, and what differs between two bases: mask, dtype or values."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_has_values, listed

if TYPE_CHECKING:
    from .weight import SparseWeight

# Weights at a time: on the CPU, of each thread, so that their integers, 8 bytes each, stay in its cache.
_CPU_CHUNK, _GPU_CHUNK = 1 << 16, 1 << 22


@dataclass(frozen=True)
class Fingerprint:
    """Of one base weight. What files of earlier versions lack is empty.

    Attributes:
        mask: see :meth:`lors_cuda.SparseWeight.fingerprint`.
        values: see :func:`fingerprint`.
        dtype: that of the values, such as "bfloat16".
    """

    mask: str
    values: str = ""
    dtype: str = ""


def fingerprint(weight: SparseWeight) -> Fingerprint:
    """The fingerprint of a weight that is whole.

    ``values`` is the SHA-256 of the shape and, for each row, of ``sum_k (2k + 1) x_k mod 2^64``, where ``x_k`` is
    ``b ^ (b >> 32)`` for the 64 bits ``b`` of the value as float64. So a weight that is stored in a wider dtype without
    rounding has the same one, and another value in one place always changes it: both steps are invertible. Computed
    where the weight is; one number of each row is read back.

    Raises:
        ValueError: the weight is on the meta device.
    """
    check_has_values("A weight", weight.values)
    dense = weight.to_dense()
    N, K = dense.shape
    places = 2 * torch.arange(K, device=dense.device) + 1
    sums = []
    chunk = _CPU_CHUNK * torch.get_num_threads() if dense.device.type == "cpu" else _GPU_CHUNK
    for rows in dense.split(max(1, chunk // K)):
        bits = rows.double().view(torch.int64)
        # The low bits of what was a 16-bit value are zero, and so would those of the sum be.
        scrambled = (bits >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(bits)
        sums.append(scrambled.mul_(places).sum(dim=1))
    return Fingerprint(
        weight.fingerprint(), sha256(f"{N}x{K}:", torch.cat(sums)), str(weight.dtype).removeprefix("torch.")
    )


def sha256(text: str, *tensors: Tensor | None) -> str:
    """SHA-256 of a text and the tensors' bytes, as hex."""
    digest = hashlib.sha256(text.encode())
    for content in (tensor.detach().cpu().contiguous() for tensor in tensors if tensor is not None):
        # Through its memory: this runs where torch has no NumPy.
        digest.update((ctypes.c_char * content.nbytes).from_address(content.data_ptr()))
    return digest.hexdigest()


def to_fields(found: Mapping[str, Fingerprint]) -> dict[str, dict[str, str]]:
    """The fields of adapter_config.json's "lors" that hold the fingerprints, by module name."""
    return {
        "mask_fingerprints": {name: each.mask for name, each in found.items()},
        "value_fingerprints": {name: each.values for name, each in found.items() if each.values},
        "weight_dtypes": {name: each.dtype for name, each in found.items() if each.dtype},
    }


def from_fields(lors: Any) -> dict[str, Fingerprint] | None:
    """What :func:`to_fields` has written, or an earlier version with masks only; None if it is nothing of the kind."""
    if not isinstance(lors, Mapping):
        return None
    masks, values, dtypes = (lors.get(key, {}) for key in ("mask_fingerprints", "value_fingerprints", "weight_dtypes"))
    if "mask_fingerprints" not in lors or not all(map(_is_text, (masks, values, dtypes))):
        return None
    return {name: Fingerprint(mask, values.get(name, ""), dtypes.get(name, "")) for name, mask in masks.items()}


def _is_text(fields: Any) -> bool:
    return isinstance(fields, Mapping) and all(isinstance(value, str) for value in fields.values())


def mask_problem(found: Mapping[str, Fingerprint], saved: Mapping[str, Fingerprint]) -> str | None:
    """Say that the masks of an adapter's base are other ones, and what to do; a sentence without its end."""
    different = [name for name, own in found.items() if name not in saved or saved[name].mask != own.mask]
    if not different:
        return None
    narrowed = _narrowed(different, found, saved)
    if narrowed is not None:
        return f"{narrowed}, where small weights round to zero, so that the masks differ. {_load_in(different, saved)}"
    text = f"It was trained on a model with another sparsity mask: {listed(different)} differ"
    return f"{text}. {_advice(different[0], found, saved)}"


def value_problem(found: Mapping[str, Fingerprint], saved: Mapping[str, Fingerprint]) -> str | None:
    """The same of the values, of weights whose masks agree."""
    different = [name for name, own in found.items() if name in saved and saved[name].values not in ("", own.values)]
    if not different:
        return None
    narrowed = _narrowed(different, found, saved)
    if narrowed is not None:
        return f"{narrowed}, so that the values differ. {_load_in(different, saved)}"
    return (
        f"The weights of {listed(different)} have the mask of those it was trained on, but other values: the adapter, "
        f"or another one, is merged into them already, or this is another base. {_advice(different[0], found, saved)}"
    )


def _narrowed(names: list[str], found: Mapping[str, Fingerprint], saved: Mapping[str, Fingerprint]) -> str | None:
    """Say that these weights are in a dtype that cannot hold the one they were in; None if one is not known to be."""
    for name in names:
        before = _dtype(saved[name].dtype) if name in saved and saved[name].dtype else None
        now = _dtype(found[name].dtype)
        if before is None or torch.promote_types(before, now) == now:
            return None
    first = names[0]
    return (
        f"It was trained on weights in torch.{saved[first].dtype}, and those of {listed(names)} are in "
        f"torch.{found[first].dtype}"
    )


def _load_in(names: list[str], saved: Mapping[str, Fingerprint]) -> str:
    return f"Load the base model in torch.{saved[names[0]].dtype}"


def _advice(name: str, found: Mapping[str, Fingerprint], saved: Mapping[str, Fingerprint]) -> str:
    """What to do; names the dtype where that may be all that differs, or the file does not say which it was."""
    before, now = saved[name].dtype if name in saved else "", found[name].dtype
    if before == now or (not before and now not in ("float16", "bfloat16")):
        return "Load the base model it was trained on"
    known = f"torch.{before}" if before else "another dtype"
    return (
        f"Load the base model it was trained on; if this is that one, in torch.{now} now and in {known} in training, "
        "load it in the dtype of the training"
    )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"The adapter names {name!r} as the dtype of a weight, which torch does not know.")
    return dtype
