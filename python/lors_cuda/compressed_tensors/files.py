# SPDX-License-Identifier: Apache-2.0
# A model directory's config.json and safetensors files: names are checked against the index before a tensor is read,
# then weights are read one at a time. Used by checkpoint.py; builds no model.
"""Reading and writing the files of a compressed checkpoint."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import replace_file
from .bitmask import FORMATS, PARTS, decode_weight, encode_weight
from .schemes import DENSE, ELSE, Quantization, parse_quantization

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
# The keys of compressed-tensors' configuration: since 0.7; in 0.4 to 0.6; the last two in 0.3.
COMPRESSION_KEYS = ("quantization_config", "compression_config", "sparsity_config", "sparseml_quantization_config")
_PART_NAMES = frozenset(part for parts in PARTS.values() for part in parts)


def require(package: str) -> Any:
    """Import an optional package, or say how to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"Model directories are read and written with the package {error.name}, which is not installed: "
            "pip install 'lors-cuda[hf]'",
            name=error.name,
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not readable JSON: it is truncated or corrupted ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, and it must be a JSON object.")
    return content


def _blocks(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts of config.json that describe how weights are stored, by their keys.

    Raises:
        ValueError: a damaged config.json.
    """
    config = read_json(directory / CONFIG_NAME)
    for key in COMPRESSION_KEYS:
        block = config.get(key)
        if block and not isinstance(block, dict):
            raise ValueError(f"'{directory / CONFIG_NAME}' is corrupted: its {key} is a {type(block).__name__}.")
        if block:
            yield key, block


def stored_quantization(directory: Path) -> Quantization | None:
    """How a model directory's config.json says that its weights are quantised; None if they are not.

    Raises:
        ValueError: a method or format that is not read, named in the message; a damaged config.json.
    """
    parsed = (parse_quantization(directory, block) for key, block in _blocks(directory) if key != "sparsity_config")
    return next((found for found in parsed if found is not None), None)


def stored_format(directory: Path) -> str | None:
    """The format that a model directory's config.json names: one of FORMATS, ``"dense"`` (a sparsity config without
    compression), or None if it names none. Not of quantised weights: see :func:`stored_quantization`.

    Raises:
        ValueError: another compressed format, named in the message; a damaged config.json.
    """
    found = None
    for key, block in _blocks(directory):
        sparsity = block if key == "sparsity_config" else block.get("sparsity_config") or {}
        name = sparsity.get("format") or DENSE if isinstance(sparsity, dict) else sparsity
        if name != DENSE and name not in FORMATS:
            raise ValueError(
                f"'{directory}' is stored in the compressed format {name!r}; {', '.join(FORMATS)} and dense are read. "
                f"{ELSE}, or another copy of it."
            )
        found = name if found in (None, DENSE) else found
    return found


def read_tensors(directory: Path, format: str) -> dict[str, Tensor]:
    """Every tensor of a model directory's safetensors files, dense and on the CPU, decoded one weight at a time.

    Names are checked before the first tensor is read: shards that are missing, truncated or disagree with the index,
    and compressed weights that lack a part.

    Args:
        format: one of FORMATS, or ``"dense"``.

    Raises:
        ValueError: anything missing, damaged or inconsistent, named in the message.
    """
    with tensor_files(directory) as stored:
        return {name: read() for name, read in dense_weights(directory, stored, format).items()}


@contextlib.contextmanager
def tensor_files(directory: Path) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """What reads each tensor of a model directory's safetensors files, by its name, inside a `with` block.

    Raises:
        ValueError: shards are missing, truncated, or disagree with the index or with each other.
    """
    with contextlib.ExitStack() as stack:
        shards = {path: stack.enter_context(open_file(path)) for path in _shard_paths(directory)}
        stored: dict[str, Callable[[], Tensor]] = {}
        for path, shard in shards.items():
            for name in shard.keys():  # noqa: SIM118 (no mapping)
                if name in stored:
                    raise ValueError(f"'{directory}' holds the tensor '{name}' twice, also in '{path.name}'.")
                stored[name] = partial(_tensor, directory, shard, name)
        _check_index(directory, shards)
        yield stored


def dense_weights(
    directory: Path, stored: Mapping[str, Callable[[], Tensor]], format: str
) -> dict[str, Callable[[], Tensor]]:
    """What reads each tensor of the model, decoded from ``format``, one of FORMATS or ``"dense"``.

    Raises:
        ValueError: a compressed weight lacks a part, or is there twice.
    """
    plain, compressed = _group(directory, stored, format)

    def decoded(name: str, keys: dict[str, str]) -> Tensor:
        return decode_weight({part: stored[key]() for part, key in keys.items()}, format, name)

    return {name: stored[name] for name in plain} | {
        name: partial(decoded, name, keys) for name, keys in compressed.items()
    }


def _group(directory: Path, names: Collection[str], format: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The names of uncompressed tensors, and {weight: {part: tensor name}} of the compressed ones."""
    stems: dict[str, dict[str, str]] = {}
    plain = []
    for name in names:
        stem, _, part = name.rpartition(".")
        if part in _PART_NAMES and stem:
            stems.setdefault(stem, {})[part] = name
        else:
            plain.append(name)
    if format == DENSE and stems:
        stem, parts = next(iter(stems.items()))
        raise ValueError(
            f"'{directory / CONFIG_NAME}' names no compressed format, but the files hold '{stem}' in parts "
            f"({', '.join(sorted(parts))}): they do not belong together. Copy the checkpoint again."
        )
    # Up to 0.8.1 compressed-tensors put the parts below a parameter's whole name, since 0.9 below its module's.
    whole = any(stem.endswith(".weight") for stem in stems)
    compressed = {stem if whole else f"{stem}.weight": parts for stem, parts in stems.items()}
    for weight, parts in compressed.items():
        lacking = [part for part in PARTS[format] if part not in parts]
        if lacking:
            raise ValueError(
                f"'{directory}' is incomplete: the compressed weight '{weight}' has no "
                f"{', '.join(map(repr, lacking))}. Copy the checkpoint again."
            )
        if weight in names:
            raise ValueError(f"'{directory}' holds '{weight}' both dense and compressed. Copy the checkpoint again.")
    return plain, compressed


