# SPDX-License-Identifier: Apache-2.0
# What config.json says about quantised weights: `quantization_config` of compressed-tensors, with its groups of
# modules, and of GPTQ. Nothing here is trusted; the tensors are compared with it in quantized.py. Reads no tensors.
"""How the weights of a quantised checkpoint are stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .bitmask import SPARSE24_BITMASK

PACK, FLOAT, INT, NAIVE = "pack-quantized", "float-quantized", "int-quantized", "naive-quantized"
MARLIN24, GPTQ = "marlin-24", "gptq"
DENSE = "dense"
_FORMATS = (PACK, FLOAT, INT, NAIVE, MARLIN24)
READ = f"{', '.join(_FORMATS)} and GPTQ are read"
_KINDS = {"int weights of 4 bits": "int4", "int weights of 8 bits": "int8", "float weights of 8 bits": "e4m3"}
# {zero point as it is stored by each version of GPTQ's files: what was subtracted from it}
_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 0}
ELSE = "Use the checkpoint that it was made from"


@dataclass(frozen=True)
class Scheme:
    """How one module's weight is stored.

    Attributes:
        format: "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "marlin-24" or "gptq".
        kind: the grid: "int8", "int4" or "e4m3".
        strategy: what shares a scale: "tensor", "channel" (a row) or "group".
        group: columns in a group; None unless the strategy is "group".
        symmetric: there are no zero points.
        bitmask: `weight` is stored as ``sparse-24-bitmask``.
        subtracted: from the zero points of "gptq", before they were stored.
    """

    format: str
    kind: str
    strategy: str
    group: int | None = None
    symmetric: bool = True
    bitmask: bool = False
    subtracted: int = 0

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    def columns(self, K: int) -> int:
        """Columns that share a scale, of a weight with K."""
        return self.group or K


@dataclass(frozen=True)
class Quantization:
    """A directory's quantisation.

    Attributes:
        block: config.json's ``quantization_config``, as it is.
        groups: each with its targets (names of modules or classes, and "re:" with a regular expression).
        two_of_four: config.json says that the weights are 2:4.
    """

    directory: Path
    block: dict[str, Any]
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    two_of_four: bool = False

    @property
    def formats(self) -> str:
        """For messages: the formats of its weights."""
        names = {
            f"{scheme.format} + {SPARSE24_BITMASK}" if scheme.bitmask else scheme.format for _, scheme in self.groups
        }
        return " and ".join(sorted(names))

    def scheme(self, module: str) -> Scheme:
        """How a module's weight is stored: by its name first, then by an expression, then by its class.

        Raises:
            ValueError: no group is meant for it.
        """
        for meant in (lambda target: target == module, lambda target: _matches(target, module), _is_class):
            for targets, scheme in self.groups:
                if any(meant(target) for target in targets):
                    return scheme
        raise ValueError(
            f"'{self.directory}' holds the quantized weight of '{module}', and no group of its config.json "
            "(config_groups) is meant for it: they do not belong together. Copy the checkpoint again."
        )


def _matches(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _is_class(target: str) -> bool:
    return target.isidentifier()


def parse_quantization(directory: Path, block: dict[str, Any]) -> Quantization | None:
    """The quantisation that a block of config.json describes; None if its weights are not quantised.

    Raises:
        ValueError: a method or format that is not read, by its name; or the block contradicts itself.
    """
    method = block.get("quant_method", "compressed-tensors")
    if method == GPTQ:
        return Quantization(directory, block, ((("re:",), _gptq(directory, block)),))  # whatever its name
    if method != "compressed-tensors":
        _refuse(directory, f"is quantized with {method!r}; {READ}. {ELSE}.")
    inner = block.get("quantization_config")
    nested = not block.get("config_groups") and isinstance(inner, dict) and bool(inner.get("config_groups"))
    described: dict[str, Any] = inner if nested and isinstance(inner, dict) else block
    for key, what in (("kv_cache_scheme", "has quantized keys and values of its attention"),
                      ("transform_config", "was transformed by compressed-tensors")):  # fmt: skip
        if described.get(key):
            _refuse(directory, f"{what} ({key}), which is not read. {ELSE}.")
    format = described.get("format")
    groups = described.get("config_groups")
    if not groups:
        if format in (None, DENSE) or (isinstance(format, str) and format.startswith("sparse-")):
            return None
        _refuse(
            directory, f"is stored in the compressed format {format!r} without groups (config_groups); {READ}. {ELSE}."
        )
    if not isinstance(groups, dict):
        _corrupted(directory, f"config_groups is a {type(groups).__name__}, and must be an object")
    sparsity = block.get("sparsity_config") or {}
    if not isinstance(sparsity, dict):
        _corrupted(directory, f"sparsity_config is a {type(sparsity).__name__}, and must be an object")
    stored = sparsity.get("format") or DENSE
    if stored != DENSE and stored != SPARSE24_BITMASK:
        _refuse(
            directory,
            f"is quantized and stored in the compressed format {stored!r} besides; of quantized weights "
            f"{SPARSE24_BITMASK} is read. {ELSE}.",
        )
    parsed = tuple(_group(directory, name, group, format, stored == SPARSE24_BITMASK) for name, group in groups.items())
    return Quantization(directory, block, parsed, sparsity.get("sparsity_structure") == "2:4")


def _group(directory: Path, name: str, group: Any, whole: Any, bitmask: bool) -> tuple[tuple[str, ...], Scheme]:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        _corrupted(directory, f"config_groups['{name}'] must be an object with a list of targets")
    for target in targets:
        try:
            _matches(target, "")
        except (re.error, RecursionError, OverflowError) as error:
            _corrupted(directory, f"the target {target!r} is no regular expression ({error})")
    format = str(group.get("format") or whole)
    if format not in _FORMATS:
        _refuse(directory, f"is quantized by compressed-tensors in the format {format!r}; {READ}. {ELSE}.")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        _refuse(directory, f"cannot be read: config_groups['{name}'] quantizes no weights, only activations. {ELSE}.")
    what = f"{weights.get('type', 'int')} weights of {weights.get('num_bits', 8)} bits"
    kind = _KINDS.get(what)
    if kind is None:
        _refuse(directory, f"has {what} ({format}); int of 4 and 8 bits and float of 8 bits are read. {ELSE}.")
    allowed = {PACK: ("int4", "int8"), MARLIN24: ("int4", "int8"), FLOAT: ("e4m3",), INT: ("int4", "int8")}
    if kind not in allowed.get(format, (kind,)):
        _corrupted(directory, f"config_groups['{name}'] puts {kind} weights into the format {format!r}")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        _refuse(directory, f"cannot be read: its weights are in act-order (actorder={weights['actorder']!r}). {ELSE}.")
    size = weights.get("group_size")
    strategy = (
        str(weights["strategy"])
        if weights.get("strategy")
        else ("tensor" if size is None else "channel" if size == -1 else "group")
    )
    if strategy not in ("tensor", "channel", "group"):
        _refuse(
            directory,
            f"has weights with a scale for each {strategy!r}; tensor, channel and group are read. {ELSE}.",
        )
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        _corrupted(directory, f"config_groups['{name}'] has symmetric={symmetric!r}")
    if bitmask and format not in (FLOAT, INT, NAIVE):
        _corrupted(directory, f"it stores the format {format!r} as {SPARSE24_BITMASK}")
    if format == MARLIN24 and (not symmetric or (strategy, size) not in (("group", 128), ("channel", size))):
        _corrupted(
            directory,
            f"marlin-24 is symmetric, with groups of 128 or a scale for each row; config_groups['{name}'] is not",
        )
    columns = _group_size(directory, size) if strategy == "group" else None
    return tuple(targets), Scheme(format, kind, strategy, columns, symmetric or kind == "e4m3", bitmask)


def _gptq(directory: Path, block: dict[str, Any]) -> Scheme:
    version = str(block.get("checkpoint_format", block.get("format", "gptq")))
    if version not in _GPTQ_VERSIONS or block.get("is_marlin_format"):
        which = "marlin" if block.get("is_marlin_format") else version
        _refuse(directory, f"is quantized with GPTQ and stored as {which!r}; 'gptq' and 'gptq_v2' are read. {ELSE}.")
    bits = block.get("bits")
    if isinstance(bits, bool) or bits not in (4, 8):
        _refuse(directory, f"is quantized with GPTQ to {bits!r} bits; 4 and 8 are read. {ELSE}.")
    if block.get("desc_act"):
        _refuse(directory, f"is quantized with GPTQ in act-order (desc_act), which is not read. {ELSE}.")
    if block.get("dynamic"):
        _refuse(directory, f"is quantized with GPTQ differently for each module (dynamic), which is not read. {ELSE}.")
    size = block.get("group_size", -1)
    strategy, columns = ("channel", None) if size == -1 else ("group", _group_size(directory, size))
    return Scheme(GPTQ, f"int{bits}", strategy, columns, False, subtracted=_GPTQ_VERSIONS[version])


def _group_size(directory: Path, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        _corrupted(directory, f"group_size is {size!r}, and must be an integer of at least 1")
    return size


def _refuse(directory: Path, what: str) -> NoReturn:
    raise ValueError(f"The model in '{directory}' {what}")


def _corrupted(directory: Path, what: str) -> NoReturn:
    raise ValueError(f"'{directory / 'config.json'}' is corrupted: {what}. Copy the checkpoint again.")
