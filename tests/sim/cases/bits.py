# SPDX-License-Identifier: Apache-2.0
"""bfloat16 for NumPy, and operands of a case."""

from __future__ import annotations

from typing import Any

import numpy as np

SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as they lie in memory, bfloat16 as its bits."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype)


def loaded(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


class Adapters:
    """Random lora_A [r, K] and lora_B [N, r] of one dtype, and what they add to the weight with a scaling of 0.5."""

    def __init__(self, random: np.random.Generator, N: int, K: int, r: int, dtype: str = "float32") -> None:
        self.r, self.dtype = r, dtype
        self.stored = [stored(random.standard_normal(shape), dtype) for shape in ((r, K), (N, r))]
        A, B = (loaded(raw, dtype).astype(np.float64) for raw in self.stored)
        self.update = 0.5 * (B.reshape(N, r) @ A.reshape(r, K))

    def fields(self, device: Any) -> dict[str, Any]:
        """The arguments of a call."""
        names = ("lora_A", "lora_B")
        fields = {name: device.upload(name, raw) for name, raw in zip(names, self.stored, strict=True)}
        return {"r": self.r, "scaling": 0.5, **fields, **{f"{name}_dtype": self.dtype for name in names}}


class Operands:
    """Random operands on a device, their values as the kernel sees them, and results to be read back."""

    def __init__(self, device: Any, seed: int, dtype: str) -> None:
        self.device = device
        self.dtype = dtype
        self.values: dict[str, np.ndarray] = {}
        self.fields: dict[str, Any] = {}
        self._random = np.random.default_rng(seed)

    def add(self, name: str, *shape: int, density: float = 1.0, dtype: str | None = None) -> None:
        dtype = dtype or self.dtype
        values = self._random.standard_normal(shape) * (self._random.random(shape) < density)
        raw = stored(values, dtype)
        self.values[name] = loaded(raw, dtype).reshape(shape).astype(np.float64)
        self.fields[name] = self.device.upload(name, raw)
        self.fields[f"{name}_dtype"] = dtype

    def result(self, name: str, *shape: int) -> None:
        self.fields[name] = self.device.empty(name, SIZE[self.dtype] * int(np.prod(shape)))
        self.fields[f"{name}_dtype"] = self.dtype

    def check(self, name: str, want: np.ndarray) -> None:
        got = loaded(self.device.download(self.fields[name]), self.dtype).reshape(want.shape)
        digits = 2.0**-7 if self.dtype == "bfloat16" else 2.0**-10 if self.dtype == "float16" else 1e-5
        np.testing.assert_allclose(got, want, rtol=digits, atol=digits * np.abs(want).max(), err_msg=name)
