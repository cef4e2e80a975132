# SPDX-License-Identifier: Apache-2.0
# csrc/core/include/lors/quantization.h has the formulas of what is computed with codes. Here: which grid a weight gets,
# and its codes. How they lie in each layout: codes.py.
"""Grids of quantised weights: their checks, how one is chosen for a weight, and its codes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ._checks import all_finite, check_choice, check_flag, check_tensor
from ._grid import NOT_REQUANTIZED, Grid, Requantization

REMAINDERS = ("dither", "none", "stored")
KINDS = ("int8", "int4", "e4m3")
GROUPS = (32, 64, 128)
LIMITS = {"int8": (-128, 127), "int4": (-8, 7), "e4m3": (-448, 448)}
CODES = {"int8": torch.int8, "int4": torch.int8, "e4m3": torch.float8_e4m3fn}  # one for each weight
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Between these a scale's product with any code's distance from zero, and 1 / (16 scale), are normal float32 numbers.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-117, 2.0**118
REMAINDER_STEPS = 16  # how much finer than int4 the int8 grid of a stored remainder is


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizationGrid:
    """The grid that the codes q of a weight [N, K] lie on: ``w = (q - z) s`` with a scale s and a zero point z for each
    group of columns.

    Attributes:
        kind: ``"int8"`` (-128 to 127), ``"int4"`` (-8 to 7) or ``"e4m3"`` (float8_e4m3fn).
        group: how many neighbouring columns share s and z: 32, 64, 128 or K, of which K is a multiple.
        scales: [N, K / group], float32, bfloat16 or float16; from 2^-117 to 2^118.
        zero_points: int8 [N, K / group], in the range of the codes; None: 0. e4m3 has none.
    """

    kind: str
    group: int
    scales: Tensor
    zero_points: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(N, K) of the weight."""
        return torch.Size((self.scales.shape[0], self.group * self.scales.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of the scales and zero points."""
        return self.scales.nbytes + (0 if self.zero_points is None else self.zero_points.nbytes)

    def to(self, device: torch.device | str) -> QuantizationGrid:
        """The same grid on a device."""
        zero_points = None if self.zero_points is None else self.zero_points.to(device)
        return dataclasses.replace(self, scales=self.scales.to(device), zero_points=zero_points)

    def coarser(self, steps: int) -> QuantizationGrid:
        """The grid on which a merged weight is requantised: this one, or for ``steps`` 16 int4 of 16 times its step."""
        if steps == 1:
            return self
        zero_points = None if self.zero_points is None else self.zero_points // steps
        return QuantizationGrid("int4", self.group, self.scales * steps, zero_points)

    def finer(self) -> QuantizationGrid:
        """The int8 grid of a sixteenth of this int4 grid's step, for codes that remember what int4 drops.

        A scale whose sixteenth is no number of the scales' dtype is rounded; :meth:`coarser` of the result is then what
        a merged weight is requantised to.
        """
        if self.kind != "int4":
            raise ValueError(f"kind is {self.kind!r}; only an int4 grid has a finer one, of int8.")
        zero_points = None if self.zero_points is None else self.zero_points * REMAINDER_STEPS
        return QuantizationGrid("int8", self.group, self.scales / REMAINDER_STEPS, zero_points)

    def arguments(self, requantize: Requantization = NOT_REQUANTIZED) -> Grid:
        """As the operators take it."""
        return Grid(self.scales, self.zero_points, self.kind, *requantize)

    def by_column(self) -> tuple[Tensor, Tensor | int]:
        """The scale, float32, and zero point, int16 or 0, of every place [N, K]."""
        scales = self.scales.float().repeat_interleave(self.group, 1)
        if self.zero_points is None:
            return scales, 0
        return scales, self.zero_points.to(torch.int16).repeat_interleave(self.group, 1)

    def __repr__(self) -> str:
        with_zero_points = "" if self.zero_points is None else ", with zero points"
        return f"{self.kind} in groups of {self.group}{with_zero_points}"

    def check(self) -> None:
        """Refuse what is no grid; scales and zero points may hold anything.

        Raises:
            TypeError: a part is no tensor.
            ValueError: the kind or group is unknown, shapes, dtypes or devices do not fit, or a scale or zero point is
                out of range (the first place is named).
        """
        check_choice("kind", self.kind, KINDS)
        check_tensor("scales", self.scales)
        if self.scales.dtype not in SCALE_DTYPES:
            raise ValueError(f"scales have dtype {self.scales.dtype}; they must be float32, bfloat16 or float16.")
        if self.scales.dim() != 2 or 0 in self.scales.shape:
            raise ValueError(
                f"scales have shape {tuple(self.scales.shape)}; they must be [out_features, in_features / group]."
            )
        check_group(self.group, self.shape[1], self.kind)
        if self.zero_points is not None:
            check_tensor("zero_points", self.zero_points)
            if self.kind == "e4m3":
                raise ValueError("There are zero_points of an e4m3 weight, whose codes are numbers; leave them out.")
            if self.zero_points.dtype != torch.int8 or self.zero_points.shape != self.scales.shape:
                raise ValueError(
                    f"zero_points are {self.zero_points.dtype} with shape {tuple(self.zero_points.shape)}; they must "
                    f"be int8 {tuple(self.scales.shape)}, as the scales. A zero point that is no whole number has no "
                    "code for 0, and pruned weights would not stay zero."
                )
            if self.zero_points.device != self.scales.device:
                raise ValueError(
                    f"zero_points are on {self.zero_points.device} and scales on {self.scales.device}; move them to "
                    "the same device."
                )
        if self.scales.device.type == "meta":
            return
        scales = self.scales.float()
        wrong = ~((scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE))  # NaN too
        _check_range("scales", self.scales, wrong, self.group, "a scale is positive, from 2^-117 to 2^118")
        if self.zero_points is not None and self.kind == "int4":
            low, high = LIMITS[self.kind]
            wrong = (self.zero_points < low) | (self.zero_points > high)
            _check_range("zero_points", self.zero_points, wrong, self.group, "one of int4 is from -8 to 7")


def _check_range(name: str, tensor: Tensor, wrong: Tensor, group: int, rule: str) -> None:
    """Refuse a tensor of numbers for ``group`` columns each that has wrong ones."""
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{int(wrong.sum())} of {wrong.numel()} {name} are out of range, first that of row {row}, "
            f"{'column' if group == 1 else 'columns from'} {place * group}: it is {tensor[row, place].item()}, and "
            f"{rule}. Quantise the weight again, or load another copy of the file."
        )


def check_group(group: object, in_features: int, kind: str) -> None:
    """Refuse a group that no kernel has or that does not divide the columns.

    Raises:
        ValueError: so it is; or int4 codes of an odd number of columns.
    """
    is_known = isinstance(group, int) and not isinstance(group, bool) and (group in GROUPS or group == in_features)
    if not is_known or in_features % int(str(group)):
        raise ValueError(
            f"group is {group!r}; for in_features = {in_features} it must be 32, 64 or 128 and divide that, or be "
            f"{in_features}, which gives each row one scale."
        )
    if kind == "int4" and in_features % 2:
        raise ValueError(f"in_features is {in_features}; int4 codes lie two in a byte, and need an even number.")


def choose_grid(
    weight: Tensor,
    kind: str,
    group: int | None = None,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> QuantizationGrid:
    """A grid on which the codes of a weight [N, K] reach its largest magnitudes, as compressed-tensors chooses it.

    A group's largest magnitude over half the number of steps (127.5, 7.5 or, e4m3, 448) is its scale; not symmetric:
    the range that it takes up, 0 included, over that number, and the zero point is the code of 0. A group of zeros gets
    the scale 2^-23.

    Args:
        weight: floating; zero where it is not kept.
        kind: ``"int8"``, ``"int4"`` or ``"e4m3"``.
        group: as in :class:`QuantizationGrid`; None: one for each row.
        symmetric: False, of int8 and int4: with zero points.
        scale_dtype: float32, bfloat16 or float16; None: the weight's, of float64 float32.

    Raises:
        ValueError: a value is not finite; an argument is unknown, or does not fit; a scale would be out of range.
    """
    if weight.device.type != "meta" and not all_finite(weight):
        row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise ValueError(f"weight[{row}, {column}] is {weight[row, column].item()}; only finite numbers have a code.")
    check_choice("kind", kind, KINDS)
    N, K = weight.shape
    group = K if group is None else group
    check_group(group, K, kind)
    if kind == "e4m3" and not symmetric:
        raise ValueError("symmetric is False and kind is 'e4m3', which has no zero points; leave symmetric out.")
    if scale_dtype is None:
        scale_dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype is {scale_dtype}; it must be float32, bfloat16 or float16.")
    low, high = LIMITS[kind]
    least, most = weight.float().view(N, K // group, group).aminmax(dim=-1)
    least, most = least.clamp_max(0), most.clamp_min(0)
    if symmetric:
        scales = torch.maximum(-least, most) / ((high - low) / 2)
        zero_points = None
    else:
        scales = (most - least) / (high - low)
    scales = scales.clamp_min(torch.finfo(torch.float32).eps).to(scale_dtype)
    if not symmetric:
        zero_points = (low - least / scales.float()).round().clamp(low, high).to(torch.int8)
    grid = QuantizationGrid(kind, group, scales, zero_points)
    grid.check()
    return grid


def quantize_codes(weight: Tensor, mask: Tensor, grid: QuantizationGrid) -> Tensor:
    """The codes of a weight [N, K] on a grid, rounded to nearest; off the mask that of zero.

    As the kernels requantise: in float32, by the reciprocal of the scale, beyond the last code that one.

    Returns:
        int8 [N, K], or of e4m3 float8_e4m3fn.
    """
    scales, zero_points = grid.by_column()
    steps = torch.where(mask, weight.float() * scales.reciprocal(), 0.0)
    low, high = LIMITS[grid.kind]
    if grid.kind == "e4m3":
        return without_negative_zero(steps.clamp(low, high).to(torch.float8_e4m3fn))
    return (steps.round() + zero_points).clamp(low, high).to(torch.int8)


def without_negative_zero(codes: Tensor) -> Tensor:
    """float8_e4m3fn codes with -0 as +0."""
    stored = codes.view(torch.int8)
    return stored.masked_fill(stored == -128, 0).view(codes.dtype)


def check_codes(codes: Tensor, grid: QuantizationGrid) -> None:
    """Refuse what are no codes [N, K] of a grid, one for each weight.

    Raises:
        ValueError: dtype, shape or device do not fit, or a code is out of range (the first place is named).
    """
    check_tensor("codes", codes)
    wanted = CODES[grid.kind]
    if codes.dtype != wanted or codes.shape != grid.shape:
        raise ValueError(
            f"codes are {codes.dtype} with shape {tuple(codes.shape)}; for this grid they must be {wanted} "
            f"{tuple(grid.shape)}."
        )
    if codes.device != grid.scales.device:
        raise ValueError(f"codes are on {codes.device} and scales on {grid.scales.device}; move them to one device.")
    if codes.device.type == "meta" or grid.kind == "int8":
        return
    low, high = LIMITS[grid.kind]
    wrong = codes.float().isnan() if grid.kind == "e4m3" else (codes < low) | (codes > high)
    _check_range("codes", codes, wrong, 1, f"a code of {grid.kind} is from {low} to {high}")


def check_remainder(requantize: bool, remainder: str | None) -> None:
    """Refuse values of the options ``requantize`` and ``remainder`` that cannot be together."""
    check_flag("requantize", requantize)
    if remainder is None:
        return
    check_choice("remainder", remainder, REMAINDERS)
    if not requantize and remainder != "none":
        raise ValueError(
            f"remainder={remainder!r} says what stands for what requantize=True rounds away; without that nothing is "
            f"rounded. Leave remainder={remainder!r} out, or set requantize=True."
        )


def default_remainder(requantize: bool, grid: QuantizationGrid | None) -> str:
    """What ``remainder=None`` means for a weight."""
    return "dither" if requantize and grid is not None and grid.kind == "int4" else "none"


def requantization(requantize: bool, remainder: str, dither_seed: int) -> Requantization:
    """What these options make of a merge."""
    if not requantize:
        return NOT_REQUANTIZED
    return Requantization(REMAINDER_STEPS if remainder == "stored" else 1, dither_seed if remainder == "dither" else -1)


def check_requantization(requantize: Requantization, grid: QuantizationGrid | None, has_draws: bool) -> None:
    """Refuse to requantise what has no grid for it.

    Raises:
        ValueError: the steps are unknown or do not fit the grid, there is a dither that nothing takes, or the merge
            draws random numbers.
    """
    steps, seed = requantize
    if steps not in (0, 1, REMAINDER_STEPS):
        raise ValueError(f"requantize has {steps!r} steps; it must be 0, 1 or {REMAINDER_STEPS}.")
    if not steps:
        if seed >= 0:
            raise ValueError("There is a dither and nothing is requantised; leave one of them out.")
        return
    if grid is None:
        raise ValueError("The weight holds values, so there is no grid to requantise to. Quantise it first.")
    if has_draws:
        raise ValueError(
            "The merged weight is requantised, and beside that rounded by chance or given noise (rounding='stochastic' "
            "or Flat-LoRA). Codes are rounded to nearest; use rounding='nearest' and no noise, or requantize=False."
        )
    if seed >= 0 and grid.kind == "e4m3":
        raise ValueError("There is a dither of an e4m3 weight, whose steps have no one size. Use remainder='none'.")
    if steps == REMAINDER_STEPS:
        off = grid.zero_points is not None and not grid.zero_points.is_meta and bool((grid.zero_points % steps).any())
        if grid.kind != "int8" or off:
            raise ValueError(
                "remainder is 'stored', and the weight is no int8 one on a grid 16 times finer than an int4 grid, "
                "with zero points that are multiples of 16. Make it by QuantizationGrid.finer()."
            )
