# SPDX-License-Identifier: Apache-2.0
"""Random stacks of experts with rows for some of them: each expert is a case of its own, which the checks of one linear
hold for."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from cases import Case, lors, make_case
from expectations import check_linear, check_linear_backward
from lors_cuda import SparseWeight
from lors_cuda.formats import pack_mask

COUNTS = (3, 0, 17, 1, 9)  # rows of each expert; an idle one, one row, more than a few


@dataclasses.dataclass(repr=False)
class Stack:
    """`experts` hold their own rows, in order; the tensors hold all of them, and rows of no expert, NaN."""

    experts: list[Case]
    input: Tensor  # [S, K], or [T, K] with rows
    grad_output: Tensor  # [S, N]
    offsets: Tensor  # int32 [E]
    rows: Tensor | None  # int32 [S]
    stored: tuple[Tensor, Tensor | None, Tensor | None]
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float

    @property
    def adapted(self) -> tuple[Tensor | None, ...]:
        return *self.stored, self.lora_A, self.lora_B

    @property
    def weight(self) -> SparseWeight:
        weight, mask, index = self.stored
        return SparseWeight(weight, mask, index, in_features=self.lora_A.shape[-1])

    def own(self) -> list[slice]:
        ends = self.offsets.tolist()
        return [slice(*pair) for pair in zip([0, *ends], ends, strict=False)]

    def linear(self, gradient: str = "lors", merged: Tensor | None = None, grid: tuple = ()) -> Tensor:
        args = (self.input, self.offsets, *self.adapted, self.bias, self.scaling, gradient, merged, self.rows, *grid)
        return lors.grouped_linear(*args)

    def linear_backward(
        self,
        gradient: str,
        needs: tuple[bool, bool, bool] = (True, True, True),
        merged: Tensor | None = None,
        grid: tuple = (),
    ) -> tuple[Tensor, ...]:
        args = (self.offsets, *self.adapted, self.bias, self.scaling, gradient, *needs, merged, self.rows, *grid)
        return lors.grouped_linear_backward(self.grad_output, self.input, *args)

    def check(self, output: Tensor, grads: tuple[Tensor, ...], gradient: str) -> None:
        """Y [S, N] and (dX by row [S, K], dA, dB, db) of the operators."""
        grad_input, *of_experts = grads
        for e, (own, case) in enumerate(zip(self.own(), self.experts, strict=True)):
            check_linear(output[own], case)
            mine = [t[e] if t.numel() else t for t in of_experts]
            check_linear_backward((grad_input[own], *mine), case, gradient)
            if own.start == own.stop:
                assert not any(bool(t.any()) for t in mine), f"expert {e} has no rows, but a gradient"
        last = self.offsets[-1]
        assert not bool(output[last:].any())
        assert not bool(grad_input[last:].any())


def make_stack(
    seed: int,
    counts: tuple[int, ...] = COUNTS,
    size: tuple[int, int, int] = (12, 64, 3),
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "dense",
    explicit_mask: bool = False,
    bias: bool = True,
    tokens: int | None = None,
    rest: int = 2,
    **options: object,
) -> Stack:
    """`tokens`: how many rows the input has, each gathered equally often; None: the input's rows are the experts'."""
    N, K, r = size
    options |= {"layout": layout, "explicit_mask": explicit_mask, "bias": bias}
    cases = [make_case(seed + e, count, N, K, r, dtype, **options) for e, count in enumerate(counts)]
    ends = list(itertools.accumulate(counts))
    device, first = cases[0].weight.device, cases[0]
    nothing = first.input.new_full((rest, K), torch.nan)
    input, rows = torch.cat([*(case.input for case in cases), nothing]), None
    if tokens is not None:
        S = ends[-1] + rest
        assert S % tokens == 0
        rows = (torch.randperm(S, generator=torch.Generator().manual_seed(seed)) % tokens).int().to(device)
        input = make_case(seed, tokens, N, K, r, dtype, **options).input
        spans = zip([0, *ends], ends, strict=False)
        cases = [case.replace(input=input[rows[a:b]]) for case, (a, b) in zip(cases, spans, strict=True)]
    dense, mask = torch.cat([case.weight for case in cases]), None
    if explicit_mask:
        mask = torch.cat([case.mask for case in cases])
    stored = (dense, None if mask is None else pack_mask(mask), None)
    if layout != "dense":
        weight = SparseWeight.from_dense(dense, layout, mask)
        stored = (weight.values, weight.mask_bits, weight.index)
    return Stack(
        experts=cases,
        input=input,
        grad_output=torch.cat([*(case.grad_output for case in cases), nothing.new_full((rest, N), torch.nan)]),
        offsets=torch.tensor(ends, dtype=torch.int32, device=device),
        rows=rows,
        stored=stored,
        lora_A=torch.stack([case.lora_A for case in cases]),
        lora_B=torch.stack([case.lora_B for case in cases]),
        bias=torch.stack([case.bias for case in cases]) if bias else None,
        scaling=first.scaling,
    )
