# SPDX-License-Identifier: Apache-2.0
# from_pretrained: adapter directories of three kinds onto a base model. PEFT loads the tensors; that they are the right
# ones, and for this base, is checked around it.
"""Load adapters into PEFT models with masked adapters."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from torch import nn

from peft import PeftModel

from ..adapter_directory import CONFIG_NAME, WEIGHTS_NAME, read_config, read_weights
from .config import LoRSLoraConfig
from .model import unchanged_on_error


def from_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    strict_mask: bool = True,
    layout: str | None = None,
    gradient: str | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Put a saved adapter onto the sparse base model it was trained on, as ``peft.PeftModel.from_pretrained`` does.

    `directory` is what ``save_pretrained`` of a PEFT model with LoRS adapters wrote, or
    :func:`lors_cuda.save_adapter`; with ``strict_mask=False`` also what plain PEFT wrote: the adapter is masked from
    then on, which changes what it computes. Base weights with other values than in training (a base into which the
    adapter is merged already, one loaded in another dtype) are warned of by name. Of an adapter on a model hub, give
    the directory of its download.

    Args:
        model: the base model, dense or compressed; or a PEFT model with LoRS adapters, which gets a further one.
        directory: holds adapter_config.json and adapter_model.safetensors.
        adapter_name: the adapter's name in the model.
        is_trainable: False freezes the adapter and sets the model to evaluation.
        strict_mask: refuse an adapter that was trained on another mask, or on none that is known.
        layout: instead of the saved one, as in :class:`LoRSLoraConfig`.
        gradient: instead of the saved one.
        kwargs: further arguments of ``PeftModel.from_pretrained``, e.g. ``low_cpu_mem_usage``.

    Returns:
        The PEFT model.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is corrupted, or the adapter does not fit the model;
            the model is unchanged. TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}.")
    if "subfolder" in kwargs:
        raise TypeError("subfolder is no argument here: give the whole path of the adapter as directory.")
    path = Path(directory)
    config = _config(path, strict_mask)
    for name, value in (("layout", layout), ("gradient", gradient)):
        if value is not None:
            setattr(config, name, value)
    config.validate()
    if not (path / "adapter_model.bin").is_file() or (path / WEIGHTS_NAME).is_file():
        read_weights(path / WEIGHTS_NAME)  # complete, and as they were saved
    if not isinstance(model, PeftModel):
        with unchanged_on_error(model, adapter_name):
            return PeftModel.from_pretrained(
                model, str(path), adapter_name, is_trainable=is_trainable, config=config, **kwargs
            )
    if adapter_name in model.peft_config:
        raise ValueError(
            f"The model has an adapter '{adapter_name}' already; choose another adapter_name, or delete_adapter it."
        )
    config.inference_mode = not is_trainable
    with unchanged_on_error(model.get_base_model(), adapter_name):
        model.add_adapter(adapter_name, config)
        model.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **kwargs)
    return model


def _config(path: Path, strict_mask: bool) -> LoRSLoraConfig:
    """The configuration in a directory as a LoRSLoraConfig."""
    where = path / CONFIG_NAME
    fields = read_config(where)
    fields.pop("peft_type")
    known = {item.name for item in dataclasses.fields(LoRSLoraConfig)}
    try:
        config = LoRSLoraConfig(**{name: value for name, value in fields.items() if name in known})
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{where}' does not describe a LoRS adapter: {error}") from error
    config.is_new = False
    config.strict_mask = strict_mask
    if strict_mask and config.trained_on is None:
        raise ValueError(
            f"The adapter in '{path}' has no mask fingerprints: it was not saved by lors_cuda, so it cannot be checked "
            "against the model's zeros, and masking will change what it computes. Use strict_mask=False to load it all "
            "the same."
        )
    return config
