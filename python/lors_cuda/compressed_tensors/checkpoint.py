# SPDX-License-Identifier: Apache-2.0
# Model directories to transformers models and back. Compressed formats are decoded here because transformers passes
# them to compressed-tensors, which since 0.15 does not support them: the model would have random weights.
"""Loading and saving sparse models."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice
from .._files import new_directory
from ..adapter_directory import CONFIG_NAME as ADAPTER_CONFIG_NAME
from ..formats import pack_mask, sparse24_metadata
from ..sparse_linear import SparseLinear
from ..weight import SparseWeight
from .bitmask import BITMASK, FORMATS, SPARSE24_BITMASK
from .files import (
    COMPRESSION_KEYS,
    CONFIG_NAME,
    compress_files,
    read_tensors,
    require,
    stored_format,
    stored_quantization,
)
from .kept import QUANTIZED, check_no_conv1d, placeholders, put_kept, sparse_weight, write_quantized
from .quantized_files import quantized_files, read_plain
from .schemes import DENSE, Quantization

SAVE_FORMATS = (DENSE, *FORMATS, QUANTIZED)
KEEP = "keep"


def load_sparse_checkpoint(
    directory: str | Path,
    *,
    any_architecture: bool = False,
    quantized: str | None = None,
    mask_from: str | Path | None = None,
) -> nn.Module:
    """Load a causal language model from a directory: dense, compressed as `sparse-24-bitmask` or `sparse-bitmask`, or
    quantised, by compressed-tensors or GPTQ (docs/interchange.md lists the formats).

    Compressed weights are decoded to dense ones with exact zeros, one at a time, so the peak memory is the model plus
    one weight. Every byte of them is checked before the model is built. A directory that names no compressed format is
    loaded by transformers. Nothing is fetched from the network, and no code from the directory is run.

    An adapter in the same directory is not applied, and warned of: :func:`lors_cuda.load_adapter` loads it.

    Args:
        directory: with config.json.
        any_architecture: load the class of transformers that config.json names, whatever its task.
        quantized: what becomes of quantised weights. ``"keep"``: they stay codes in memory, in frozen
            :class:`lors_cuda.SparseLinear` layers, whose masks are the weights that are not 0. ``"dequantize"``:
            ordinary linears, code times scale rounded once to the scales' dtype, as compressed-tensors dequantises.
            None: they are refused. Other weights are loaded as ever.
        mask_from: a directory of the same model, not quantised, whose zeros are the masks of quantised weights: their
            codes alone do not tell a kept zero from a pruned weight. Codes off the masks become 0, with a warning.

    Returns:
        The transformers model, on the CPU, in the dtype its config.json names.

    Raises:
        FileNotFoundError: no such directory, or no config.json in it. ValueError: a quantised checkpoint without
            ``quantized``, or a format that is not read, named in the message; files that are missing, truncated,
            corrupted or inconsistent, with the first place; a tensor of the model that no file holds; ``mask_from`` of
            another model, or for weights that are not quantised. ModuleNotFoundError: no transformers.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"The model directory '{directory}' does not exist.")
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"'{directory}' holds no model: it has no {CONFIG_NAME}.")
    transformers = require("transformers")
    if (directory / ADAPTER_CONFIG_NAME).is_file():
        warnings.warn(f"'{directory}' holds an adapter beside the model, which is loaded without it.", stacklevel=2)
    if quantized is not None:
        check_choice("quantized", quantized, (KEEP, "dequantize"))
    quantization = stored_quantization(directory)
    kept: dict[str, SparseWeight] = {}
    if quantization is not None:
        files = _quantized_tensors(quantization, quantized, mask_from)
        tensors: dict[str, Tensor] | None = files[0]
        kept, activations = files[1:]
    elif mask_from is not None:
        raise ValueError(
            f"The weights in '{directory}' are not quantized, so they show their masks; leave mask_from out."
        )
    else:
        format = stored_format(directory)
        tensors = None if format is None else read_tensors(directory, format)
    try:
        model, info = (
            _from_files(transformers, directory, any_architecture)
            if tensors is None
            else _from_tensors(transformers, directory, tensors, any_architecture, kept)
        )
    except ImportError:
        raise
    except Exception as error:  # transformers, safetensors and pickle each raise their own types
        raise ValueError(f"The model in '{directory}' could not be loaded: {first_line(error)}") from error
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    unmerged = next((key for key in missing if f"{key}_values" in unexpected), None)
    if unmerged is not None:
        raise ValueError(
            f"The model in '{directory}' was saved unmerged: its '{unmerged}' is stored as a LoRS layer's tensors. "
            "Convert the base model by get_lors_model as for the training, load these tensors by load_state_dict, and "
            "save merge_and_unload(model)."
        )
    config: Any = model.config
    saved_as = (config.architectures or [type(model).__name__])[0]
    # A masked language model's tensors fit a causal one's class, but it was trained to see the whole text.
    if saved_as != type(model).__name__ and (missing or saved_as.endswith("ForMaskedLM")):
        raise ValueError(
            f"'{directory}' holds a {saved_as}, and a causal language model is needed; its weights are not those of a "
            f"{type(model).__name__}. Name another model's directory."
        )
    if missing:
        # transformers would use random values in their place.
        raise ValueError(
            f"The model in '{directory}' is incomplete: '{missing[0]}' and {len(missing) - 1} more tensors are not in "
            "its files. Copy or save it again."
        )
    if unexpected:
        warnings.warn(
            f"The files in '{directory}' hold '{unexpected[0]}' and {len(unexpected) - 1} more tensors that "
            f"{type(model).__name__} has no place for; they are left out. See whether config.json belongs to them.",
            stacklevel=2,
        )
    if quantization is not None:
        check_no_conv1d(model, directory)
    if quantization is not None and quantized == KEEP:
        put_kept(model, kept, tensors or {}, quantization, activations)
    return model


