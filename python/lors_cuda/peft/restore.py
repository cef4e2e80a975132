# SPDX-License-Identifier: Apache-2.0
# PEFT changes a model step by step and leaves it so if a later step fails. Used around adding an adapter.
"""Take an adapter back that could not be added."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..sparse_linear import SparseLinear
from .layer import LoRSLoraLinear


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """If the block raises, take back what adding this adapter has changed in `model`: modules, flags, PEFT's record."""
    # Names, not modules: nothing here may keep a dense weight alive that is being compressed.
    kinds = {name: type(module) for name, module in model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    known = list(getattr(model, "peft_config", {}))
    try:
        yield
    except BaseException:
        for name, module in list(model.named_modules()):
            if kinds.get(name) is type(module):
                _without(module, adapter_name)
                continue
            restored = _unwrapped(module)
            if isinstance(restored, SparseLinear) and kinds.get(name) is nn.Linear:
                restored = restored.to_linear()
            if restored is not module:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, restored)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required.get(name, parameter.requires_grad))
        record: Any = getattr(model, "peft_config", None)
        if isinstance(record, dict) and adapter_name not in known:
            record.pop(adapter_name, None)
            if not known:
                del model.peft_config
        raise


def _without(module: nn.Module, adapter_name: str) -> None:
    """Delete the adapter from a module that had others before."""
    if not isinstance(module, (LoRSLoraLinear, AuxiliaryTrainingWrapper)):
        return
    if adapter_name not in module._get_available_adapters():
        return
    if isinstance(module, LoRSLoraLinear):
        module.delete_adapter(adapter_name)
    else:
        others = [name for name in module.active_adapters if name != adapter_name]
        module.delete_adapter(adapter_name, new_active_adapters=others[:1])


def _unwrapped(module: nn.Module) -> nn.Module:
    """What stood in the place of a module that is new."""
    if isinstance(module, LoRSLoraLinear):
        return module.base_layer
    if isinstance(module, AuxiliaryTrainingWrapper):
        original: nn.Module = module.original_module
        return original
    return module
