# SPDX-License-Identifier: Apache-2.0
# lora_A = A_train A_aux [r, a] [a, K], lora_B = B_aux B_train [N, b] [b, r]; aux is frozen, so r (a + b)
# numbers are trained instead of r (N + K). LoRA-Mini, arXiv 2411.15804.
"""LoRA-Mini: small trained factors between frozen random ones."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_count
from ..gradient_init import leading_right_singular_vectors
from ._method import Method
from ._pair import Pair
from ._run import Run


@dataclasses.dataclass(frozen=True)
class LoRAMini(Method):
    """Trains two small matrices per layer.

    The frozen ones follow from the run's seed and the layer's name, or from the gradient. Where the published code
    starts both trained matrices at zero, and then has no gradient at all, only B_train starts there. A_aux is scaled by
    1 / sqrt(K), and B_aux has orthonormal columns (ours). Source: arXiv 2411.15804.

    Args:
        a: rows of A_aux, at least 1; a layer with fewer inputs takes those.
        b: columns of B_aux, at least 1; a layer with fewer outputs takes those.
        aux: "random", or "gradient" (ours): the leading right and left singular vectors of the weight's gradient, which
            ``start`` is given. A layer whose gradient is all zero takes random ones.
    """

    a: int = 32
    b: int = 32
    aux: str = "random"
    name: ClassVar[str] = "lora-mini"
    has_own_start: ClassVar[bool] = True

    @property
    def needs_gradients(self) -> bool:
        return self.aux == "gradient"

    def __post_init__(self) -> None:
        check_choice("aux", self.aux, ("random", "gradient"))
        for field in ("a", "b"):
            check_count(field, getattr(self, field))

    def parametrise(self, pair: Pair, run: Run) -> None:
        N, K = pair.layer.out_features, pair.layer.in_features
        a, b = min(self.a, K), min(self.b, N)
        drawn = run.generator(pair.name)
        A_aux = torch.randn(a, K, generator=drawn) / math.sqrt(K)
        B_aux = torch.linalg.qr(torch.randn(N, b, generator=drawn)).Q
        gradient = run.gradient(pair) if self.needs_gradients else torch.zeros(1)
        if bool(gradient.any()):
            A_aux = leading_right_singular_vectors(gradient, a)
            B_aux = leading_right_singular_vectors(gradient.T.contiguous(), b).T
        A_train = torch.randn(pair.r, a, generator=drawn) / math.sqrt(a)
        kept = self.needs_gradients  # a seed gives random ones again
        pair.parametrise("lora_A", Product(right=A_aux.to(pair["lora_A"]), persistent=kept), A_train)
        pair.parametrise("lora_B", Product(left=B_aux.to(pair["lora_B"]), persistent=kept), torch.zeros(b, pair.r))


class Product(nn.Module):
    """left @ stored, or stored @ right; the frozen factor is ``persistent``, or its seed belongs to the state."""

    left: Tensor | None
    right: Tensor | None

    def __init__(self, left: Tensor | None = None, right: Tensor | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent)
        self.register_buffer("right", right, persistent)

    def forward(self, stored: Tensor) -> Tensor:
        product = stored if self.left is None else self.left @ stored
        return product if self.right is None else product @ self.right
