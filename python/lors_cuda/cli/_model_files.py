# SPDX-License-Identifier: Apache-2.0
# The directory of a model: what stands there beside the weights goes with the model when it is pruned or merged
# (processors, chat templates, licences, code, pictures), and what --overwrite may replace.
"""Writing a model's directory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from torch import nn

from .._files import real
from ..compressed_tensors.checkpoint import write_model

# Weights, in the formats of transformers and of what else is published beside them, and their indexes.
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx",
    "*.onnx_data", "*.ot", "*.npz", "*.tflite", "*.pdparams", "*.mlmodel", "*.mlpackage", "*.distcp", "*.engine",
    "*.index.json",
)  # fmt: skip
# What training leaves: logs and checkpoints of the Trainer, DeepSpeed and our own; adapters, which belong to the old
# weights; caches and hidden files.
_LEFT_BY_TRAINING = (
    "adapter_config.json", "trainer_state.json", "training.jsonl", "run.json", "loss.png", "all_results.json",
    "train_results.json", "eval_results.json", "checksums.json", "events.out.tfevents.*", "checkpoint-[0-9]*",
    "global_step[0-9]*", "latest", "zero_to_fp32.py", "runs", "logs", "wandb", "tensorboard", "*.log", "__pycache__",
    ".*",
)  # fmt: skip
# What a model and its tokenizer are written as; --overwrite may replace it whatever the new model brings.
_KNOWN = (
    "config.json", "generation_config.json", "*.safetensors", "*.bin", "*.index.json", "tokenizer*", "vocab.*",
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "*.model", "*.tiktoken", "chat_template*",
    "additional_chat_templates", "*processor_config.json",
)  # fmt: skip


def save_model(model: nn.Module, source: Path, directory: Path, format: str = "dense") -> None:
    """Write a model into an existing directory, with what ``source`` has beside its weights."""
    write_model(model, directory, format)
    for entry in beside_weights(source):
        _copy(entry, directory / entry.name)


def beside_weights(source: Path) -> list[Path]:
    """What a model's directory holds but weights, what training left, caches and hidden files."""
    return [entry for entry in sorted(source.iterdir()) if entry.exists() and not _unwanted(entry.name.lower())]


def _unwanted(name: str) -> bool:
    if name.startswith(("tokenizer", "vocab")):  # whatever their endings
        return False
    return any(fnmatch(name, pattern) for pattern in (*_WEIGHTS, *_LEFT_BY_TRAINING))


def _copy(entry: Path, to: Path) -> None:
    """Copy a file, or a directory but for weights and empty parts; what the model itself wrote is not replaced."""
    if not entry.is_dir():
        if not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(entry, to)
        return
    if entry.is_symlink() and real(entry) in real(entry.parent).parents:
        return  # it would be copied into itself for ever
    for inner in beside_weights(entry):
        _copy(inner, to / inner.name)


def check_new(directory: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output directory that would lose something. The first of the ``sources`` is the model's directory.

    Raises:
        FileExistsError: it is not empty, and ``overwrite`` is not set or it holds no model. ValueError: it is, or
            contains, one of the ``sources``.
    """
    output = real(directory)
    for source in sources:
        if output == real(source) or output in real(source).parents:
            raise ValueError(
                f"The output '{directory}' is, or contains, the input '{source}'; choose another directory."
            )
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"The output '{directory}' is a file; choose another directory.")
    if any(directory.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"The output directory '{directory}' exists and is not empty; nothing was written. Choose another one, "
                "or replace it with --overwrite."
            )
        if not (directory / "config.json").is_file():
            raise FileExistsError(
                f"The output directory '{directory}' holds no model (config.json), so --overwrite does not replace it; "
                "remove it yourself, or choose another one."
            )
        new = {entry.name for entry in beside_weights(sources[0])} if sources[0].is_dir() else set()
        foreign = [
            entry.name
            for entry in sorted(directory.iterdir())
            if entry.name not in new and not any(fnmatch(entry.name, pattern) for pattern in _KNOWN)
        ]
        if foreign:
            raise FileExistsError(
                f"The output directory '{directory}' holds '{foreign[0]}' beside a model, and --overwrite would "
                "remove it; remove it yourself, or choose another directory."
            )