def save_sparse_checkpoint(model: nn.Module, directory: str | Path, format: str = DENSE) -> None:
    """Save a transformers model to a new directory, which appears complete or not at all.

    Args:
        format: ``"dense"``: ordinary safetensors with exact zeros and no sparsity config, which every tool loads.
            ``"sparse-24-bitmask"`` compresses the linears that are 2:4, ``"sparse-bitmask"`` those that become smaller.
            All other parameters stay dense. Both are for tools that still read them (compressed-tensors 0.9 to 0.14)
            and for :func:`load_sparse_checkpoint`. ``"quantized"``: of a model that was loaded with quantized="keep",
            the same scheme, scales and zero points; adapters that were trained with ``requantize`` are merged in. Where
            a kept weight has the code of 0, `lors_mask.safetensors` beside the model holds the mask, for
            :func:`load_sparse_checkpoint`.

    Raises:
        TypeError: not a transformers model. ValueError: an unknown format, unmerged adapters, a quantized model, or no
            linear that the format compresses.
        FileExistsError: the directory is not empty. OSError: the files could not be written.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"'{directory}' exists and is not an empty directory; choose another one.")
    with new_directory(directory) as temporary:
        write_model(model, temporary, format)


def write_model(model: nn.Module, directory: Path, format: str = DENSE) -> None:
    """:func:`save_sparse_checkpoint` into a directory that exists and is empty."""
    check_choice("format", format, SAVE_FORMATS)
    if format == QUANTIZED:
        write_quantized(model, directory)
        return
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"model is a {type(model).__name__}; it must be a transformers model, with save_pretrained.")
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            raise ValueError(
                f"'{name}' is a {type(module).__name__}; plain linears are saved. Call merge_and_unload first."
            )
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError("The model is quantized (its config has a quantization_config); dense models are saved here.")
    save: Any = model.save_pretrained
    if format == DENSE:
        save(str(directory))
        return
    linears = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name, weight in linears.items() if _worthwhile(weight.detach(), format)]
    if not chosen:
        needed = "2:4" if format == SPARSE24_BITMASK else "sparse enough"
        raise ValueError(
            f"None of the model's {len(linears)} linears is {needed}, so format {format!r} would compress nothing. "
            "Prune the model, or use format 'dense'."
        )
    zeros = sum(int((linears[name] == 0).sum()) for name in chosen)
    sparsity = {
        "sparsity_structure": "2:4" if format == SPARSE24_BITMASK else "unstructured",
        "global_sparsity": zeros / sum(linears[name].numel() for name in chosen),
        "targets": ["Linear"],
        "ignore": [name for name in linears if name not in chosen],
        "registry_requires_subclass": False,
    }
    # Small shards, because compress_files holds one in memory.
    save(str(directory), max_shard_size="2GB")
    compress_files(directory, {f"{name}.weight" for name in chosen}, format, sparsity)


def _worthwhile(weight: Tensor, format: str) -> bool:
    """Whether the format compresses this weight."""
    N, K = weight.shape
    if format == BITMASK:
        kept = int((weight != 0).sum())
        return kept * weight.itemsize + N * ((K + 7) // 8) + 8 * N < weight.nbytes
    return K % 4 == 0 and not bool((sparse24_metadata(pack_mask(weight != 0), K) < 0).any())


def _from_files(transformers: Any, directory: Path, any_architecture: bool) -> tuple[nn.Module, dict[str, Any]]:
    model_class = transformers.AutoModelForCausalLM
    if any_architecture:
        model_class = _named_class(transformers, _config(transformers, directory)) or model_class
    with _without_adapter(directory) as files:
        model, info = model_class.from_pretrained(
            str(files), local_files_only=True, trust_remote_code=False, dtype="auto", output_loading_info=True
        )
    model.name_or_path = model.config._name_or_path = str(directory)
    return model, info


@contextlib.contextmanager
def _without_adapter(directory: Path) -> Iterator[Path]:
    """The model's files without an adapter that is beside them, which transformers would apply by way of PEFT."""
    if not (directory / ADAPTER_CONFIG_NAME).is_file():
        yield directory
        return
    with tempfile.TemporaryDirectory() as links:
        for file in directory.iterdir():
            if file.name != ADAPTER_CONFIG_NAME:
                Path(links, file.name).symlink_to(file.resolve())
        yield Path(links)


