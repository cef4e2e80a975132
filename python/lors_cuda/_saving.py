# SPDX-License-Identifier: Apache-2.0
# save_pretrained of a model whose linears are LoRS layers: transformers knows no such layer, finds no `weight` in what
# was written, and would go on with random numbers. Used by model.py and lors_cuda.peft.
"""Refuse to save an unmerged model as an ordinary checkpoint."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from ._files import replace_file
from .sparse_linear import SparseLayer

_METHODS = ("save_pretrained", "push_to_hub")
_CHECKPOINT = re.compile(r"checkpoint-\d+")  # of transformers.Trainer
# from_pretrained takes this key for the name of the weights' file, and quotes a value that is none. Without a
# config.json it would take the class's default configuration, of billions of parameters, and random numbers.
_MARK = {
    "transformers_weights": "none, because this model has LoRS layers that are not merged. Resume training from it, or "
    "save lors_cuda.merge_and_unload(model)"
}


class _Guard:
    """Stands in front of a method of a transformers model that writes it as an ordinary checkpoint.

    Refers to the model weakly, so that deleting the model frees its memory at once; copies and pickles belong to the
    copied model.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        self._model, self._method = weakref.ref(model), method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        write = getattr(type(model), self._method)
        name, layer = _first_layer(model)
        if layer is None or getattr(model, "_hf_peft_config_loaded", False):  # then transformers writes the adapter
            return write(model, *args, **kwargs)
        directory = args[0] if args else kwargs.get("save_directory")
        if self._method == "save_pretrained" and _CHECKPOINT.fullmatch(Path(str(directory)).name):
            write(model, *args, **kwargs)
            config = Path(str(directory), "config.json")
            if config.is_file():  # written by one process
                replace_file(config, json.dumps({**json.loads(config.read_bytes()), **_MARK}, indent=2).encode())
            return None
        raise ValueError(
            f"The model was not saved: '{name}' is a {type(layer).__name__}, and of an unmerged model "
            f"{self._method} would write what loads with random weights. {_advice(layer)}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _Guard, (self._model(), self._method)


def guard_saving(model: nn.Module) -> None:
    """Refuse save_pretrained and push_to_hub of a model, and of the models inside it, while they have LoRS layers.

    Checkpoints of transformers.Trainer, which resumes from them, are written, with a mark at which from_pretrained
    stops.
    """
    for module in model.modules():
        for method in _METHODS:
            if hasattr(type(module), method):
                vars(module).setdefault(method, _Guard(module, method))


def unguard_saving(model: nn.Module) -> None:
    """Undo :func:`guard_saving`, unless frozen layers that are stored sparse are left."""
    if _first_layer(model)[1] is not None:
        return
    for module in model.modules():
        for method in _METHODS:
            if isinstance(vars(module).get(method), _Guard):
                del vars(module)[method]


def _first_layer(model: nn.Module) -> tuple[str, SparseLayer | None]:
    """The first layer that a checkpoint cannot hold, one with adapters if there is any."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLayer)]
    return next((found for found in layers if found[1].has_adapters), layers[0] if layers else ("", None))


def _advice(layer: SparseLayer) -> str:
    if not layer.has_adapters:
        return "Put its to_linear() in its place, and so for every SparseLinear."
    if layer.storage is not layer:
        return (
            "Save the adapter with the PEFT model's own save_pretrained, or the whole model with "
            "merge_and_unload().save_pretrained(directory)."
        )
    return (
        "Save the adapter with lors_cuda.save_adapter(model, directory), or the whole model with "
        "lors_cuda.merge_and_unload(model).save_pretrained(directory). A Trainer with lors_cuda.hf.LoRSTrainerMixin "
        "saves the adapter."
    )
