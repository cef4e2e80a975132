# SPDX-License-Identifier: Apache-2.0
"""SparseLinear: a frozen layer, stored sparse, that keeps its mask; and the base class of all our layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._distributed import end_buffer_broadcasts, is_sharded, local_part, whole
from ._draws import NO_DRAWS, Draws, seed_number
from ._grid import Requantization
from ._linears import check_stored_layout, is_conv1d, make_linear, stored_form
from ._merged_weight import GivesMergedWeight
from ._sparse_state import GRID, NO_NUMBERS, STATE, fitted_state
from .dense_view import DenseView, dense_tensor
from .formats import layout_of
from .functional import sparse_linear
from .quantization import (
    QuantizationGrid,
    check_remainder,
    check_requantization,
    default_remainder,
    requantization,
)
from .weight import SparseWeight

_Self = TypeVar("_Self", bound="SparseLinear")


class SparseLayer:
    """A linear layer whose frozen weight is sparse: what the layers here and in lors_cuda.peft have in common.

    Attributes:
        in_features, out_features: K and N.
        num_experts: E, of the stacked weights of a layer's experts, each [N, K]; None in a linear layer.
        sparse_weight: the frozen weight, without adapters, as a :class:`SparseWeight`; of experts [E N, K].
        storage: the module whose parameters hold it; for PEFT's layers that is their base layer.
        has_adapters: whether it is of a kind that has adapters.
        merged_weight: what gives their merged weight while :func:`lors_cuda.merge_cache` or :func:`lors_cuda.prefetch`
            is on; None otherwise.
        rounding: "nearest" or "stochastic": how a merged weight of 16 bits is rounded, see `lors_cuda.LoRSConfig`.
        rounding_seed: of "stochastic", where no run of lors_cuda.methods trains the layer: in evaluation and merging.
        step_seed: of "stochastic" in training, which a run sets anew at each optimizer step; None without one.
        requantize: a quantised weight's merge is rounded to the grid of its codes, see `lors_cuda.LoRSConfig`.
        remainder: "dither", "none" or "stored", with it.
        dither_seed: of "dither".
        noise: (float32 [N], seed), what a run adds to the kept weights in training: standard deviations; None: nothing.
        past_reader: the code that was found to read the weight instead of calling the layer; "" if none.
    """

    in_features: int
    out_features: int
    num_experts: int | None = None
    training: bool  # nn.Module's
    has_adapters = False
    merged_weight: GivesMergedWeight | None = None
    rounding = "nearest"
    rounding_seed = 0
    step_seed: int | None = None
    requantize = False
    remainder = "none"
    dither_seed = 0
    noise: tuple[Tensor, int] | None = None
    past_reader = ""

    @property
    def sparse_weight(self) -> SparseWeight:
        raise NotImplementedError

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of ``sparse_weight``."""
        return self.out_features * (self.num_experts or 1), self.in_features

    @property
    def storage(self) -> Any:
        raise NotImplementedError

    def draws(self, training: bool) -> Draws:
        """What the merge draws: in training the step's numbers, otherwise those that the merged weight will have."""
        if self.rounding == "nearest" and (self.noise is None or not training):
            return NO_DRAWS
        seed = None
        if training:
            if self.rounding != "nearest":
                seed = self.rounding_seed if self.step_seed is None else self.step_seed
            if self.noise is None:
                return Draws(seed)
            deviation, noise_seed = self.noise
            return Draws(seed, deviation.to(self.sparse_weight.device), noise_seed)  # the model may have moved since
        # A float32 weight is merged in float32: autocast rounds it to nearest afterwards, merged or not.
        return Draws(self.rounding_seed) if self.storage.dense_dtype.itemsize == 2 else NO_DRAWS

    @property
    def requantization(self) -> Requantization:
        """What the merge of a quantised weight does with its result, in training and evaluation alike."""
        return requantization(self.requantize, self.remainder, self.dither_seed)

    def set_requantization(self, requantize: bool, remainder: str | None, dither_seed: int) -> None:
        """Take what `LoRSConfig` calls so; nothing is changed where it does not fit the weight.

        Raises:
            TypeError, ValueError: it does not.
        """
        check_remainder(requantize, remainder)
        quantization = self.storage.sparse_weight.quantization
        if remainder is None:
            remainder = default_remainder(requantize, quantization)
        chosen = requantization(requantize, remainder, seed_number("dither_seed", dither_seed))
        check_requantization(chosen, quantization, requantize and self.rounding != "nearest")
        self.requantize, self.remainder, self.dither_seed = requantize, remainder, dither_seed

    def merged_dense(self) -> Tensor:
        """The weight that the layer multiplies by in evaluation, its adapters merged in, [N, K] or, of experts,
        [E N, K]; a new tensor."""
        raise NotImplementedError


