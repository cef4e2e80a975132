# SPDX-License-Identifier: Apache-2.0
"""LoRSLinear: a frozen sparse layer with a masked adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import GRADIENTS, alpha_number, check_choice, check_merge, check_rank, check_stored, check_whole
from ._draws import ROUNDINGS, Draws, seed_number
from ._linears import is_conv1d, make_linear
from ._weight_reads import reads_past
from .functional import layer_linear, stored_merge
from .sparse_linear import SparseLayer, SparseLinear, stored_sparse
from .weight import SparseWeight

__all__ = ["LoRSLinear", "SparseLayer", "SparseLinear"]


class LoRSLinear(SparseLinear):
    """A frozen sparse linear layer with a masked low-rank adapter: ``Y = X (W + s M o (B A))^T + bias``.

    Source: LoRS, arXiv 2501.08582. Made by :meth:`from_linear` or :func:`lors_cuda.get_lors_model`. The frozen layer's
    own attributes are those of :class:`SparseLinear`.

    Attributes:
        lora_A: Parameter [r, in_features], Kaiming-uniform at first.
        lora_B: Parameter [out_features, r], zero at first, so that the layer begins as the frozen one.
        scaling: s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``. Setting it sets lora_alpha.
        adapter_enabled: False makes forward the frozen layer's; see :func:`lors_cuda.disable_adapter`.
        weight: the frozen weight, dense, as in SparseLinear. Code that multiplies by it inside a module's forward,
            instead of calling the layer, is given the merged weight, with gradients to the adapter.
    """

    has_adapters = True
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        sparse_weight: SparseWeight,
        bias: Tensor | None = None,
        *,
        r: int = 16,
        lora_alpha: float = 16,
        gradient: str = "lors",
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        rounding: str = "nearest",
        rounding_seed: int = 0,
        requantize: bool = False,
        remainder: str | None = None,
        dither_seed: int = 0,
        num_experts: int | None = None,
    ) -> None:
        check_rank(r, sparse_weight.shape[0] // (num_experts or 1), sparse_weight.shape[1])
        check_choice("gradient", gradient, GRADIENTS)
        check_choice("rounding", rounding, ROUNDINGS)
        alpha_number("lora_alpha", lora_alpha)
        super().__init__(sparse_weight, bias, num_experts=num_experts)
        self.r = r
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.gradient = gradient
        self.rounding, self.rounding_seed = rounding, seed_number("rounding_seed", rounding_seed)
        self.set_requantization(requantize, remainder, dither_seed)
        self.adapter_enabled = True
        # As in PEFT, the adapter of a 16-bit weight trains in float32: Adam's small steps would round away.
        dtype = torch.promote_types(sparse_weight.dtype, torch.float32)
        device = sparse_weight.device
        leading = () if num_experts is None else (num_experts,)
        self.lora_A = nn.Parameter(torch.empty(*leading, r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(*leading, self.out_features, r, dtype=dtype, device=device))
        self.reset_adapter(init_lora_weights)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | SparseLinear,
        r: int = 16,
        lora_alpha: float = 16,
        *,
        layout: str = "auto",
        mask: Tensor | None = None,
        gradient: str = "lors",
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        rounding: str = "nearest",
        rounding_seed: int = 0,
        requantize: bool = False,
        remainder: str | None = None,
        dither_seed: int = 0,
    ) -> LoRSLinear:
        """Wrap a linear layer whose weight has zeros. The layer's tensors are referenced, not copied, where possible.

        Args:
            linear: the layer, also transformers' Conv1D or a :class:`SparseLinear`; its weight is frozen in the result.
            r: rank, 1 to min(out_features, in_features).
            lora_alpha: scaling is lora_alpha / r (lora_alpha / sqrt(r) with ``use_rslora``).
            layout: how the weight is stored, see :meth:`SparseWeight.from_dense`.
            mask: bool [out_features, in_features], True where kept; None: kept where the weight is not zero.
            gradient: "lors" or "exact", see :func:`lors_cuda.lors_linear`.
            use_rslora: rank-stabilised scaling.
            init_lora_weights: False makes lora_B random too (for tests; the layer then starts elsewhere).
            rounding: of the merged weight, see :class:`lors_cuda.LoRSConfig`.
            rounding_seed: of "stochastic", likewise.
            requantize: round the merged weight of a quantised layer to the grid of its codes, likewise.
            remainder: with ``requantize``, likewise; None: "dither" for int4, "none" for int8 and e4m3.
            dither_seed: of "dither", 0 to 2^63 - 1; here this layer's own.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or does not fit; nothing was changed.
        """
        layer = cls(
            stored_sparse(linear, layout, mask),
            linear.bias,
            r=r,
            lora_alpha=lora_alpha,
            gradient=gradient,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            rounding=rounding,
            rounding_seed=rounding_seed,
            requantize=requantize,
            remainder=remainder,
            dither_seed=dither_seed,
        )
        layer.conv1d = is_conv1d(linear)
        if isinstance(linear, SparseLinear):
            layer.conv1d, layer._dense_dtype = linear.conv1d, linear._dense_dtype
        return layer.train(linear.training)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @scaling.setter
    def scaling(self, value: float) -> None:
        # What is saved is lora_alpha, so that a scaling changed by hand is saved with it.
        alpha = float(value) * (math.sqrt(self.r) if self.use_rslora else self.r)
        self.lora_alpha = alpha_number("lora_alpha", alpha)

    def __setstate__(self, state: dict[str, Any]) -> None:
        scaling = state.pop("scaling", None)  # of a version that stored it
        super().__setstate__(state)
        if scaling is not None and scaling != self.scaling:
            self.scaling = scaling

    def reset_adapter(self, init_lora_weights: bool = True) -> None:
        """Draw a new lora_A (Kaiming-uniform); lora_B becomes zero, or random if ``init_lora_weights`` is False.

        Raises:
            ValueError: a factor is computed, by a parametrisation or a method of lors_cuda.methods; nothing is changed.
        """
        for which, factor in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            check_stored(which, factor, "drawn anew")
        # As matrices: torch would take all but the first of more dimensions for inputs.
        nn.init.kaiming_uniform_(self.lora_A.detach().flatten(0, -2), a=math.sqrt(5))
        if init_lora_weights:
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_B.detach().flatten(0, -2), a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]; dtypes and errors as :func:`lors_cuda.lors_linear`."""
        if not self.adapter_enabled:
            return super().forward(input)
        return layer_linear(
            input,
            self.check_mask(),
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.bias,
            self.gradient,
            self.merged_weight,
            self.draws(self.training),
            self.requantization,
        )

    @property
    def weight(self) -> Tensor:
        if self.adapter_enabled and reads_past(self):
            return self._as_before(self._merged(self.draws(self.training)))
        return SparseLinear.weight.__get__(self)

    def merged_dense(self) -> Tensor:
        return self._merged(self.draws(training=False))

    def _merged(self, draws: Draws) -> Tensor:
        adapter = (self.lora_A, self.lora_B, self.scaling)
        merged = stored_merge(self.sparse_weight, *adapter, draws, self.requantization, self._dense_dtype)
        return merged.flatten(0, -2)  # of experts

    def merged_sparse_weight(self) -> SparseWeight:
        """The weight with the adapter merged in, in the layout of ``sparse_weight``; with ``requantize`` its codes are
        those that the layer computes with.

        Raises:
            ValueError: as :meth:`merge`.
        """
        seed = self.draws(training=False).rounding_seed
        return self.check_mask(always=True).merge(
            self.lora_A,
            self.lora_B,
            self.scaling,
            rounding="nearest" if seed is None else "stochastic",
            seed=seed,
            requantize=self.requantization,
        )

    def merge(self) -> nn.Linear:
        """A plain ``nn.Linear``, or Conv1D, with the adapter merged in: the mask preserved, exact zeros off it. With
        ``requantize`` its weight is what the requantised codes stand for.

        Raises:
            ValueError: the weight or an adapter holds a NaN or an infinity, or the merged weight would (beyond its
                dtype's range); the first place is named. The layer is sharded.
        """
        return make_linear(self._checked_merge(), self.bias, self.conv1d).train(self.training)

    def _checked_merge(self) -> Tensor:
        """The merged weight, dense; raises as :meth:`merge`."""
        weight = self.check_mask(always=True)
        for which, tensor in (("weight", self.weight_values), ("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            check_whole(which, tensor)
        with torch.no_grad():
            merged = self.merged_dense()
            merged += 0.0  # -0.0, which a kept weight may have become, reads as +0.0
            check_merge(weight, self.lora_A, self.lora_B, self.scaling, SparseWeight(merged))
        return merged

    def extra_repr(self) -> str:
        rounding = "" if self.rounding == "nearest" else f", rounding={self.rounding!r}"
        rounding += f", requantize=True, remainder={self.remainder!r}" if self.requantize else ""
        text = f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, gradient={self.gradient!r}"
        return text + rounding
