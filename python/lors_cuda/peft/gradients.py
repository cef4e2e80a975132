# SPDX-License-Identifier: Apache-2.0
# The gradient start (gradient_init.py) for PEFT models, in place of PEFT's initialisers that move the base weight.
"""Gradient-based start of PEFT models with LoRS adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from peft import PeftModel

from .. import gradient_init
from .._distributed import check_gathered
from ..model import check_no_method
from .config import LoRSLoraConfig
from .model import LoRSLoraModel
from .targets import check_targets, named_peft_layers, selected, spell_out


def estimate_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    config: LoRSLoraConfig,
    *,
    steps: int = 8,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """:func:`lors_cuda.estimate_gradients` for the modules that `config` selects; on the sparse model, before
    ``get_peft_model``.

    Raises:
        ValueError, TypeError: as there; a selected module cannot be adapted.
    """
    if not isinstance(config, LoRSLoraConfig):
        raise TypeError(f"config must be a LoRSLoraConfig, but is {type(config).__name__}.")
    config = deepcopy(config)
    tuner: Any = LoRSLoraModel
    config = tuner._prepare_adapter_config(_NoTuner, config, tuner.get_model_config(model))
    spell_out(config, model)
    found = selected(model, config)
    if not found:
        raise ValueError(f"target_modules={config.target_modules!r} selects no module of {type(model).__name__}.")
    check_targets(found, model, config, new=True)
    return gradient_init.estimate_gradients(
        model, batches, steps=steps, loss_fn=loss_fn, progress=progress, targets=list(found.values())
    )


def init_from_gradients(
    model: nn.Module, gradients: Mapping[str, Tensor], adapter_name: str = "default", *, stable_gamma: float = 1.0
) -> None:
    """:func:`lors_cuda.init_from_gradients` for one adapter of a PEFT model: lora_A along the gradient's leading right
    singular vectors, lora_B zero. The base weight is not touched, so every zero survives.

    Raises:
        ValueError, TypeError: as there; the model has no LoRS adapter of this name.
    """
    gradient_init.check_start(gradients, stable_gamma)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = {
        name: layer.factors(adapter_name) for name, layer in named_peft_layers(base) if adapter_name in layer.lora_A
    }
    if not adapters:
        raise ValueError(
            f"The model has no LoRS adapter '{adapter_name}': call peft.get_peft_model with a LoRSLoraConfig first."
        )
    check_gathered(base)
    check_no_method(model, "given another start")
    gradient_init.set_from_gradients(adapters, gradients, stable_gamma)


class _NoTuner:
    """Takes the place of the tuner where PEFT asks it for the target modules of an architecture."""

    target_module_mapping = LoRSLoraModel.target_module_mapping
