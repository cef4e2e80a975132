# SPDX-License-Identifier: Apache-2.0
"""A frozen sparse weight in its stored layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ._checks import DTYPES, check_adapters, check_mask, check_weight
from ._library import check_device, lors

LAYOUTS = ("auto", "dense", "2:4", "bitmap")
_AVAILABLE = ("auto", "dense")


def check_layout(layout: str) -> None:
    """Refuse a layout that is unknown, or known but not in this version."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(map(repr, LAYOUTS))}.")
    if layout not in _AVAILABLE:
        raise ValueError(
            f"layout {layout!r} is not available in this version of lors_cuda: weights are stored dense. Use "
            "layout='auto' or layout='dense'; the zeros are kept either way."
        )


class SparseWeight:
    """A frozen weight [N, K] and its mask, as stored.

    Layout ``"dense"`` stores all N x K values, and the mask as packed bits only where it was given explicitly: without
    one, a weight is kept where it is not zero.

    Attributes:
        values: dense [N, K] values, +0 off the mask.
        mask_bits: int32 [N, ceil(K/32)] packed mask, or None for "kept where values != 0".
    """

    layout = "dense"

    def __init__(self, values: Tensor, mask_bits: Tensor | None = None) -> None:
        self.values = values
        self.mask_bits = mask_bits

    @classmethod
    def from_dense(cls, weight: Tensor, layout: str = "auto", mask: Tensor | None = None) -> SparseWeight:
        """Store a dense weight [N, K] with zeros.

        Args:
            weight: [N, K], float32, bfloat16, float16 or float64. Referenced, not copied, where it needs no change.
            layout: ``"dense"``, or ``"auto"``, which picks it. ``"2:4"`` and ``"bitmap"`` are not in this version.
            mask: bool [N, K], True where kept; weights off it become +0. None: kept where ``weight != 0``.

        Raises:
            ValueError: an unknown or unavailable layout, a weight that is not 2-D or not floating, or a mask of another
                shape, dtype or device.
        """
        check_layout(layout)
        values = weight.detach() if isinstance(weight, Tensor) else weight
        check_weight(values)
        if mask is None:
            return cls(values.contiguous())
        check_mask(mask, values)
        return cls(torch.where(mask, values, 0.0).contiguous(), lors.mask_pack(mask))

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes stored: values, and the packed mask if there is one."""
        return self.values.nbytes + (0 if self.mask_bits is None else self.mask_bits.nbytes)

    @property
    def density(self) -> float:
        """Fraction of weights that are kept."""
        return int(self.mask().sum()) / max(self.values.numel(), 1)

    def to_dense(self) -> Tensor:
        """The weight as a dense tensor [N, K]; a new one, with -0.0 as +0.0."""
        return self.values + 0.0

    def mask(self) -> Tensor:
        """bool [N, K], True where the weight is kept."""
        if self.mask_bits is None:
            return self.values != 0
        return lors.mask_unpack(self.mask_bits, self.shape[1])

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> SparseWeight:
        """Move to a device or convert to a floating dtype. The mask does not change.

        Converting to a type of smaller range can round a kept value to zero, so the mask is made explicit where it
        was implicit and the conversion would change it.
        """
        if not isinstance(device_or_dtype, torch.dtype):
            check_device(torch.device(device_or_dtype))
            bits = None if self.mask_bits is None else self.mask_bits.to(device_or_dtype)
            return SparseWeight(self.values.to(device_or_dtype), bits)
        if device_or_dtype not in DTYPES:
            raise ValueError(f"dtype is {device_or_dtype}; it must be float32, bfloat16, float16 or float64.")
        values = self.values.to(device_or_dtype)
        bits = self.mask_bits
        if bits is None and bool(((values == 0) & (self.values != 0)).any()):
            bits = lors.mask_pack(self.values != 0)
        return SparseWeight(values, bits)

    def merge(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> SparseWeight:
        """The merged weight in the same layout, ``W + s M o (B A)``; the mask stays, bit for bit.

        lora_A [r, K], lora_B [N, r]. A merged value that rounds to zero stays kept: the mask is then made explicit.
        """
        check_adapters(self.values, lora_A, lora_B)
        with torch.no_grad():
            merged = lors.merge(self.values, self.mask_bits, lora_A, lora_B, float(scaling))
            bits = self.mask_bits
            if bits is None and bool(((merged == 0) & (self.values != 0)).any()):
                bits = lors.mask_pack(self.values != 0)
        return SparseWeight(merged, bits)

    def fingerprint(self) -> str:
        """SHA-256 over the shape and the packed mask, as hex: equal exactly when the masks are."""
        bits = lors.mask_pack(self.values != 0) if self.mask_bits is None else self.mask_bits
        digest = hashlib.sha256(f"{self.shape[0]}x{self.shape[1]}:".encode())
        digest.update(bits.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        density = "unknown" if self.device.type == "meta" else f"{self.density:.3f}"
        return (
            f"SparseWeight(layout={self.layout!r}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, density={density})"
        )