def _quantized_tensors(
    quantization: Quantization, quantized: str | None, mask_from: str | Path | None
) -> tuple[dict[str, Tensor], dict[str, SparseWeight], dict[str, Tensor]]:
    """The model's tensors, those of quantised weights dequantised one at a time, or apart; and those of activations."""
    if quantized is None:
        raise ValueError(
            f"The weights in '{quantization.directory}' are quantized ({quantization.formats}). Load it with "
            "quantized='keep' (codes in memory, in frozen sparse layers) or quantized='dequantize' (ordinary linears)."
        )
    kept, lost = {}, 0
    with quantized_files(quantization.directory, quantization, None if mask_from is None else Path(mask_from)) as files:
        tensors = read_plain(files)
        activations = {name: read() for name, read in files.activations.items()}
        for stored in files:
            if quantized == KEEP:
                kept[stored.name] = sparse_weight(stored)
            else:
                dense = tensors[stored.name] = stored.weight.dequantize(stored.name)
                lost += int((stored.mask & (dense == 0)).sum())
    if lost:
        warnings.warn(
            f"{lost} kept weights of '{quantization.directory}' are 0, and count as pruned in ordinary linears; "
            "quantized='keep' keeps them.",
            UserWarning,
            stacklevel=3,
        )
    return tensors, kept, activations


def _config(transformers: Any, directory: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def _named_class(transformers: Any, config: Any) -> Any:
    """The class of transformers that a configuration names; None if there is none."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None) if names[0] else None


def _from_tensors(
    transformers: Any,
    directory: Path,
    tensors: dict[str, Tensor],
    any_architecture: bool,
    kept: dict[str, SparseWeight],
) -> tuple[nn.Module, dict[str, Any]]:
    """The same from tensors in memory, which become the model's parameters; the config loses its compression keys.
    Placeholders of the weights that are ``kept`` are added to the tensors."""
    config = _config(transformers, directory)
    for key in COMPRESSION_KEYS:
        if hasattr(config, key):
            delattr(config, key)
    # AutoModel takes a state_dict only with a directory; the model's own class takes it alone.
    model_class = _named_class(transformers, config) if any_architecture else None
    if model_class is None:
        with torch.device("meta"):
            model_class = type(transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    # In the model's dtype: a conversion would give them memory.
    floating = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    tensors |= placeholders(kept, config.dtype or next(floating, torch.float32))
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype="auto", output_loading_info=True
    )
    model.config._name_or_path = str(directory)
    if (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    return model, info


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
