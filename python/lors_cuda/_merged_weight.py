# SPDX-License-Identifier: Apache-2.0
"""What keeps a layer's merged weight between its calls, and what a call takes it from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import _autograd
from ._draws import NO_DRAWS, Draws
from ._grid import NOT_REQUANTIZED, Requantization
from ._library import FEW_TOKENS, lors
from .weight import SparseWeight


def counted(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from another one, and from itself before a write that torch has counted."""
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape


def may_be_kept(weight: SparseWeight) -> bool:
    """Whether a merged weight may outlive this call.

    False: in a graph that torch.compile, torch.export or torch.jit.trace makes, which would hold one version as a
    constant; on the meta device; under torch.func and in forward mode, whose tensors last no longer than the call.
    """
    return not (_autograd.is_in_graph() or weight.device.type == "meta" or _autograd.is_transformed())


class _Factor:
    """What lora_A or lora_B was when a weight was merged.

    A factor that is no parameter may be computed anew for every call (torch.nn.utils.parametrize, stacked adapters):
    of that a copy [r, K] or [N, r] is kept, and compared where the tensor is another one.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._source = tensor.detach()  # alive, so that its address cannot be reused
        self._counted = None if tensor.is_inference() else counted(tensor)
        self._copy = None if isinstance(tensor, nn.Parameter) else self._source.clone()

    def is_still(self, tensor: Tensor) -> bool:
        if self._counted is not None and not tensor.is_inference() and counted(tensor) == self._counted:
            return True
        copy = self._copy
        return copy is not None and copy.dtype == tensor.dtype and torch.equal(copy, tensor)


class GivesMergedWeight(Protocol):
    """What a call may be given its merged weight by."""

    def operand(
        self,
        weight: SparseWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        input: Tensor,
        draws: Draws,
        requantize: Requantization,
    ) -> Tensor | _autograd.Prefetch | None:
        """For activations like ``input``; None: the call merges for itself."""


class MergedWeight:
    """Holds ``W~ = W + s M o (B A)`` of one layer between calls; empty at first. See :func:`lors_cuda.merge_cache`.

    Copies and pickles come out empty, so that a model saved inside the block is no larger.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop the cached tensor."""
        self._operand: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._sources: tuple[Tensor, ...] = ()
        self._factors: tuple[_Factor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held at the moment."""
        return 0 if self._operand is None else self._operand.nbytes

    def operand(
        self,
        weight: SparseWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        input: Tensor,
        draws: Draws = NO_DRAWS,
        requantize: Requantization = NOT_REQUANTIZED,
    ) -> Tensor | None:
        """The merged weight for activations like ``input``, as lors::linear takes it; None where it may not be kept.

        A compressed weight's first calls of many tokens may keep it dense, the first of few tokens makes it compressed,
        and it stays so: then calls of many tokens decompress it.

        None: where :func:`may_be_kept` says so, and while a CUDA graph is captured, because the values exist only after
        a replay.
        """
        if not may_be_kept(weight):
            return None
        device, stream = weight.device, None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None
            stream = torch.cuda.current_stream(device).cuda_stream  # another stream would have to wait for this one
        grid = weight.grid(requantize)
        sources = (weight.values, weight.mask_bits, weight.index, draws.noise, grid.scales, grid.zero_points)
        tensors = [t for t in sources if t is not None]
        self.check_countable([*tensors, *(f for f in (lora_A, lora_B) if isinstance(f, nn.Parameter))])
        tokens = input.numel() // weight.shape[1]
        key = (scaling, input.dtype, stream, draws.rounding_seed, draws.noise_seed, requantize, *map(counted, tensors))
        known = self._operand is not None and key == self._key
        known = known and all(f.is_still(t) for f, t in zip(self._factors, (lora_A, lora_B), strict=True))
        if not known or (tokens <= FEW_TOKENS and self._could_be_stored(weight, draws)):
            self.clear()  # before the next one is made: never two at a time
            # An evaluation under inference_mode may make what training uses next: it must be an ordinary tensor.
            with torch.inference_mode(False), torch.no_grad():
                args = (lora_A, lora_B, scaling, input.dtype, tokens, *draws, *grid)
                self._operand = lors.merged_operand(weight.values, weight.mask_bits, weight.index, *args)
                # Keeps the sources alive, so that their addresses in the key cannot be reused.
                self._key, self._sources = key, tuple(t.detach() for t in tensors)
                self._factors = (_Factor(lora_A), _Factor(lora_B))
        return self._operand

    def _could_be_stored(self, weight: SparseWeight, draws: Draws) -> bool:
        operand = self._operand
        assert operand is not None
        is_dense = operand.shape == weight.shape and weight.layout != "dense" and not draws.any
        is_dense = is_dense and weight.quantization is None
        return is_dense and operand.device.type == "cpu" and self._key[1] == weight.dtype != torch.float64

    @staticmethod
    def check_countable(tensors: Iterable[Tensor]) -> None:
        """Refuse tensors whose changes torch does not count."""
        if any(t.is_inference() for t in tensors):
            raise ValueError(
                "A parameter was made under torch.inference_mode, where torch counts no changes of tensors, so a "
                "merged weight cannot be kept safely. Build or load the model outside inference_mode; running it "
                "inside is fine."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedWeight:
        return MergedWeight()

    def __reduce__(self) -> tuple[type[MergedWeight], tuple[()]]:
        return MergedWeight, ()