class SparseLinear(SparseLayer, nn.Module):
    """A frozen linear layer, ``Y = X W^T + bias``, with W stored in one of the layouts of :class:`SparseWeight`.

    The values are a frozen parameter, the integer tensors are buffers, because masks are not numbers: what averages,
    decays or flattens ``model.parameters()`` (EMA, LBFGS, ``parameters_to_vector``) cannot reach them, ``state_dict()``
    gives copies of them, and wherever torch looks for a module's tensors (``.to()``, ``deepcopy``, distributed
    checkpoints, ``functional_call``, export) it finds them. Under ``fully_shard`` every process holds them whole (1 bit
    per weight), beside its part of the values. DistributedDataParallel broadcasts them when it is made, as it does
    parameters, and after the first forward no more (in compiled forwards it goes on, unless broadcast_buffers=False).

    ``mask_digest`` tells a mask that was changed in place, or averaged in a state, from the one that was stored:
    forward, merge and ``state_dict()`` compare where torch has counted a change, and ``load_state_dict`` always.

    Of a quantised weight the values are codes, integers or bytes, which nothing converts: ``.half()``, ``.to(dtype)``
    and the policies of ``fully_shard`` leave them, and the scales, as they are. They are a parameter all the same, so
    that ``fully_shard`` cuts them; what an average in place would make of them, ``mask_digest`` tells, which is then of
    codes, scales and zero points, too. Input of any of float32, bfloat16 and float16 is computed with in its own dtype.

    Attributes:
        weight_values: Parameter, the values of ``sparse_weight``.
        weight_mask: buffer, its mask bits; None where the layout has none.
        weight_index: buffer, its metadata or row offsets; None where the layout has none.
        weight_scales, weight_zero_points: buffers, those of its grid; None where it has none.
        kind: of its grid, see :class:`QuantizationGrid`; "" where it is not quantised.
        dense_dtype: of ``weight`` and of the plain layer that it becomes: the values', or, of a quantised weight, what
            ``dtype`` said, converted as the model's other tensors are.
        mask_digest: buffer, :meth:`SparseWeight.digest`: floating numbers, so that what averages the values of two
            masks averages their digests too, and the result belongs to neither.
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
    weight_scales: Tensor | None
    weight_zero_points: Tensor | None
    mask_digest: Tensor
    bias: nn.Parameter | None
    _checked: list[tuple[int, int]] | None  # the tensors, and their versions, that mask_digest was compared with
    weight_uses = 0
    conv1d = False
    kind = ""
    _dense_dtype: torch.dtype | None = None  # of a quantised weight

    def __init__(
        self,
        sparse_weight: SparseWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        num_experts: int | None = None,
    ) -> None:
        """``dtype``: of a quantised weight that of the model around it; None: its scales'. ``num_experts``: E, of the
        classes for experts, whose bias is [E, N]."""
        super().__init__()
        rows, self.in_features = sparse_weight.shape
        self.num_experts, self.out_features = num_experts, rows // (num_experts or 1)
        self.weight_values = nn.Parameter(sparse_weight.values, requires_grad=False)
        grid = sparse_weight.quantization
        if grid is not None:
            self.kind, self._dense_dtype = grid.kind, sparse_weight.dtype if dtype is None else dtype
        buffers = {
            "mask_digest": sparse_weight.digest(),
            "weight_index": sparse_weight.index,
            "weight_mask": sparse_weight.mask_bits,
            "weight_scales": None if grid is None else grid.scales,
            "weight_zero_points": None if grid is None else grid.zero_points,
        }
        # What is None comes last: torch.export counts the buffers of its root wrongly where one follows a None.
        for name in sorted(buffers, key=lambda name: buffers[name] is None):
            self.register_buffer(name, buffers[name])
        self._checked = _versions(self.sparse_weight)
        self.bias = _frozen(None if bias is None else bias.detach())

    @classmethod
    def compress(cls, linear: nn.Linear, layout: str = "auto", mask: Tensor | None = None) -> SparseLinear:
        """The frozen layer of a linear layer whose weight has zeros; ``layout`` and ``mask`` as in
        :meth:`SparseWeight.from_dense`. Tensors are referenced, not copied, where possible.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear`` and no Conv1D of transformers.
            ValueError: as :meth:`SparseWeight.from_dense`.
        """
        layer = SparseLinear(SparseWeight.from_dense(stored_form(linear), layout, mask), linear.bias)
        layer.conv1d = is_conv1d(linear)
        return layer.train(linear.training)

    @property
    def sparse_weight(self) -> SparseWeight:
        return self._stored(self.weight_values)

    def _stored(self, values: Tensor) -> SparseWeight:
        grid = self.grid_of(self.weight_scales, self.weight_zero_points)
        return SparseWeight(
            values, self.weight_mask, self.weight_index, in_features=self.in_features, quantization=grid
        )

    def grid_of(self, scales: Tensor | None, zero_points: Tensor | None) -> QuantizationGrid | None:
        """The grid with these scales; what they may not be, its ``check`` says."""
        if scales is None:
            return None
        groups = scales.shape[1] if scales.dim() == 2 else 1
        return QuantizationGrid(self.kind, self.in_features // max(groups, 1), scales, zero_points)

    @property
    def storage(self) -> nn.Module:
        return self

    @property
    def dense_dtype(self) -> torch.dtype:
        return self._dense_dtype or self.weight_values.dtype

    def merged_dense(self) -> Tensor:
        return self.sparse_weight.to_dense(self._dense_dtype)

    def whole_weight(self) -> SparseWeight:
        """``sparse_weight``, checked, and gathered from all processes where ``fully_shard`` has cut it; a collective.

        Raises:
            ValueError: as :meth:`check_mask`.
        """
        weight = self._stored(whole(self.weight_values))
        self._compare(weight)
        return weight

    @property
    def weight(self) -> Tensor:
        if self.conv1d or self.num_experts is not None:
            return self._as_before(dense_tensor(self))
        # A compiled graph drops what is not used, and cannot hold a view.
        return dense_tensor(self) if torch.compiler.is_compiling() else DenseView(self)

    def _as_before(self, dense: Tensor) -> Tensor:
        """The dense weight as the module had it that this layer was made from: of a Conv1D [K, N], of experts
        [E, N, K]."""
        if self.num_experts is not None:
            return dense.unflatten(0, (self.num_experts, -1))
        return dense.t() if self.conv1d else dense

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]; dtypes and errors as :func:`lors_cuda.lors_linear`."""
        return sparse_linear(input, self.check_mask(), self.bias)

    def check_mask(self, *, always: bool = False) -> SparseWeight:
        """Refuse a mask that is not the one that was stored; also values off it. Cheap where torch counts no change.

        Args:
            always: compare in any case: torch counts no writes through ``tensor.data``. Waits for the device.

        Returns:
            ``sparse_weight``.

        Raises:
            ValueError: the mask was changed since the layer was made or loaded, or its values do not fit it.
        """
        weight = self.sparse_weight
        # Compiled code, and tensors that only stand for others, have no content to compare.
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return weight
        end_buffer_broadcasts(SparseLinear)
        if not always and self._checked == _versions(weight):
            return weight
        tensors = [getattr(self, name) for name in STATE if getattr(self, name) is not None]
        if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta for tensor in tensors):
            return weight
        if not always:
            # ZeRO-3 exchanges the values' content, and a captured graph cannot wait for the device.
            if hasattr(weight.values, "ds_shape"):
                return weight
            if weight.values.is_cuda and torch.cuda.is_current_stream_capturing():
                return weight
        with torch.no_grad():
            self._compare(weight)
        self._checked = _versions(weight)
        return weight

    def _compare(self, weight: SparseWeight) -> None:
        try:
            stored = (weight.values, weight.mask_bits, weight.index, self.in_features, weight.quantization)
            SparseWeight.from_stored(*stored)
            problem = None if weight.has_digest(self.mask_digest) else "its digest is another one."
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            raise ValueError(
                f"The stored weight of {type(self).__name__}({self.extra_repr()}) has another mask than it was made or "
                f"loaded with: {problem} {NO_NUMBERS} Load a "
                "sound state, or convert the sparse model again. torch.optim.swa_utils.AveragedModel needs "
                "use_buffers=False."
            )

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear``, or Conv1D, with the dense weight, a copy, and requires_grad as this layer's: False.

        Raises:
            ValueError: the mask was changed; or the layer holds the weights of experts, which are no linear.
        """
        if self.num_experts is not None:
            raise ValueError(
                f"{type(self).__name__} holds the weights of {self.num_experts} experts, which are no linear layer; "
                "its weight gives them as one tensor [num_experts, out_features, in_features]."
            )
        linear = make_linear(self.check_mask(always=True).to_dense(self._dense_dtype), self.bias, self.conv1d)
        return linear.requires_grad_(False).train(self.training)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        before = self.weight_values.detach()  # the parameter itself may be given the converted data
        # A conversion to a smaller type may round a kept weight to zero; the mask must not lose it.
        implicit = self.weight_index is None and self.weight_mask is None and before.device.type != "meta"
        if implicit and is_sharded(before):
            _check_keeps_mask(before, fn)
        scales = self.weight_scales

        def convert(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if tensor is scales and result.dtype != tensor.dtype else result

        if self._dense_dtype is not None and scales is not None:
            self._dense_dtype = fn(torch.empty(0, dtype=self._dense_dtype, device=scales.device)).dtype
        super()._apply(convert, recurse)
        if implicit and self.weight_values.dtype != before.dtype and not is_sharded(before):
            bits = SparseWeight(before).to(self.weight_values.dtype).mask_bits
            self.weight_mask = None if bits is None else bits.to(self.weight_values.device)
        self._checked = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None}  # a copy's tensors are others

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_checked", None)
        if "mask_digest" not in self._buffers:  # of a version whose integer tensors were parameters
            for name in ("weight_mask", "weight_index"):
                tensor = self._parameters.pop(name)
                self.register_buffer(name, None if tensor is None else tensor.detach())
            stored = SparseWeight(self.weight_values, self.weight_mask, self.weight_index, in_features=self.in_features)
            self.register_buffer("mask_digest", stored.digest())
        for name in GRID:  # of a version without quantised weights
            if name not in self._buffers:
                self.register_buffer(name, None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.check_mask()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in STATE[1:]:  # so that averages over a state in place do not reach the layer
                if prefix + name in destination:
                    destination[prefix + name] = destination[prefix + name].clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        fitted = fitted_state(self, state_dict, prefix, local_metadata, args[-1])
        if fitted is not None:
            super()._load_from_state_dict(fitted, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        experts = "" if self.num_experts is None else f"num_experts={self.num_experts}, "
        return (
            experts
            + (
                f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"layout={layout_of(self.weight_index)!r}"  # also where the tensors are partitioned and empty
            )
            + (f", kind={self.kind!r}" if self.kind else "")
        )


def stored_sparse(linear: nn.Module, layout: str, mask: Tensor | None) -> SparseWeight:
    """The weight of a layer with zeros as it is stored, or is to be: a :class:`SparseLinear` keeps its own.

    Raises:
        TypeError: it is no linear.
        ValueError: as :meth:`SparseWeight.from_dense`; a weight that is stored has another layout, or a mask was given.
    """
    if type(linear) is not SparseLinear:
        return SparseWeight.from_dense(stored_form(linear), layout, mask)
    weight = linear.check_mask(always=True)
    if mask is not None:
        raise ValueError("mask was given with a layer that is stored sparse, which has its own; leave mask out.")
    check_stored_layout(weight, layout)
    return weight


def _versions(weight: SparseWeight) -> list[tuple[int, int]]:
    """Which tensors are stored, and how often each was written to in place."""
    return [
        (id(tensor), -1 if tensor.is_inference() else tensor._version)
        for tensor in (weight.values, weight.mask_bits, weight.index, *weight.grid()[:2])
        if tensor is not None
    ]


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
