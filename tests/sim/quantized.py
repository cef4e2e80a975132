# SPDX-License-Identifier: Apache-2.0
"""Quantised weights as lors/quantization.h has them: codes in memory, what they stand for, and requantising."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats import compress, sparse_weight
from numerics import DTYPES, pack, upload

LAYOUTS = ("dense", "2:4", "bitmap")
GRIDS = ("int8", "int4", "e4m3")
RANGE = {"int8": (-128, 127), "int4": (-8, 7)}


@dataclass(frozen=True)
class Quantized:
    """A weight [N, K] on a grid: its codes as bytes (int4: -8 to 7 as such), all of one group where `group` is K."""

    layout: str
    grid: str
    group: int
    codes: Tensor  # int64 [N, K]: signed; e4m3: the bytes
    kept: Tensor
    scales: Tensor  # [N, K / group]
    zero_points: Tensor | None  # int8 like scales

    @property
    def scale(self) -> Tensor:
        """float32 [N, K]."""
        return self.scales.float().repeat_interleave(self.group, 1)

    @property
    def zero(self) -> Tensor:
        zero = torch.zeros_like(self.scale) if self.zero_points is None else self.zero_points.float()
        return zero if self.zero_points is None else zero.repeat_interleave(self.group, 1)

    def dequantized(self) -> Tensor:
        """float32 [N, K]; what is off the mask is not zeroed."""
        codes = self.codes.float()
        if self.grid == "e4m3":
            codes = self.codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
        return (codes - self.zero) * self.scale

    def requantized(self, merged: Tensor, steps: int, dither: Tensor | None) -> Tensor:
        """Of the unrounded merged weight [N, K] in float32: float32, +0 off the mask."""
        step = steps * self.scale
        inverse = 1 / step
        if self.grid == "e4m3":
            codes = (merged * inverse).clamp(-448, 448).to(torch.float8_e4m3fn).float() + 0.0
        else:
            low, high = RANGE["int4" if steps == 16 else self.grid]
            u = torch.zeros_like(merged) if dither is None else dither
            # float64 holds the product, and the sum but for what a float32 sum would round away.
            at = (merged.double() * inverse.double() + u.double()).float()
            zero = self.zero / steps
            codes = (at.round() + zero).clamp(low, high) - zero
        result = torch.where(merged.isfinite(), codes * step, torch.nan)
        return torch.where(self.kept, result + 0.0, 0.0)

    def uploaded(self, device: Any, misalign: int = 0) -> dict[str, Any]:
        """What sim.merge and sim.fused_linear take of it."""
        N, K = self.codes.shape
        stored: dict[str, Any] = {}
        codes = torch.where(self.kept, self.codes, 0)
        if self.layout == "2:4":
            slots, metadata = compress(codes.float(), self.kept)
            rows = list(slots.long())
            stored["metadata"] = device.upload("metadata", metadata)
        else:
            stored["mask"] = device.upload("mask", pack(self.kept))
            rows = list(codes)
        if self.layout == "bitmap":
            rows = [row[keep] for row, keep in zip(codes, self.kept, strict=True)]
        if self.grid == "int4":
            rows = [torch.cat([row, row.new_zeros(len(row) % 2)]) & 15 for row in rows]
            packed = torch.cat([row[::2] | row[1::2] << 4 for row in rows])
        else:
            packed = torch.cat(rows) & 255
        if self.layout == "bitmap":
            offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
            stored["row_offsets"] = device.upload("row_offsets", offsets.numpy())
        if len(packed) == 0:
            packed = packed.new_zeros(1)
        return {
            **stored,
            "out_features": N,
            "in_features": K,
            "weight": device.upload("values", packed.to(torch.uint8).numpy(), misalign),
            "grid": self.grid,
            "group": self.group,
            "scales": upload(device, "scales", self.scales),
            "scales_dtype": str(self.scales.dtype).removeprefix("torch."),
            "zero_points": None if self.zero_points is None else upload(device, "zero_points", self.zero_points),
        }


def quantized(
    seed: int,
    layout: str,
    grid: str,
    shape: tuple[int, int],
    group: int,
    *,
    scale_dtype: str = "bfloat16",
    zero_points: bool = False,
    steps: int = 1,
) -> Quantized:
    """Random codes, every row and group with a scale and a zero point of its own."""
    N, K = shape
    generator = torch.Generator().manual_seed(seed)
    _, kept = sparse_weight(seed, N, K, "float32", explicit=True, sparse24=layout == "2:4")
    if grid == "e4m3":
        codes = torch.randint(0, 256, shape, generator=generator)
        codes[codes % 128 == 127] = 0  # NaN is no code
    else:
        low, high = RANGE[grid]
        codes = torch.randint(low, high + 1, shape, generator=generator)
    scales = torch.rand((N, K // group), generator=generator) * 0.3 + 0.05
    scales = scales * {"int8": 1 / 16, "int4": 1, "e4m3": 1 / 64}[grid]
    zeros = None
    if zero_points:
        spread = 4 if steps == 16 else RANGE[grid][1] // 2
        zeros = (torch.randint(-spread, spread + 1, scales.shape, generator=generator) * steps).to(torch.int8)
    return Quantized(layout, grid, group, codes, kept, scales.to(DTYPES[scale_dtype]), zeros)
