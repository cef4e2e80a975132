# SPDX-License-Identifier: Apache-2.0
# The two files of an adapter directory in PEFT's format: adapter_config.json and adapter_model.safetensors with the
# keys base_model.model.<path>.lora_A.weight [r, K] and .lora_B.weight [N, r]; our own fields are under "lors".
# Of experts the path is the module's, as PEFT's wrappers of parameters have it: of two adapted stacks the first is
# inside the second, as <path>.base_layer. lora_A.weight is [E r, K] there, lora_B.weight [N, r E], column rho E + e.
# Used by checkpoint.py; knows no model. Files are replaced whole or not at all.
"""Reading and writing adapter directories."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ._checks import check_lora_fields
from ._files import replace_files
from .config import LoRSConfig
from .fingerprints import Fingerprint, from_fields

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMAT_VERSION = 1
PREFIX = "base_model.model."
# The peft_type of what lors_cuda saves. A PEFT that does not know it stops, instead of applying the adapter unmasked.
PEFT_TYPE = "LORS"
FORMER_PEFT_TYPE = "LORS: import lors_cuda.peft before loading this adapter"

# Fields of LoRSConfig that PEFT's LoraConfig has not.
OWN_FIELDS = ("gradient", "layout", "rounding", "rounding_seed", "requantize", "remainder", "dither_seed")

_ADAPTER_KEY = re.compile(re.escape(PREFIX) + r"(?P<name>.+)\.(?P<which>lora_[AB])\.weight")
_CHECKSUM = "lors_payload_sha256"
# Fields of PEFT's LoraConfig that lors_cuda.peft has and LoRSLinear has not.
_PEFT_ONLY = ("layers_to_transform", "trainable_token_indices")


@dataclass
class SavedAdapter:
    """What a directory holds: its configuration, the base it was trained on (None if PEFT wrote it), the tensors."""

    path: Path
    config: LoRSConfig
    trained_on: dict[str, Fingerprint] | None  # {module name: of its weight}
    adapters: dict[str, dict[str, Tensor]]  # {module name: {"lora_A": [r, K], "lora_B": [N, r]}}
    saved: dict[str, Tensor]  # {state_dict key: tensor} of modules_to_save


def file_names(layers: Mapping[str, int | None]) -> dict[str, str]:
    """{layer: the module's name in the file} of {layer: its number of experts, None of a linear}."""
    stacks: dict[str, list[str]] = {}
    for name, num_experts in layers.items():
        if num_experts is not None:
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
    names = {name: name for name in layers}
    for module, inside in stacks.items():
        names.update({name: f"{module}{'.base_layer' * depth}" for depth, name in enumerate(reversed(inside))})
    return names


def to_file(which: str, factor: Tensor) -> Tensor:
    """lora_A or lora_B as in the file; of experts from [E, r, K] and [E, N, r]."""
    if factor.dim() == 2:
        return factor
    return factor.flatten(0, 1) if which == "lora_A" else factor.permute(1, 2, 0).flatten(1)


def from_file(which: str, tensor: Tensor, num_experts: int | None) -> Tensor:
    """The inverse of `to_file`, a view; a tensor that cannot be one of experts is returned as it is."""
    if num_experts is None or tensor.dim() != 2 or tensor.shape[0 if which == "lora_A" else 1] % num_experts:
        return tensor
    if which == "lora_A":
        return tensor.unflatten(0, (num_experts, -1))
    return tensor.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def write_adapter(directory: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    """Write `tensors` (full keys) and the configuration's `fields`, the configuration last.

    Raises:
        OSError: the files could not be written; those that stood there before are complete.
    """
    safetensors_torch = require_safetensors()
    # Cloned, because safetensors refuses tensors that share memory (a head tied to an embedding, both saved).
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # safetensors has no checksum of its own; a flipped bit would load as a wrong number.
    checksum = hashlib.sha256(_payload(safetensors_torch.save(tensors))).hexdigest()
    weights = safetensors_torch.save(tensors, metadata={"format": "pt", _CHECKSUM: checksum})
    config = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    replace_files(directory, {WEIGHTS_NAME: weights, CONFIG_NAME: config.encode()})


def read_adapter(directory: Path) -> SavedAdapter:
    """Read both files and check them by themselves, without a model."""
    where, weights = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    fields = read_config(where)
    _check_linear_fields(where, fields)
    lors = fields.get("lors")
    trained_on = from_fields(lors)
    if lors is not None:
        if trained_on is None:
            raise ValueError(f"'{where}' is corrupted: its field 'lors' has no mask fingerprints. Save it again.")
        if lors.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"'{where}' has format version {lors.get('format_version')!r}, and this lors_cuda reads "
                f"{FORMAT_VERSION}. Install the version that wrote it, or a newer one."
            )
    own = ("r", "lora_alpha", "target_modules", "target_parameters", "exclude_modules", "use_rslora", "rank_pattern",
           "alpha_pattern", "modules_to_save")  # fmt: skip
    values = {name: fields[name] for name in own if name in fields}
    # save_adapter writes these into "lors", lors_cuda.peft beside it.
    held = {} if lors is None else {**fields, **lors}
    values.update({name: held[name] for name in OWN_FIELDS if name in held})
    try:
        config = LoRSConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{where}' does not describe a LoRS adapter: {error}") from error
    adapters: dict[str, dict[str, Tensor]] = {}
    saved = {}
    for key, tensor in sorted(read_weights(weights).items()):
        match = _ADAPTER_KEY.fullmatch(key)
        if match is not None:
            adapters.setdefault(match["name"], {})[match["which"]] = tensor
        elif key.startswith(PREFIX):
            saved[key.removeprefix(PREFIX)] = tensor
        else:
            raise ValueError(f"'{weights}' is no adapter: its tensor '{key}' does not begin with '{PREFIX}'.")
    unpaired = sorted(name for name, pair in adapters.items() if len(pair) != 2)
    if unpaired or not adapters:
        what = f"'{unpaired[0]}' has only one of lora_A and lora_B" if unpaired else "it has no lora_A and lora_B"
        raise ValueError(f"'{weights}' is incomplete: {what}. Save the adapter again.")
    return SavedAdapter(directory, config, trained_on, adapters, saved)


def read_config(path: Path) -> dict[str, Any]:
    """The fields of an adapter_config.json whose adapter can be masked: written by lors_cuda, or by PEFT as "LORA".

    Raises:
        FileNotFoundError: it does not exist. ValueError: it is damaged, of another kind, or uses what LoRS refuses.
    """
    try:
        fields = json.loads(_read_bytes(path))
    except ValueError as error:
        raise ValueError(f"'{path}' is not readable JSON: it is truncated or corrupted ({error}).") from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
    if kind not in ("LORA", PEFT_TYPE, FORMER_PEFT_TYPE):
        raise ValueError(f"'{path}' does not describe a LoRS or LoRA adapter: its peft_type is {kind!r}.")
    check_lora_fields(f"'{path}'", fields)
    config: dict[str, Any] = fields
    return config


def _check_linear_fields(path: Path, fields: dict[str, Any]) -> None:
    """Refuse what LoRS layers of lors_cuda.peft have and LoRSLinear has not."""
    unsupported = [name for name in _PEFT_ONLY if fields.get(name)]
    if fields.get("bias") not in (None, "none"):
        unsupported.append("bias")
    if fields.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        unsupported.append("init_lora_weights")  # pissa, olora, loftq and the like change the base weight
    if unsupported:
        used = ", ".join(f"{name}={fields[name]!r}" for name in unsupported)
        raise ValueError(
            f"'{path}' uses {used}, which LoRS layers do not have. Try "
            "lors_cuda.peft.from_pretrained, which has more of PEFT, or train the adapter without it."
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, and check it against the checksum if it was saved with one.

    Raises:
        FileNotFoundError: it does not exist. ValueError: it is truncated or corrupted.
    """
    data = _read_bytes(path)
    try:
        tensors: dict[str, Tensor] = require_safetensors().load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except Exception as error:  # safetensors raises its own type, and KeyError or others for a damaged header
        raise ValueError(
            f"'{path}' is not a readable safetensors file: it is truncated or corrupted ({error}). "
            "Save the adapter again, or copy the file again."
        ) from error
    expected = metadata.get(_CHECKSUM)
    if expected is not None and expected != hashlib.sha256(_payload(data)).hexdigest():
        raise ValueError(f"'{path}' is corrupted: its tensors do not have the checksum they were saved with.")
    return tensors


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"'{path}' does not exist; an adapter directory holds {CONFIG_NAME} and {WEIGHTS_NAME}."
        ) from None


def _payload(data: bytes) -> memoryview:
    """Return the tensors' bytes of a safetensors file: 8 bytes header length, the header, then the payload."""
    return memoryview(data)[8 + int.from_bytes(data[:8], "little") :]


def require_safetensors() -> Any:
    """Return safetensors.torch, or say how to install it; not imported at the top, where torch alone may be needed."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "Adapters are saved in the safetensors format, and the package is not installed: pip install safetensors"
        ) from None
    return safetensors.torch
