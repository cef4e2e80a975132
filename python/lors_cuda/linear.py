# SPDX-License-Identifier: Apache-2.0
"""The drop-in layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import check_gradient
from .functional import lors_linear, merge
from .sparse import SparseWeight


def check_rank(r: int, out_features: int, in_features: int) -> None:
    """Refuse a rank outside [1, min(out_features, in_features)]."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r is {r!r}; the rank must be an integer.")
    if not 1 <= r <= min(out_features, in_features):
        raise ValueError(
            f"r is {r}; for a layer of {out_features} x {in_features} the rank must be between 1 and "
            f"{min(out_features, in_features)}."
        )


class LoRSLinear(nn.Module):
    """A frozen sparse linear layer with a masked low-rank adapter: ``Y = X (W + s M o (B A))^T + bias``.

    Source: LoRS, arXiv 2501.08582. Made by :meth:`from_linear` or :func:`lors_cuda.get_lors_model`.

    Attributes:
        lora_A: Parameter [r, in_features], Kaiming-uniform at first.
        lora_B: Parameter [out_features, r], zero at first, so that the layer begins as the frozen one.
        bias: frozen Parameter [out_features] or None.
        sparse_weight: the frozen weight as a :class:`SparseWeight` (its tensors are this module's buffers).
        weight: the frozen weight, dense [out_features, in_features].
        scaling: s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``.
        adapter_enabled: False makes forward the frozen layer's; see :func:`lors_cuda.disable_adapter`.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    weight_values: Tensor
    weight_mask: Tensor | None
    weight_index: Tensor | None

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
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = sparse_weight.shape
        check_rank(r, self.out_features, self.in_features)
        check_gradient(gradient)
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha is {lora_alpha}; it must be a finite number.")
        self.r = r
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.gradient = gradient
        self.adapter_enabled = True
        self.register_buffer("weight_values", sparse_weight.values)
        self.register_buffer("weight_mask", sparse_weight.mask_bits)
        self.register_buffer("weight_index", sparse_weight.index)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # As in PEFT, the adapter of a 16-bit weight trains in float32: Adam's small steps would round away.
        dtype = torch.promote_types(sparse_weight.dtype, torch.float32)
        device = sparse_weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, dtype=dtype, device=device))
        self.reset_adapter(init_lora_weights)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        lora_alpha: float = 16,
        *,
        layout: str = "auto",
        mask: Tensor | None = None,
        gradient: str = "lors",
        use_rslora: bool = False,
        init_lora_weights: bool = True,
    ) -> LoRSLinear:
        """Wrap a linear layer whose weight has zeros. The layer's tensors are referenced, not copied, where possible.

        Args:
            linear: the layer; its weight is frozen in the result.
            r: rank, 1 to min(out_features, in_features).
            lora_alpha: scaling is lora_alpha / r (lora_alpha / sqrt(r) with ``use_rslora``).
            layout: how the weight is stored, see :meth:`SparseWeight.from_dense`.
            mask: bool [out_features, in_features], True where kept; None: kept where the weight is not zero.
            gradient: "lors" or "exact", see :func:`lors_cuda.lors_linear`.
            use_rslora: rank-stabilised scaling.
            init_lora_weights: False makes lora_B random too (for tests; the layer then starts elsewhere).

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or does not fit; nothing was changed.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; it must be a torch.nn.Linear.")
        layer = cls(
            SparseWeight.from_dense(linear.weight.detach(), layout, mask),
            linear.bias,
            r=r,
            lora_alpha=lora_alpha,
            gradient=gradient,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
        )
        return layer.train(linear.training)

    def reset_adapter(self, init_lora_weights: bool = True) -> None:
        """Draw lora_A anew (Kaiming-uniform); lora_B becomes zero, or random if ``init_lora_weights`` is False."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights:
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    @property
    def sparse_weight(self) -> SparseWeight:
        return SparseWeight(self.weight_values, self.weight_mask, self.weight_index, in_features=self.in_features)

    @property
    def weight(self) -> Tensor:
        return self.weight_values if self.weight_index is None else self.sparse_weight.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]; dtypes and errors as :func:`lors_cuda.lors_linear`."""
        if not self.adapter_enabled:
            return F.linear(input, self.weight, self.bias)
        return lors_linear(
            input, self.sparse_weight, self.lora_A, self.lora_B, self.scaling, self.bias, gradient=self.gradient
        )

    def merge(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the adapter merged in: the mask preserved, exact zeros off it.

        Raises:
            ValueError: the weight or an adapter holds a NaN or an infinity; the first place is named.
        """
        self.check_finite()
        with torch.no_grad():
            merged = merge(self.sparse_weight, self.lora_A, self.lora_B, self.scaling)
            merged += 0.0  # -0.0, which a kept weight may have become, reads as +0.0
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=merged.device,
            dtype=merged.dtype,
        )
        linear.weight = nn.Parameter(merged)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def check_finite(self, name: str = "") -> None:
        """Refuse a NaN or an infinity in the weight or the adapter, naming the first place."""
        for which, tensor in (("weight", self.weight_values), ("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            if not torch.isfinite(tensor).all():
                tensor = self.weight if which == "weight" else tensor
                finite = torch.isfinite(tensor)
                row, column = (~finite).nonzero()[0].tolist()
                where = f" of layer {name!r}" if name else ""
                raise ValueError(
                    f"{which}[{row}, {column}]{where} is {tensor[row, column].item()}; merging would spread it. Put "
                    "finite values back (an earlier checkpoint, a lower learning rate) and merge again."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRSLinear:
        before = self.weight_values
        super()._apply(fn, recurse)
        # A conversion to a smaller type may round a kept weight to zero; the mask must not lose it.
        implicit = self.weight_index is None and self.weight_mask is None
        if implicit and self.weight_values.dtype != before.dtype and before.device.type != "meta":
            self.weight_mask = SparseWeight(before).to(self.weight_values.dtype).mask_bits
            if self.weight_mask is not None:
                self.weight_mask = self.weight_mask.to(self.weight_values.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Which weights are kept, and so how many values are stored, is a property of the stored weight: it decides the
        # shapes of the buffers. But only where it fits, because a refused state must leave the layer as it was.
        errors: list[str] = args[-1]
        names = ("weight_values", "weight_mask", "weight_index")
        values, bits, index = (state_dict.get(prefix + name) for name in names)
        if values is not None:
            problem = self._weight_problem(values, bits, index)
            if problem is not None:
                errors.append(f"{prefix[:-1] or 'LoRSLinear'}: {problem}")
                return
            for name, tensor in zip(names, (values, bits, index), strict=True):
                own = getattr(self, name)
                if tensor is None or own is None or own.shape != tensor.shape:
                    dtype = self.weight_values.dtype if name == "weight_values" else getattr(tensor, "dtype", None)
                    device = self.weight_values.device
                    setattr(
                        self, name, None if tensor is None else torch.empty_like(tensor, dtype=dtype, device=device)
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _weight_problem(self, values: Tensor, bits: Tensor | None, index: Tensor | None) -> str | None:
        """Why a stored weight cannot be loaded into this layer, as a sentence; None if it can."""
        layout = "dense" if index is None else "2:4" if index.dtype == torch.uint8 else "bitmap"
        own = self.sparse_weight.layout
        if layout != own:
            return (
                f"the state has a weight of layout '{layout}' and the layer one of layout '{own}'; convert the model "
                f"with layout='{layout}' before loading it."
            )
        needed, shape = (self.out_features, self.in_features), values.shape
        try:
            if index is not None and layout == "2:4":
                if bits is not None:
                    return "the state has a weight_mask beside 2:4 metadata, which is its mask; one of them is wrong."
                shape = SparseWeight.from_sparse24(values, index).shape
            elif index is not None:
                if bits is None:
                    return "the state has row offsets of a bitmap (weight_index) but no bits (weight_mask)."
                shape = SparseWeight.from_bitmap(values, bits, index, self.in_features).shape
        except ValueError as error:
            return str(error)
        if shape != needed:
            return f"size mismatch for weight_values: the stored weight has shape {tuple(shape)}, not {needed}."
        words = (self.out_features, (self.in_features + 31) // 32)
        if bits is not None and (bits.dtype != torch.int32 or bits.shape != words):
            given = f"{bits.dtype} with shape {tuple(bits.shape)}"
            return f"weight_mask is {given}; it must be torch.int32 with shape {words}."
        return None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, layout={self.sparse_weight.layout!r}, "
            f"gradient={self.gradient!r}"
        )
