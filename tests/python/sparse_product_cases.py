# SPDX-License-Identifier: Apache-2.0
"""2:4 problems, their products by the operators, and what cuSPARSELt was called for."""

from __future__ import annotations

import functools

import torch

import fake_binding
from cases import Case, make_case
from lors_cuda import SparseWeight

DTYPES = (torch.bfloat16, torch.float16)
T, N, K, R = 24, 32, 64, 4


def transposable_mask(n: int, k: int) -> torch.Tensor:
    """bool [n, k], 2:4 along both sides, by diagonals."""
    return ((torch.arange(n)[:, None] + torch.arange(k)) % 2).bool()


class StoredCase(Case):
    """Compressed once: asking for the arguments of a call shall not call the library."""

    stored = functools.cached_property(lambda self: Case.stored.fget(self))


def problem(seed: int, dtype: torch.dtype, *, transposable: bool = False, **fields: object) -> Case:
    case = StoredCase(**vars(make_case(seed, T, N, K, R, dtype, layout="2:4", **fields)))
    if transposable:
        values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
        case.weight = torch.where(transposable_mask(N, K), values, 0.0)
    assert case.stored[2].dtype == torch.uint8
    return case


def stored(case: Case) -> SparseWeight:
    return SparseWeight.from_dense(case.weight, "2:4", case.mask)


def linear(ops, case: Case, products: str = "sparse", metadata: torch.Tensor | None = None) -> torch.Tensor:
    bias, s = case.bias, case.scaling
    return ops.linear(case.input, *case.adapted, bias, s, "lors", None, metadata, False, products)


def backward(ops, case: Case, products: str = "sparse", transposable: bool = True) -> tuple[torch.Tensor, ...]:
    args = (*case.adapted, case.bias, case.scaling, "lors", True, True, True, None, transposable, products)
    return ops.linear_backward(case.grad_output, case.input, *args)


class Calls:
    """What the library was called for inside the block."""

    def __enter__(self) -> Calls:
        self._before = {name: fake_binding.calls(name) for name in ("Matmul", "MatmulSearch", "SpMMACompress2")}
        return self

    def __exit__(self, *error: object) -> None:
        self.counts = {name: fake_binding.calls(name) - before for name, before in self._before.items()}

    def __getattr__(self, name: str) -> int:
        return self.counts[name]
