# SPDX-License-Identifier: Apache-2.0
"""The layers: SparseLinear, frozen and stored sparse, LoRSLinear, which adapts it, and their base class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._checks import DTYPES, GRADIENTS, alpha_number, check_choice, check_merge, check_rank, check_whole
from ._distributed import is_sharded, local_part, whole
from ._linears import is_conv1d, is_linear, make_linear, weight_of
from ._weight_reads import reads_past
from .dense_view import DenseView, dense_tensor
from .functional import MergedWeight, layer_linear, merge, sparse_linear
from .weight import SparseWeight

_Self = TypeVar("_Self", bound="SparseLinear")
_TENSORS = ("weight_values", "weight_mask", "weight_index")
_STORED_DTYPES = {"weight_values": DTYPES, "weight_mask": (torch.int32,), "weight_index": (torch.uint8, torch.int64)}


class SparseLayer:
    """A linear layer whose frozen weight is sparse: what the layers here and in lors_cuda.peft have in common.

    Attributes:
        in_features, out_features: K and N.
        sparse_weight: the frozen weight, without adapters, as a :class:`SparseWeight`.
        storage: the module whose parameters hold it; for PEFT's layers that is their base layer.
        has_adapters: whether it is of a kind that has adapters.
        merged_weight: keeps their merged weight while :func:`lors_cuda.merge_cache` is on; None otherwise.
        past_reader: the code that was found to read the weight instead of calling the layer; "" if none.
    """

    in_features: int
    out_features: int
    has_adapters = False
    merged_weight: MergedWeight | None = None
    past_reader = ""

    @property
    def sparse_weight(self) -> SparseWeight:
        raise NotImplementedError

    @property
    def storage(self) -> Any:
        raise NotImplementedError

    def merged_dense(self) -> Tensor:
        """The weight [N, K] that the layer multiplies by in evaluation, its adapters merged in; a new tensor."""
        raise NotImplementedError


class SparseLinear(SparseLayer, nn.Module):
    """A frozen linear layer, ``Y = X W^T + bias``, with W stored in one of the layouts of :class:`SparseWeight`.

    The stored tensors are frozen parameters, also the integer ones, and not buffers: DistributedDataParallel would send
    buffers around in every forward, and ``fully_shard`` would not shard them.

    Attributes:
        weight_values: the values of ``sparse_weight``.
        weight_mask: its mask bits, None where the layout has none.
        weight_index: its metadata or row offsets, None where the layout has none.
        bias: frozen Parameter [out_features] or None.
        sparse_weight: the weight as a :class:`SparseWeight` of these tensors.
        weight: the weight, dense [out_features, in_features], decompressed when it is used: a :class:`DenseView`; of a
            Conv1D a tensor [in_features, out_features].
        weight_uses: how often ``weight`` was used outside compiled code, other than for its shape, dtype and the like.
        conv1d: whether the plain layer is transformers' Conv1D, whose own weight is [in_features, out_features].
    """

    weight_values: Tensor
    weight_mask: Tensor | None
    weight_index: Tensor | None
    bias: nn.Parameter | None
    weight_uses = 0
    conv1d = False

    def __init__(self, sparse_weight: SparseWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = sparse_weight.shape
        tensors = (sparse_weight.values, sparse_weight.mask_bits, sparse_weight.index)
        for name, tensor in zip(_TENSORS, tensors, strict=True):
            self.register_parameter(name, _frozen(tensor))
        self.bias = _frozen(None if bias is None else bias.detach())

    @classmethod
    def compress(cls, linear: nn.Linear, layout: str = "auto", mask: Tensor | None = None) -> SparseLinear:
        """The frozen layer of a linear layer whose weight has zeros; ``layout`` and ``mask`` as in
        :meth:`SparseWeight.from_dense`. Tensors are referenced, not copied, where possible.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear`` and no Conv1D of transformers.
            ValueError: as :meth:`SparseWeight.from_dense`.
        """
        check_linear(linear)
        layer = SparseLinear(SparseWeight.from_dense(_dense(linear), layout, mask), linear.bias)
        layer.conv1d = is_conv1d(linear)
        return layer.train(linear.training)

    @property
    def sparse_weight(self) -> SparseWeight:
        return SparseWeight(self.weight_values, self.weight_mask, self.weight_index, in_features=self.in_features)

    @property
    def storage(self) -> nn.Module:
        return self

    def merged_dense(self) -> Tensor:
        return self.sparse_weight.to_dense()

    def whole_weight(self) -> SparseWeight:
        """``sparse_weight``, gathered from all processes where ``fully_shard`` has cut it into parts; a collective."""
        values, bits, index = (None if t is None else whole(t) for t in self._stored())
        assert values is not None
        return SparseWeight(values, bits, index, in_features=self.in_features)

    @property
    def weight(self) -> Tensor:
        if self.conv1d:
            return dense_tensor(self).t()
        # A compiled graph drops what is not used, and cannot hold a view.
        return dense_tensor(self) if torch.compiler.is_compiling() else DenseView(self)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]; dtypes and errors as :func:`lors_cuda.lors_linear`."""
        return sparse_linear(input, self.sparse_weight, self.bias)

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear``, or Conv1D, with the dense weight, a copy, and requires_grad as this layer's: False."""
        linear = make_linear(self.sparse_weight.to_dense(), self.bias, self.conv1d)
        return linear.requires_grad_(False).train(self.training)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        before = self.weight_values.detach()  # the parameter itself may be given the converted data
        # A conversion to a smaller type may round a kept weight to zero; the mask must not lose it.
        implicit = self.weight_index is None and self.weight_mask is None and before.device.type != "meta"
        if implicit and is_sharded(before):
            _check_keeps_mask(before, fn)
        super()._apply(fn, recurse)
        if implicit and self.weight_values.dtype != before.dtype and not is_sharded(before):
            bits = SparseWeight(before).to(self.weight_values.dtype).mask_bits
            self.weight_mask = _frozen(None if bits is None else bits.to(self.weight_values.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Which weights are kept, and so how many values are stored, is a property of the stored weight: it decides the
        # shapes of the parameters. But only where it fits, because a refused state must leave the layer as it was.
        errors: list[str] = args[-1]
        values, bits, index = (state_dict.get(prefix + name) for name in _TENSORS)
        if values is not None:
            problem = self._weight_problem(values, bits, index)
            if problem is not None:
                errors.append(f"{prefix[:-1] or type(self).__name__}: {problem}")
                return
            for name, tensor, own in zip(_TENSORS, (values, bits, index), self._stored(), strict=True):
                if tensor is None or own is None or own.shape != tensor.shape:
                    dtype = self.weight_values.dtype if name == "weight_values" else getattr(tensor, "dtype", None)
                    device = self.weight_values.device
                    setattr(
                        self,
                        name,
                        _frozen(None if tensor is None else torch.empty_like(tensor, dtype=dtype, device=device)),
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _weight_problem(self, values: Tensor, bits: Tensor | None, index: Tensor | None) -> str | None:
        """Why a stored weight cannot be loaded into this layer, as a sentence; None if it can.

        Where both are sharded the weight is gathered to be checked, so that all processes must load together.
        """
        for name, tensor in zip(_TENSORS, (values, bits, index), strict=True):
            if isinstance(tensor, Tensor) and tensor.dtype not in _STORED_DTYPES[name]:
                allowed = " or ".join(map(str, _STORED_DTYPES[name]))
                return (
                    f"{name} has dtype {tensor.dtype}; it must be {allowed}. A stored weight is loaded as it was "
                    "saved: its integer tensors say which weights are kept, and averaging or a way through another "
                    "dtype destroys them. Exchange lora_A and lora_B alone."
                )
        layout, own = _layout(index), _layout(self.weight_index)
        if layout != own:
            return (
                f"the state has a weight of layout '{layout}' and the layer one of layout '{own}'; convert the model "
                f"with layout='{layout}' before loading it."
            )
        problem = self._sharding_problem(values, bits, index)
        if problem is not None:
            return problem
        values = whole(values)
        bits, index = (None if tensor is None else whole(tensor) for tensor in (bits, index))
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

    def _sharding_problem(self, *given: Tensor | None) -> str | None:
        if is_sharded(self.weight_values) != is_sharded(given[0]):
            sharded = "the layer is sharded and the state is not"
            if is_sharded(given[0]):
                sharded = "the state is sharded and the layer is not"
            return (
                f"{sharded}; load it by set_model_state_dict of torch.distributed.checkpoint.state_dict, a whole state "
                "with StateDictOptions(full_state_dict=True)."
            )
        if is_sharded(self.weight_values):
            for name, tensor, own in zip(_TENSORS, given, self._stored(), strict=True):
                if getattr(tensor, "shape", None) != getattr(own, "shape", None):
                    return (
                        f"the state's {name} does not have the layer's shape, so its weight has another mask, and a "
                        "layer that is sharded cannot take that on. Load it before fully_shard."
                    )
        return None

    def _stored(self) -> tuple[Tensor | None, ...]:
        return self.weight_values, self.weight_mask, self.weight_index

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"layout={_layout(self.weight_index)!r}"  # also where the tensors are partitioned and empty
        )


class LoRSLinear(SparseLinear):
    """A frozen sparse linear layer with a masked low-rank adapter: ``Y = X (W + s M o (B A))^T + bias``.

    Source: LoRS, arXiv 2501.08582. Made by :meth:`from_linear` or :func:`lors_cuda.get_lors_model`. The frozen layer's
    own attributes are those of :class:`SparseLinear`.

    Attributes:
        lora_A: Parameter [r, in_features], Kaiming-uniform at first.
        lora_B: Parameter [out_features, r], zero at first, so that the layer begins as the frozen one.
        scaling: s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``.
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
    ) -> None:
        check_rank(r, *sparse_weight.shape)
        check_choice("gradient", gradient, GRADIENTS)
        alpha_number("lora_alpha", lora_alpha)
        super().__init__(sparse_weight, bias)
        self.r = r
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.gradient = gradient
        self.adapter_enabled = True
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
            linear: the layer, also transformers' Conv1D; its weight is frozen in the result.
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
        check_linear(linear)
        layer = cls(
            SparseWeight.from_dense(_dense(linear), layout, mask),
            linear.bias,
            r=r,
            lora_alpha=lora_alpha,
            gradient=gradient,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
        )
        layer.conv1d = is_conv1d(linear)
        return layer.train(linear.training)

    def reset_adapter(self, init_lora_weights: bool = True) -> None:
        """Draw a new lora_A (Kaiming-uniform); lora_B becomes zero, or random if ``init_lora_weights`` is False."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights:
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]; dtypes and errors as :func:`lors_cuda.lors_linear`."""
        if not self.adapter_enabled:
            return super().forward(input)
        return layer_linear(
            input,
            self.sparse_weight,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.bias,
            self.gradient,
            self.merged_weight,
        )

    @property
    def weight(self) -> Tensor:
        if self.adapter_enabled and reads_past(self):
            return self.merged_dense().t() if self.conv1d else self.merged_dense()
        return SparseLinear.weight.__get__(self)

    def merged_dense(self) -> Tensor:
        return merge(self.sparse_weight, self.lora_A, self.lora_B, self.scaling)

    def merge(self) -> nn.Linear:
        """A plain ``nn.Linear``, or Conv1D, with the adapter merged in: the mask preserved, exact zeros off it.

        Raises:
            ValueError: the weight or an adapter holds a NaN or an infinity, or the merged weight would (beyond its
                dtype's range); the first place is named. The layer is sharded.
        """
        for which, tensor in (("weight", self.weight_values), ("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            check_whole(which, tensor)
        with torch.no_grad():
            weight, merged = self.sparse_weight, self.merged_dense()
            merged += 0.0  # -0.0, which a kept weight may have become, reads as +0.0
            check_merge(weight, self.lora_A, self.lora_B, self.scaling, SparseWeight(merged))
        return make_linear(merged, self.bias, self.conv1d).train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, gradient={self.gradient!r}"


def check_linear(linear: nn.Module) -> None:
    """Refuse what is no nn.Linear and no Conv1D."""
    if not is_linear(linear):
        raise TypeError(f"linear is a {type(linear).__name__}; it must be a torch.nn.Linear.")


def _dense(linear: nn.Module) -> Tensor:
    """The weight [N, K] of a plain layer, contiguous: that of a Conv1D is copied."""
    weight = weight_of(linear).detach()
    return weight.contiguous() if is_conv1d(linear) else weight


def _layout(index: Tensor | None) -> str:
    return "dense" if index is None else "2:4" if index.dtype == torch.uint8 else "bitmap"


def _check_keeps_mask(values: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
    """Refuse a conversion that rounds a kept weight of a sharded layer to zero: it cannot be given a mask any more."""
    local = local_part(values)
    converted = fn(local)
    if converted.dtype != local.dtype and bool(((converted == 0) & (local != 0)).any()):
        raise ValueError(
            "The conversion rounds weights that are kept to zero, and the layer, sharded by fully_shard, cannot be "
            "given a mask that keeps them. Convert the model's dtype before fully_shard."
        )


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
