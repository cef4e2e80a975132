# SPDX-License-Identifier: Apache-2.0
"""A frozen sparse weight in its stored layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import DTYPES, LAYOUTS, check_adapters, check_choice, check_mask, check_merge, check_weight, check_whole
from ._draws import NO_DRAWS, Draws, rounding_draws
from ._grid import NO_GRID, NOT_REQUANTIZED, Grid, Requantization
from ._library import check_device, lors
from ._linears import plain
from ._stored_checks import check_stored
from .codes import as_codes, pack_codes, unpadded
from .fingerprints import sha256
from .formats import (
    compress_sparse24,
    index_for,
    kept_values,
    layout_of,
    pack_mask,
    padded_offsets,
    row_offsets,
    sparse24_mask,
    unpack_mask,
)
from .quantization import (
    QuantizationGrid,
    check_codes,
    check_requantization,
    choose_grid,
    quantize_codes,
    without_negative_zero,
)


class SparseWeight:
    """A frozen weight [N, K] and its mask, as stored; every layout can hold the same values and mask.

    | layout   | values                  | mask_bits                                   | index                         |
    | -------- | ----------------------- | ------------------------------------------- | ----------------------------- |
    | "dense"  | [N, K], +0 off the mask | int32 [N, ceil(K/32)], or None: values != 0 | None                          |
    | "2:4"    | [N, K/2]                | None                                        | uint8 metadata [N, ceil(K/8)] |
    | "bitmap" | [number of kept]        | int32 [N, ceil(K/32)]                       | int64 row offsets [N + 1]     |

    With a ``quantization`` the values are codes on its grid, in the same places: int8 codes, bytes of e4m3 codes
    (uint8), or two int4 codes in each uint8, where a bitmap's row offsets count codes and every row has an even number
    of them. Such a weight has its mask bits in the layout "dense", too.

    docs/formats.md describes them bit by bit. Make one with :meth:`from_dense`, :meth:`quantize` or
    :meth:`from_quantized`, or, from compressed tensors, :meth:`from_sparse24`, :meth:`from_bitmap` and
    :meth:`from_stored`, which check them; the constructor trusts what it is given.
    """

    def __init__(
        self,
        values: Tensor,
        mask_bits: Tensor | None = None,
        index: Tensor | None = None,
        *,
        in_features: int | None = None,
        quantization: QuantizationGrid | None = None,
    ) -> None:
        self.values = values
        self.mask_bits = mask_bits
        self.index = index
        self.quantization = quantization
        if quantization is not None:
            self.layout, self.shape = layout_of(index), quantization.shape
        elif index is None:
            self.layout, self.shape = "dense", values.shape
        elif index.dtype == torch.uint8:
            self.layout, self.shape = "2:4", torch.Size((values.shape[0], 2 * values.shape[1]))
        else:
            if in_features is None:
                raise TypeError("in_features is missing; a bitmap weight does not show it by itself.")
            self.layout, self.shape = "bitmap", torch.Size((index.shape[0] - 1, in_features))

    @classmethod
    def from_dense(cls, weight: Tensor, layout: str = "auto", mask: Tensor | None = None) -> SparseWeight:
        """Store a dense weight [N, K] with zeros. Waits for the device where the layout depends on the values.

        Args:
            weight: [N, K], float32, bfloat16, float16 or float64. Referenced, not copied, where it needs no change.
                torch's semi-structured tensors are decompressed, exactly.
            layout: ``"dense"``; ``"2:4"``, at most two kept in each aligned group of four along K; ``"bitmap"``, any
                pattern; or ``"auto"``: ``"2:4"`` if it fits, else ``"bitmap"`` if that is smaller, else ``"dense"``.
            mask: bool [N, K], True where kept; weights off it become +0. None: kept where ``weight != 0``.

        Raises:
            ValueError: an unknown layout, a weight that is not 2-D or not floating, or does not fit the layout (the
                first place is named), or a mask of another shape, dtype or device.
        """
        check_choice("layout", layout, LAYOUTS)
        values = plain(weight)
        check_weight(values)
        if mask is not None:
            check_mask(mask, values)
        explicit = None if mask is None else pack_mask(mask)
        if layout != "dense":
            bits = pack_mask(values != 0) if explicit is None else explicit
            explicit_bytes = 0 if explicit is None else explicit.nbytes
            index = index_for(layout, bits, values.shape[1], values.itemsize, explicit_bytes)
            if index is not None:
                return cls._compressed(values, bits, index)
        return cls(values.contiguous() if mask is None else torch.where(mask, values, 0.0).contiguous(), explicit)

    @classmethod
    def _compressed(cls, dense: Tensor, bits: Tensor, index: Tensor) -> SparseWeight:
        if layout_of(index) == "2:4":
            return cls(compress_sparse24(dense, bits, index), None, index)
        return cls(kept_values(dense, bits), bits, index, in_features=dense.shape[1])

    @classmethod
    def from_sparse24(cls, values: Tensor, metadata: Tensor) -> SparseWeight:
        """A weight of layout ``"2:4"`` from its tensors: values [N, K/2] and uint8 metadata [N, ceil(K/8)], as stored.

        Raises:
            ValueError: the metadata has a code that does not occur or a slot off the mask is not zero (the first place
                is named), or dtypes, shapes or devices do not fit.
        """
        check_stored("2:4", values, None, metadata)
        return cls(values.detach().contiguous(), None, metadata.contiguous())

    @classmethod
    def from_bitmap(cls, values: Tensor, mask_bits: Tensor, row_offsets: Tensor, in_features: int) -> SparseWeight:
        """A weight of layout ``"bitmap"`` from its tensors: the kept values row by row, int32 bits
        [N, ceil(in_features/32)] and int64 row offsets [N + 1].

        Raises:
            ValueError: bits and offsets disagree (the first row is named), the number of values is another, or dtypes,
                shapes or devices do not fit.
        """
        check_stored("bitmap", values, mask_bits, row_offsets, in_features)
        parts = (values.detach().contiguous(), mask_bits.contiguous(), row_offsets.contiguous())
        return cls(*parts, in_features=in_features)

    @classmethod
    def from_stored(
        cls,
        values: Tensor,
        mask_bits: Tensor | None,
        index: Tensor | None,
        in_features: int,
        quantization: QuantizationGrid | None = None,
    ) -> SparseWeight:
        """A weight of any layout from its tensors, checked: :meth:`from_sparse24`, :meth:`from_bitmap`, or dense values
        that are zero off the mask; or codes on a grid, which is checked too.

        Raises:
            ValueError: as they; a dense value off the mask is not zero; the mask bits' shape or dtype is wrong; a
                quantised weight's grid, codes or mask are none.
        """
        check_stored(layout_of(index), values, mask_bits, index, in_features, quantization)
        values = values.detach().contiguous()
        return cls(values, mask_bits, index, in_features=in_features, quantization=quantization)

    @classmethod
    def from_quantized(cls, codes: Tensor, grid: QuantizationGrid, mask: Tensor, layout: str = "auto") -> SparseWeight:
        """Store codes on a grid, which are not changed where they are kept. Waits for the device.

        Args:
            codes: [N, K], int8, or of an e4m3 grid float8_e4m3fn, of which -0 becomes +0.
            grid: their grid.
            mask: bool [N, K], True where kept; codes off it become the zero point, whatever they are.
            layout: as in :meth:`from_dense`.

        Raises:
            ValueError: the layout is unknown or does not fit the mask, the grid is none, a code is out of range, or
                shapes, dtypes or devices do not fit.
        """
        check_choice("layout", layout, LAYOUTS)
        grid.check()
        check_codes(codes, grid)
        check_device(codes.device)
        check_mask(mask, codes)
        if grid.kind == "e4m3":
            codes = without_negative_zero(codes)
        return cls._of_codes(codes, grid, pack_mask(mask), layout)

    @classmethod
    def _of_codes(cls, codes: Tensor, grid: QuantizationGrid, bits: Tensor, layout: str) -> SparseWeight:
        itemsize, offsets = (0.5, padded_offsets) if grid.kind == "int4" else (1, row_offsets)
        index = index_for(layout, bits, codes.shape[1], itemsize, bits.nbytes, offsets)
        values = pack_codes(codes, grid.kind, bits, index)
        return cls(values, None if layout_of(index) == "2:4" else bits, index, quantization=grid)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        mask: Tensor | None = None,
        kind: str = "int4",
        group: int | None = None,
        *,
        symmetric: bool = True,
        scale_dtype: torch.dtype | None = None,
        layout: str = "auto",
    ) -> SparseWeight:
        """Quantise a dense weight [N, K] with zeros by rounding to nearest; a kept weight may become the code of 0 and
        stays kept. Waits for the device.

        Args:
            weight: as in :meth:`from_dense`; finite.
            mask: bool [N, K], True where kept; None: kept where ``weight != 0``.
            kind: ``"int8"``, ``"int4"`` or ``"e4m3"`` (float8_e4m3fn).
            group: neighbouring columns that share a scale: 32, 64, 128, or None, a whole row.
            symmetric: False, for int8 and int4: a zero point for each group.
            scale_dtype: float32, bfloat16 or float16; None: the weight's, of float64 float32.
            layout: as in :meth:`from_dense`.

        Raises:
            ValueError: as :meth:`from_dense`; a kind or group that is unknown or does not fit; a value is not finite.
        """
        dense = plain(weight)
        check_weight(dense)
        if mask is None:
            mask = dense != 0
        check_mask(mask, dense)
        dense = torch.where(mask, dense, 0.0)
        grid = choose_grid(dense, kind, group, symmetric=symmetric, scale_dtype=scale_dtype)
        return cls.from_quantized(quantize_codes(dense, mask, grid), grid, mask, layout)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values; of a quantised weight its scales', which is that of :meth:`to_dense`."""
        return self.values.dtype if self.quantization is None else self.quantization.scales.dtype

    @property
    def device(self) -> torch.device:
        """Where all its tensors are."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes stored: values, and the packed mask, metadata or row offsets, scales and zero points with them."""
        tensors = (self.values, self.mask_bits, self.index, self.quantization)
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def density(self) -> float:
        """Fraction of weights that are kept. Counted at each call, and waits for the device, except of a bitmap."""
        is_counted = self.layout == "bitmap" and self.quantization is None
        kept = self.values.numel() if is_counted else int(self.mask().sum())
        return kept / max(self.shape.numel(), 1)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense tensor [N, K], with -0.0 as +0.0, in its dtype or, of a quantised one, rounded once to
        ``dtype``."""
        check_whole("values", self.values)
        args = (*self.no_adapter(), 0.0, *NO_DRAWS, *self.grid(dtype=dtype))
        dense: Tensor = lors.merge(self.values, self.mask_bits, self.index, *args)
        return dense if dtype is None else dense.to(dtype)

    def no_adapter(self) -> tuple[Tensor, Tensor]:
        """lora_A [0, K] and lora_B [N, 0]: merging them is decompressing."""
        N, K = self.shape
        return self.values.new_empty(0, K, dtype=self.dtype), self.values.new_empty(N, 0, dtype=self.dtype)

    def grid(self, requantize: Requantization = NOT_REQUANTIZED, dtype: torch.dtype | None = None) -> Grid:
        """The last arguments of the operators; of a merge that is to be rounded to ``dtype``: they merge into the
        scales' dtype, and float32 ones are the same numbers."""
        if self.quantization is None:
            return NO_GRID
        grid = self.quantization.arguments(requantize)
        return grid if dtype in (None, self.dtype) else grid._replace(scales=self.quantization.scales.float())

    def codes(self) -> Tensor:
        """The codes of a quantised weight, one for each place: int8 [N, K], or of e4m3 float8_e4m3fn; off the mask that
        of zero.

        Raises:
            ValueError: the weight is not quantised.
        """
        grid = self.quantization
        if grid is None:
            raise ValueError(
                f"The weight has no codes, but {self.dtype} values; quantise it with SparseWeight.quantize."
            )
        check_whole("values", self.values)
        # As bfloat16, which holds every byte exactly, for the one way out of the layouts.
        numbers, index = unpadded(self.values, grid.kind, self.mask_bits, self.index)
        return as_codes(self._with(numbers.to(torch.bfloat16), self.mask_bits, index).to_dense(), self.mask(), grid)

    def mask(self) -> Tensor:
        """bool [N, K], True where the weight is kept."""
        check_whole("values", self.values)
        if self.layout == "dense" and self.mask_bits is None:
            return self.values != 0
        return unpack_mask(self.packed_mask(), self.shape[1])

    def packed_mask(self) -> Tensor:
        """The mask as bits: int32 [N, ceil(K/32)], bit k % 32 of word k / 32."""
        check_whole("values", self.values)
        if self.index is not None and self.layout == "2:4":
            return sparse24_mask(self.index, self.shape[1])
        return pack_mask(self.values != 0) if self.mask_bits is None else self.mask_bits

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> SparseWeight:
        """Move to a device or convert to a floating dtype. The mask does not change, and of a quantised weight only the
        device does: its codes and scales are what they are.

        Converting to a type of smaller range can round a kept value to zero, so the mask of a dense weight is made
        explicit where it was implicit and the conversion would change it.

        Raises:
            ValueError: a dtype other than float32, bfloat16, float16 and float64.
            RuntimeError: no kernel of this build supports the device.
        """
        check_whole("values", self.values)
        if not isinstance(device_or_dtype, torch.dtype):
            check_device(torch.device(device_or_dtype))
            values, bits, index = (
                None if t is None else t.to(device_or_dtype) for t in (self.values, self.mask_bits, self.index)
            )
            grid = None if self.quantization is None else self.quantization.to(device_or_dtype)
            assert values is not None
            return SparseWeight(values, bits, index, in_features=self.shape[1], quantization=grid)
        if device_or_dtype not in DTYPES:
            raise ValueError(f"dtype is {device_or_dtype}; it must be float32, bfloat16, float16 or float64.")
        if self.quantization is not None:
            return self
        values = self.values.to(device_or_dtype)
        bits = self.mask_bits
        if self.layout == "dense" and bits is None and bool(((values == 0) & (self.values != 0)).any()):
            bits = pack_mask(self.values != 0)
        return self._with(values, bits, self.index)

    @torch.no_grad()
    def merge(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        *,
        rounding: str = "nearest",
        seed: int | None = None,
        requantize: Requantization = NOT_REQUANTIZED,
    ) -> SparseWeight:
        """The merged weight in the same layout, ``W + s M o (B A)`` (arXiv 2501.08582, eq. 3); the mask stays.

        Accumulated in float32 (float64 for float64), rounded once to the weight's dtype; not differentiable. A merged
        value that rounds to zero stays kept: a dense weight's mask is then made explicit. Of a quantised weight it
        holds values; with ``requantize`` it is quantised again, and has the codes that the layer computed with.

        Args:
            lora_A: [r, K], float32, bfloat16, float16 or float64; [E, r, K] of a stack of E experts.
            lora_B: [N, r], likewise; [E, N, r] of a weight [E N, K].
            scaling: s, e.g. ``lora_alpha / r``.
            rounding: as in :func:`lors_cuda.lors_linear`.
            seed: of "stochastic", likewise.
            requantize: steps of 0, 1 or 16, and the seed of the dither: a layer's ``requantization``.

        Raises:
            TypeError: an adapter is no tensor.
            ValueError: ``rounding`` is unknown, or ``seed`` does not go with it; ``requantize`` does not fit the
                weight; shapes, dtypes or devices do not fit; a NaN or an infinity in what is merged, or a merged value
                beyond the range of the weight's dtype (the first place is named).
        """
        check_whole("values", self.values)
        check_adapters(self, lora_A, lora_B, experts=None)
        draws = rounding_draws(rounding, seed)
        check_requantization(requantize, self.quantization, draws.any)
        merged = self._merged(lora_A, lora_B, float(scaling), draws, requantize)
        if merged.device.type != "meta":
            check_merge(self, lora_A, lora_B, float(scaling), merged)
        return merged

    def _merged(
        self, lora_A: Tensor, lora_B: Tensor, scaling: float, draws: Draws, requantize: Requantization
    ) -> SparseWeight:
        bits, index, quantization = self.mask_bits, self.index, self.quantization
        if self.layout == "2:4" and not draws.any and quantization is None:
            return self._with(lors.sparse24_merge(self.values, index, lora_A, lora_B, scaling), None, index)
        # Codes are read off what is merged into float32, where each one's value is another number.
        grid = self.grid(requantize, torch.float32 if requantize.steps else None)
        merged = lors.merge(self.values, bits, index, lora_A, lora_B, scaling, *draws, *grid)
        if quantization is not None and requantize.steps:
            if merged.device.type != "meta":
                check_merge(self, lora_A, lora_B, scaling, SparseWeight(merged))
            coarser = quantization.coarser(requantize.steps)
            codes = quantize_codes(merged, self.mask(), coarser)
            return self._of_codes(codes, coarser, self.packed_mask(), self.layout)
        if index is not None:  # a result that is drawn, or made of codes, is dense
            mask = self.packed_mask()
            return self._compressed(merged, mask, index if self.layout == "2:4" else row_offsets(mask))
        if bits is None and bool(((merged == 0) & (self.values != 0)).any()):
            bits = pack_mask(self.values != 0)
        return self._with(merged, bits, None)

    def fingerprint(self) -> str:
        """SHA-256 over the shape and the packed mask, as hex: equal exactly when the masks are, whatever the layout."""
        return sha256(f"{self.shape[0]}x{self.shape[1]}:", self.packed_mask())

    def digest(self) -> Tensor:
        """What must never be averaged as float32 [64], a hexadecimal digit each; without content on the meta device.

        :meth:`fingerprint`, and of a quantised weight a SHA-256 over its codes, scales and zero points with it. Small
        numbers, which every floating type holds, and averages of equal ones come back by rounding.
        """
        if type(self.values) not in (Tensor, torch.nn.Parameter) or self.values.is_meta:
            return torch.empty(64, device=self.device)
        digits = self.fingerprint()
        if self.quantization is not None:
            digits = sha256(digits, self.values, self.quantization.scales, self.quantization.zero_points)
        return torch.tensor([float(int(digit, 16)) for digit in digits], device=self.device)

    def zeros(self, dtype: torch.dtype) -> SparseWeight:
        """A weight of zeros with this mask and layout; its values are one stored number, also where autograd keeps
        them."""
        bits, index = None if self.layout == "2:4" else self.packed_mask(), self.index
        N, K = self.shape
        count = {"dense": (N, K), "2:4": (N, K // 2)}.get(self.layout, tuple(self.values.shape))
        if self.layout == "bitmap" and self.quantization is not None:
            index = row_offsets(self.packed_mask())  # without what makes the number of int4 codes even
            count = (int(index[-1]),)
        values = torch.zeros((), dtype=dtype, device=self.device).expand(count)
        return SparseWeight(values, bits, index, in_features=self.shape[1])

    def has_digest(self, digest: Tensor) -> bool:
        """Whether this is :meth:`digest`, up to rounding; also where one of them has no content."""
        if digest.is_meta or self.values.is_meta:
            return True
        return torch.equal(digest.detach().cpu().float().round(), self.digest().cpu())

    def _with(self, values: Tensor, mask_bits: Tensor | None, index: Tensor | None) -> SparseWeight:
        """Another weight of this layout and shape."""
        return SparseWeight(values, mask_bits, index, in_features=self.shape[1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"quantization": None, **state})
        if self.index is not None or self.quantization is not None:
            self.from_stored(self.values, self.mask_bits, self.index, self.shape[1], self.quantization)

    def __repr__(self) -> str:
        density = "unknown" if self.device.type == "meta" else f"{self.density:.3f}"
        quantization = "" if self.quantization is None else f", quantization={self.quantization}"
        return (
            f"SparseWeight(layout={self.layout!r}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, density={density}{quantization})"
        )
