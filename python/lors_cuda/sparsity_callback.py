# SPDX-License-Identifier: Apache-2.0
# A Trainer's callback: nothing but the adapters changes while it trains, and every merged weight is zero off the mask.
# Part of lors_cuda.hf, from where it is imported.
"""The check of the zeros while a Trainer trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .sparse_linear import SparseLayer
from .sparsity import LayerSparsity, ModelSparsity, weights_of

_CHUNK = 1 << 22  # elements of a checksum's temporary tensors: 32 MiB each


class SparsityCallback(TrainerCallback):
    """Checks while the Trainer trains that nothing but the adapters changes, and logs the sparsity.

    Every ``every`` steps, before every checkpoint and at the end, each LoRS layer's stored weight, mask and bias must
    be bit for bit what they were when training began, and its merged weight (a temporary, one layer at a time)
    exactly zero off the mask. The Trainer's next log then has ``sparsity``, the share of exact zeros in the merged
    weights of all checked layers, ``model_sparsity``, that in all weights of the model, embeddings and the output head
    included, and where the model has experts ``expert_sparsity``, that in all of them, checked or not. In a model of
    lors_cuda.peft the active adapters are merged.

    Raises (from ``trainer.train()``):
        RuntimeError: a layer was changed; it is named, and no checkpoint of that step is written.
        ValueError: the model has no LoRS layers, or sharded ones (FSDP), of which one process sees a part only.

    NOTE: reporters that the Trainer makes itself (TensorBoard, W&B) are called before this callback and miss
    both, unless the Trainer is a :class:`lors_cuda.hf.LoRSTrainerMixin`.
    """

    def __init__(self, every: int = 100) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every is {every!r}; it must be a whole number of steps.")
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1.")
        self.every = every
        self._checksums: dict[str, dict[str, tuple[torch.dtype, int]]] = {}
        self._checked_at = 0
        self._metrics: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._checksums = {name: _checksums(stored) for name, _, stored in _layers(kwargs["model"])}
        if not self._checksums:
            raise ValueError(
                "SparsityCallback found no LoRS layers in the model. Convert it with lors_cuda.get_lors_model, or "
                "adapt it with lors_cuda.peft, before the Trainer is made, or leave the callback out."
            )
        self._checked_at = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or control.should_save:
            self._check(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(kwargs["model"], state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        metrics = self.take_metrics()
        if metrics and logs is not None:
            logs.update(metrics)
            state.log_history[-1].update(metrics)  # the Trainer has put a copy of `logs` there

    def take_metrics(self) -> dict[str, float]:
        """What the last check measured, once: {} until the next one."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _check(self, model: nn.Module, step: int) -> None:
        zeros: dict[nn.Module, int] = {}
        layers = list(_layers(model))
        names = {name for name, _, _ in layers}
        gone = next((name for name in self._checksums if name not in names), None)
        if gone is not None:
            raise RuntimeError(
                f"Layer '{gone}' is no LoRS layer any more at step {step}, and was one when training began. Training "
                "was stopped. Merge or replace layers after trainer.train() only."
            )
        for name, layer, stored in layers:
            before, now = self._checksums.get(name), _checksums(stored)
            if before != now:
                tensor = next((key for key in now if before is None or before.get(key) != now[key]), "the weight")
                raise RuntimeError(
                    f"Layer '{name}': {tensor} is frozen, but has changed between step {self._checked_at} and "
                    f"step {step}; only lora_A and lora_B may change. Training was stopped. Find what writes to it "
                    "(an optimizer over all parameters, a callback, a cast) and resume from an earlier checkpoint."
                )
            zeros[stored] = _count_zeros(name, layer, step)
        self._checked_at = step
        checked, rest = [], []
        for weight in weights_of(model):
            if weight.module in zeros:
                checked.append(LayerSparsity(weight.name, weight.shape, zeros[weight.module], weight.kind))
            elif (counted := weight.counted()) is not None:
                rest.append(counted)
        measured = ModelSparsity(tuple(checked), tuple(rest)).to_dict()
        self._metrics = {
            name: measured[name]
            for name in ("sparsity", "expert_sparsity", "model_sparsity")
            if measured[name] is not None
        }


def _layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer, nn.Module]]:
    """Iterate over (name, layer, the module that holds its frozen tensors): for PEFT's layers that is their base."""
    bases = set()
    for name, module in model.named_modules():
        if module in bases or not isinstance(module, SparseLayer):
            continue
        stored = module.storage
        bases.add(stored)
        if any(hasattr(parameter, "device_mesh") for parameter in stored.parameters(recurse=False)):
            raise ValueError(
                f"SparsityCallback checks whole layers, and the parameters of '{name}' are sharded over several "
                "processes (DTensor). Leave the callback out, and check the merged model after training."
            )
        yield name, module, stored


def _checksums(stored: nn.Module) -> dict[str, tuple[torch.dtype, int]]:
    """Dtype and checksum of each frozen tensor of the module itself."""
    tensors = {**dict(stored.named_parameters(recurse=False)), **dict(stored.named_buffers(recurse=False))}
    return {
        key: (tensor.dtype, _checksum(tensor.detach())) for key, tensor in tensors.items() if not tensor.requires_grad
    }


def _checksum(tensor: Tensor) -> int:
    """sum_i (2i + 1) bits_i mod 2^64: another value in one place always changes it, an odd factor being invertible.

    Computed where the tensor is, so that not the weights but one number each is read back.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    bits = tensor.contiguous().view(-1).view(integers)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(chunk), device=tensor.device)
        total += (chunk * (2 * places + 1)).sum()
    return int(total)


def _count_zeros(name: str, layer: SparseLayer, step: int) -> int:
    """Number of exact zeros in the merged weight, which must include everything off the mask."""
    with torch.no_grad():
        merged = layer.merged_dense()
        stray = (merged != 0) & ~layer.sparse_weight.mask()
        if bool(stray.any()):
            row, column = stray.nonzero()[0].tolist()
            raise RuntimeError(
                f"Layer '{name}': the merged weight is {merged[row, column].item()} in row {row}, column {column}, "
                f"which is off the mask, at step {step}; {int(stray.sum())} weights are. Training was stopped. The "
                "mask or the merging kernel is damaged: run `lors-cuda info`, and resume from an earlier checkpoint."
            )
        return merged.numel() - int(torch.count_nonzero(merged))
