# SPDX-License-Identifier: Apache-2.0
# A quantised model directory, read one weight at a time: which tensors belong to which weight, and which mask it has.
# Codes do not say which weights are pruned: a kept weight may be 0. Where it matters the mask comes from elsewhere:
# from a dense checkpoint of the same mask, or from our own MASK_NAME, which other tools leave alone.
"""Reading the files of a quantised checkpoint."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import DTYPES
from ..formats import pack_mask, sparse24_metadata, unpack_mask
from .files import CONFIG_NAME, dense_weights, open_file, stored_format, stored_quantization, tensor_files
from .quantized import ACTIVATIONS, GPTQ_PARTS, PARTS, SCALE, WEIGHT, Codes, decode_quantized
from .schemes import DENSE, GPTQ, Quantization, Scheme

MASK_NAME = "lors_mask.safetensors"
Read = Callable[[], Tensor]


class StoredWeight(NamedTuple):
    """A quantised weight and its mask, bool [N, K]; off it the codes are 0 (the zero point)."""

    name: str
    weight: Codes
    mask: Tensor


@dataclass
class QuantizedFiles:
    """The tensors of an opened directory.

    Attributes:
        plain: what reads each tensor that is not quantised.
        activations: tensors of quantised activations, which are not used, by their names.
        weights: the names of the quantised weights.
    """

    directory: Path
    quantization: Quantization
    plain: dict[str, Read]
    activations: dict[str, Read]
    _parts: dict[str, tuple[Scheme, dict[str, Read]]]
    _mask: Callable[[str, Codes], Tensor | None]
    _unsparse: list[str] = field(default_factory=list)
    _outside: int = 0
    _codes: int = 0

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(self._parts)

    def __iter__(self) -> Iterator[StoredWeight]:
        """The quantised weights, each read when it is asked for; at their end, warnings of what differs.

        Raises:
            ValueError: a weight is damaged, named in the message.
        """
        for name, (scheme, parts) in self._parts.items():
            weight = decode_quantized({part: read() for part, read in parts.items()}, scheme, name)
            nonzero = weight.nonzero()
            mask = self._mask(name, weight)
            if mask is not None:
                outside = int((nonzero & ~mask).sum())
                if outside:
                    weight = weight.masked(mask)
                self._outside += outside
                nonzero = mask
            self._codes += nonzero.numel()
            K = nonzero.shape[1]
            if K % 4 or bool((sparse24_metadata(pack_mask(nonzero), K) < 0).any()):
                self._unsparse.append(name)
            yield StoredWeight(name, weight, nonzero)
        self._warn()

    def _warn(self) -> None:
        if self._outside:
            warnings.warn(
                f"{self._outside} of {self._codes} codes of '{self.directory}' were outside the given masks, and are 0 "
                "now.",
                UserWarning,
                stacklevel=3,
            )
        if self._unsparse and self.quantization.two_of_four:
            warnings.warn(
                f"'{self.directory / CONFIG_NAME}' says that the weights are 2:4, and {len(self._unsparse)} of "
                f"{len(self._parts)} are not, such as '{self._unsparse[0]}': the quantization gave values to pruned "
                "weights. mask_from=DIRECTORY takes the masks of the sparse checkpoint that was quantized.",
                UserWarning,
                stacklevel=3,
            )


@contextlib.contextmanager
def quantized_files(
    directory: Path, quantization: Quantization, mask_from: Path | None = None
) -> Iterator[QuantizedFiles]:
    """Open a quantised model directory, inside a `with` block.

    Args:
        mask_from: a directory of the same model with dense weights, or in a sparse format, whose zeros are the masks.

    Raises:
        ValueError: files are missing, truncated or inconsistent; a quantised weight has no scheme in config.json.
    """
    with contextlib.ExitStack() as stack:
        stored = stack.enter_context(tensor_files(directory))
        plain, activations, parts = _grouped(directory, quantization, stored)
        mask: Callable[[str, Codes], Tensor | None] = _unknown
        if mask_from is not None:
            mask = stack.enter_context(_masks_of(mask_from))
        elif (directory / MASK_NAME).is_file():
            mask = stack.enter_context(_side_file(directory / MASK_NAME, parts))
        yield QuantizedFiles(directory, quantization, plain, activations, parts, mask)


def _unknown(name: str, weight: Codes) -> None:
    return None


def _grouped(
    directory: Path, quantization: Quantization, stored: Mapping[str, Read]
) -> tuple[dict[str, Read], dict[str, Read], dict[str, tuple[Scheme, dict[str, Read]]]]:
    """The tensors by what they belong to."""
    known = GPTQ_PARTS if quantization.groups[0][1].format == GPTQ else PARTS
    stems: dict[str, dict[str, Read]] = {}
    plain: dict[str, Read] = {}
    activations: dict[str, Read] = {}
    for name, read in stored.items():
        stem, _, part = name.rpartition(".")
        if stem and part in known:
            stems.setdefault(stem, {})[part] = read
        else:
            plain[name] = read
    result: dict[str, tuple[Scheme, dict[str, Read]]] = {}
    for stem, parts in stems.items():
        activations |= {f"{stem}.{part}": parts.pop(part) for part in ACTIVATIONS if part in parts}
        name = f"{stem}.{WEIGHT}"
        if not parts:
            continue
        scheme = quantization.scheme(stem)
        if name in plain:
            if set(parts) - {SCALE, "weight_zero_point"}:
                raise ValueError(f"'{directory}' holds '{name}' both whole and in parts. Copy the checkpoint again.")
            parts[WEIGHT] = plain.pop(name)
        result[name] = scheme, parts
    if not result:
        raise ValueError(
            f"'{directory / CONFIG_NAME}' says that weights are quantized ({quantization.formats}), and the files hold "
            "none that is: they do not belong together. Copy the checkpoint again."
        )
    return plain, activations, result


@contextlib.contextmanager
def _masks_of(directory: Path) -> Iterator[Callable[[str, Codes], Tensor]]:
    """The masks of a checkpoint that is not quantised: where its weights are not 0."""
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"mask_from is '{directory}', which holds no model: it has no {CONFIG_NAME}.")
    if stored_quantization(directory) is not None:
        raise ValueError(
            f"mask_from is '{directory}', which is quantized too; name the sparse checkpoint that it was made from."
        )
    with tensor_files(directory) as stored:
        weights = dense_weights(directory, stored, stored_format(directory) or DENSE)

        def mask(name: str, weight: Codes) -> Tensor:
            if name not in weights:
                raise ValueError(f"mask_from is '{directory}', which has no '{name}': it is another model.")
            dense = weights[name]()
            if dense.shape != weight.codes.shape or dense.dtype not in DTYPES:
                raise ValueError(
                    f"mask_from is '{directory}', whose '{name}' is {dense.dtype} with shape {tuple(dense.shape)}; the "
                    f"quantized one has {tuple(weight.codes.shape)}: it is another model."
                )
            return dense != 0

        yield mask


@contextlib.contextmanager
def _side_file(path: Path, weights: Mapping[str, Any]) -> Iterator[Callable[[str, Codes], Tensor | None]]:
    """The masks of our own side file: of the weights that keep zeros, `pack_mask` of the mask, by the weight's name."""
    with open_file(path) as masks:
        names = set(masks.keys())
        if names - set(weights):
            raise ValueError(
                f"'{path}' has a mask for '{min(names - set(weights))}', which is no quantized weight of the model: "
                "they do not belong together. Copy the checkpoint again."
            )

        def mask(name: str, weight: Codes) -> Tensor | None:
            if name not in names:
                return None
            bits = masks.get_tensor(name)
            N, K = weight.codes.shape
            sound = bits.dtype == torch.int32 and tuple(bits.shape) == (N, (K + 31) // 32)
            kept = unpack_mask(bits, K) if sound else None
            if kept is None or not torch.equal(pack_mask(kept), bits) or bool((weight.nonzero() & ~kept).any()):
                raise ValueError(
                    f"'{path}' is corrupted, or of another model: its mask of '{name}' does not fit the weight. Copy "
                    "the checkpoint again, or remove this file: weights whose code is 0 then count as pruned."
                )
            return kept

        yield mask


def read_plain(files: QuantizedFiles) -> dict[str, Tensor]:
    """The tensors that are not quantised.

    Raises:
        ValueError: one of them is a weight of codes, without a scale.
    """
    tensors = {}
    for name, read in files.plain.items():
        tensor = read()
        if name.endswith(f".{WEIGHT}") and tensor.dtype not in DTYPES:
            raise ValueError(
                f"'{files.directory}' is incomplete: '{name}' is {tensor.dtype}, and there is no '{SCALE}' beside it. "
                "Copy the checkpoint again."
            )
        tensors[name] = tensor
    return tensors
