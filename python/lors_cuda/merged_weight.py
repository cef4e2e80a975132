# SPDX-License-Identifier: Apache-2.0
"""One merged weight, kept as long as the tensors it was made from stay the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._library import lors
from .weight import SparseWeight


class MergedWeight:
    """Holds ``W~ = W + s M o (B A)`` of one layer between calls; empty at first. See :func:`lors_cuda.merge_cache`.

    Copies and pickles come out empty, so that a model saved inside the block is no larger.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let the merged weight go."""
        self._operand: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._sources: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held at the moment."""
        return 0 if self._operand is None else self._operand.nbytes

    def operand(
        self, weight: SparseWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype
    ) -> Tensor | None:
        """The merged weight for activations of ``dtype``, as lors::linear takes it; None where it may not be kept.

        None: in torch.compile, which would burn one version into the graph; while a CUDA graph is captured, because the
        values stand only after a replay; and on the meta device.
        """
        device = weight.device
        if torch.compiler.is_compiling() or device.type == "meta":
            return None
        stream = None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None
            stream = torch.cuda.current_stream(device).cuda_stream  # another stream would have to wait for this one
        tensors = [t for t in (weight.values, weight.mask_bits, weight.index, lora_A, lora_B) if t is not None]
        self.check_countable(tensors)
        key = (scaling, dtype, stream, *((t.data_ptr(), t._version, t.dtype, t.shape) for t in tensors))
        if self._operand is None or key != self._key:
            self.clear()  # before the next one is made: never two at a time
            # An evaluation under inference_mode may make what training uses next: it must be an ordinary tensor.
            with torch.inference_mode(False), torch.no_grad():
                self._operand = lors.merged_operand(
                    weight.values, weight.mask_bits, weight.index, lora_A, lora_B, scaling, dtype
                )
                # Held, so that no new tensor can come to stand at an address of the key.
                self._key, self._sources = key, tuple(t.detach() for t in tensors)
        return self._operand

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