def _shard_paths(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_NAME).is_file():
        return [directory / WEIGHTS_NAME]
    if not (directory / INDEX_NAME).is_file():
        raise ValueError(
            f"'{directory}' has neither {WEIGHTS_NAME} nor {INDEX_NAME}; compressed checkpoints are read from "
            "safetensors files only."
        )
    paths = [directory / file for file in sorted(set(_weight_map(directory).values()))]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"'{directory}' is incomplete: its {INDEX_NAME} names '{path.name}', which is not there. Copy it too."
            )
    return paths


def _weight_map(directory: Path) -> dict[str, str]:
    index = directory / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    # File names only: an index must not point outside its directory.
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise ValueError(f"'{index}' is corrupted: its weight_map must give each tensor the name of a file beside it.")
    return weight_map


def _is_file_name(value: object) -> bool:
    if not isinstance(value, str) or value in ("", ".", "..") or "\0" in value:
        return False
    return Path(value).name == value and len(os.fsencode(value)) <= 255


def _check_index(directory: Path, shards: Mapping[Path, Any]) -> None:
    if [path.name for path in shards] == [WEIGHTS_NAME]:
        return  # transformers ignores an index then
    held = {path.name: set(shard.keys()) for path, shard in shards.items()}
    for name, file in _weight_map(directory).items():
        if name not in held[file]:
            raise ValueError(
                f"'{directory / INDEX_NAME}' says that '{name}' is in '{file}', where it is not: they do not belong "
                "together. Copy the checkpoint again."
            )


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """A safetensors file; opening it checks its header against its size."""
    safetensors = require("safetensors")
    try:
        opened = safetensors.safe_open(str(path), framework="pt")
    except Exception as error:  # safetensors' own type, and others for a damaged header
        raise ValueError(
            f"'{path}' is not a readable safetensors file: it is truncated or corrupted ({error}). Copy it again."
        ) from None
    with opened as shard:
        yield shard


def _tensor(directory: Path, shard: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = shard.get_tensor(name)
    except Exception as error:  # a dtype that this torch or safetensors does not support
        raise ValueError(f"The tensor '{name}' in '{directory}' could not be read: {error}.") from None
    return tensor


def compress_files(directory: Path, weights: Collection[str], format: str, sparsity: Mapping[str, Any]) -> None:
    """Rewrite dense safetensors: ``weights`` (names of tensors) in ``format``, and ``sparsity`` in config.json.

    One shard at a time is in memory. No one else may read the directory meanwhile: it holds both kinds of shards.
    """
    safetensors_torch = require("safetensors.torch")
    paths = _shard_paths(directory)
    weight_map, total = {}, 0
    for path in paths:
        with open_file(path) as shard:
            tensors: dict[str, Tensor] = {}
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                if name in weights:
                    stem = name.removesuffix(".weight")
                    tensors.update({f"{stem}.{part}": t for part, t in encode_weight(tensor, format).items()})
                else:
                    tensors[name] = tensor
            rewritten = path.with_suffix(".rewritten")
            safetensors_torch.save_file(tensors, str(rewritten), metadata={"format": "pt"})
        os.replace(rewritten, path)
        weight_map.update(dict.fromkeys(tensors, path.name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if (directory / INDEX_NAME).is_file():
        index = read_json(directory / INDEX_NAME)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        index["weight_map"] = weight_map
        replace_file(directory / INDEX_NAME, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    config = read_json(directory / CONFIG_NAME)
    sparsity = {**sparsity, "format": format}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    replace_file(directory / CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
