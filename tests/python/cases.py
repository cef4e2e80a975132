# SPDX-License-Identifier: Apache-2.0
"""Random problems of any shape, dtype and mask form, and the awkward shapes that the tests go through."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lors_cuda import SparseWeight, reference
from lors_cuda.formats import pack_mask

lors = torch.ops.lors

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floats(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that the kernels of a device compute in: float64 is the CPU's."""
    return tuple(d for d in FLOATS if device.type == "cpu" or d != torch.float64)


def skip_unserved(device: torch.device, *dtypes: torch.dtype) -> None:
    """Skip a case whose dtypes no kernel of its device takes."""
    if not {*dtypes} <= {*floats(device)}:
        import pytest  # bench/gpu/check.py uses the cases where there may be none

        pytest.skip(f"{device.type}: float64 is computed on the CPU only")


# (dtype of lora_A, dtype of lora_B); None: the weight's.
ADAPTER_DTYPES = (
    (None, None),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float16),
)

# (tokens, out_features, in_features, r): no token, one, a few more than a tile; one feature; sides that no vector,
# tile, word of mask or cache block divides, and some that all of them do.
SHAPES = (
    (0, 5, 9, 2),
    (1, 1, 1, 1),
    (17, 1, 33, 1),
    (129, 6, 1, 1),
    (1, 7, 70, 3),
    (17, 12, 64, 16),
    (129, 13, 257, 16),
    (2, 8, 8, 64),
    (17, 48, 33, 64),
    (129, 31, 70, 256),
    (1, 300, 515, 16),
    (17, 300, 515, 3),
    (129, 100, 515, 64),
    (5, 6, 32, 16),
    (64, 128, 128, 16),
    (7, 100, 31, 5),
    (6, 96, 384, 8),
    (13, 129, 401, 16),
    (97, 17, 385, 3),
    (100, 130, 24, 24),
    (3, 385, 12, 4),
    (25, 1000, 40, 16),
    (17, 2, 3000, 8),
)


@dataclasses.dataclass(repr=False)
class Case:
    """One adapted linear with its data. `mask` None: kept where the weight is not zero.

    `weight` and `mask` are dense for every `layout`, which says how the ops are given them.
    """

    input: Tensor  # [T, K]
    weight: Tensor  # [N, K]
    mask: Tensor | None  # bool [N, K]
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    bias: Tensor | None  # [N]
    scaling: float
    grad_output: Tensor  # [T, N]
    layout: str = "dense"

    def __repr__(self) -> str:
        held = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return f"Case({', '.join(f'{k}: {str(v.dtype)[6:]} {list(v.shape)}' for k, v in held.items())}, {self.scaling})"

    @property
    def kept(self) -> Tensor:
        return reference.kept(self.weight, self.mask)

    @property
    def bits(self) -> Tensor | None:
        return None if self.mask is None else pack_mask(self.mask)

    @property
    def stored(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight, mask, index) as the ops take them; a dense weight is not cleaned of what stands off its mask."""
        if self.layout == "dense":
            return self.weight, self.bits, None
        w = SparseWeight.from_dense(self.weight, self.layout, self.mask)
        return w.values, w.mask_bits, w.index

    @property
    def adapted(self) -> tuple[Tensor | None, ...]:
        return *self.stored, self.lora_A, self.lora_B

    def replace(self, **fields: object) -> Case:
        return dataclasses.replace(self, **fields)

    # The ops, as the registered schemas spell them.
    def merge(self) -> Tensor:
        return lors.merge(*self.adapted, self.scaling)

    def linear(self, gradient: str = "lors") -> Tensor:
        args = (self.input, *self.adapted, self.bias, self.scaling, gradient)
        return lors.linear(*args)

    def linear_backward(self, gradient: str, needs: tuple[bool, bool, bool] = (True, True, True)) -> tuple[Tensor, ...]:
        args = (*self.adapted, self.bias, self.scaling, gradient, *needs)
        return lors.linear_backward(self.grad_output, self.input, *args)


def make_case(
    seed: int,
    tokens: int,
    out_features: int,
    in_features: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    explicit_mask: bool = False,
    bias: bool = False,
    adapter_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
    activation_dtype: torch.dtype | None = None,
    density: float = 0.5,
    scaling: float = 0.75,
    layout: str = "dense",
) -> Case:
    """A case with standard normal values and a delta as large as the weight.

    Half of the zeros are -0.0; a row of zeros and a full row are in where there is room. An explicit mask keeps some
    zeros, and the weight off it is nonzero garbage. For layout "2:4" no group of four keeps more than two.

    `scaling` should be a float32 number. One that is not is rounded on its way to the float32 kernels, by one relative
    error that is common to all elements: that leans, within rounding, and the signed-bias test would say so.
    """
    dtype_A, dtype_B = (dtype if d is None else d for d in adapter_dtypes)
    activation_dtype = dtype if activation_dtype is None else activation_dtype
    skip_unserved(torch.device(device), dtype, dtype_A, dtype_B, activation_dtype)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    T, N, K = tokens, out_features, in_features
    kept = torch.rand(N, K, generator=generator) < density
    if 0 < density < 1 and N >= 4:
        kept[1], kept[2] = False, True
    if layout == "2:4":
        kept = (kept.view(N, -1, 4) & (kept.view(N, -1, 4).cumsum(-1) <= 2)).view(N, K)
    odd = torch.rand(N, K, generator=generator)
    weight, zeros = normal(N, K), torch.where(odd < 0.5, -0.0, 0.0).double()
    if explicit_mask:
        weight = torch.where(kept, torch.where((odd > 0.45) & (odd < 0.55), zeros, weight), 3 * weight)
    else:
        weight = torch.where(kept, weight, zeros)
    return Case(
        input=normal(T, K).to(device, activation_dtype),
        weight=weight.to(device, dtype),
        mask=kept.to(device) if explicit_mask else None,
        lora_A=normal(r, K).to(device, dtype_A),
        lora_B=(normal(N, r) / r**0.5).to(device, dtype_B),
        bias=normal(N).to(device, dtype_B) if bias else None,
        scaling=scaling,
        grad_output=normal(T, N).to(device, activation_dtype),
        layout=layout,
    )
