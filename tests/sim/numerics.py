# SPDX-License-Identifier: Apache-2.0
"""Between torch tensors (which have bfloat16) and a simulated device's buffers; masks; gradients against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolerance import assert_close, truncations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def random(seed: int, *shape: int, dtype: str = "float32", density: float | None = None) -> Tensor:
    """Normal numbers; with `density`, the others are 0, every second of them -0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if density is not None:
        zeros = torch.zeros(shape)
        zeros.view(-1)[::2] = -0.0
        values = torch.where(torch.rand(shape, generator=generator) < density, values, zeros)
    return values.to(DTYPES[dtype])


def pack(kept: Tensor) -> np.ndarray:
    """bool [N, K] as uint32 [N, ceil(K/32)]: bit k % 32 of word k / 32."""
    rows, columns = kept.shape
    padded = np.zeros((rows, (columns + 31) // 32 * 32), dtype=np.uint8)
    padded[:, :columns] = kept.numpy()
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def upload(device: Any, name: str, tensor: Tensor, misalign: int = 0) -> Any:
    return device.upload(name, tensor.contiguous().view(_BITS[tensor.element_size()]).numpy(), misalign)


def empty(device: Any, name: str, shape: tuple[int, ...], dtype: str, misalign: int = 0) -> Any:
    """A buffer for `shape` elements of `dtype`, full of NaNs."""
    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
    return device.empty(name, size, misalign)


def download(device: Any, buffer: Any, shape: tuple[int, ...], dtype: str) -> Tensor:
    raw = torch.from_numpy(device.download(buffer).view(np.uint8).copy())
    return raw.view(DTYPES[dtype]).reshape(shape)


def assert_gradient_close(
    got: Tensor, expected: Tensor, rms: Tensor, length: int, dtype: torch.dtype, what: str
) -> None:
    """An adapter's gradient: a matmul of what a first matmul left in float32."""
    truncated = truncations(length, torch.float32)
    assert_close(got, expected, rms=rms, length=length, dtype=dtype, truncated=truncated, what=what)
