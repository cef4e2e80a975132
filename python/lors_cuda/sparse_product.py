# SPDX-License-Identifier: Apache-2.0
"""Products of 2:4 weights on the sparse tensor cores, seen from Python: what serves, what was chosen, and keeping it.

The products themselves are taken inside ``lors::linear`` (csrc/torch/cuda_sparse_product.h, docs/sparse-products.md).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _library
from ._files import replace_file
from ._library import BUILD, lors

PRODUCTS = ("auto", "dense", "sparse")
_FORMAT = "lors_cuda product choices"
_SIDES = 16  # what both sides of a weight must be multiples of
_MULTIPLES = {"out_features": _SIDES, "in_features": _SIDES, "tokens": 8}


@dataclasses.dataclass(frozen=True)
class ProductChoice:
    """How one kind of product is taken, and what each way took in microseconds (0: not measured)."""

    operation: str  # "forward" or "input_gradient"
    out_features: int
    in_features: int
    tokens: int
    dtype: str
    bias: bool
    in_place: bool  # the merge writes cuSPARSELt's compressed values itself
    products: str  # "dense" or "sparse"
    dense_us: float
    sparse_us: float
    note: str  # why not "sparse", where that is no matter of time
    algorithm: tuple[int, int, int] | None  # what cuSPARSELt's search found


@dataclasses.dataclass(frozen=True)
class PlanCacheInfo:
    """The plans of one device. ``reason``: why no product there is taken on the sparse tensor cores; None: some may."""

    hits: int = 0
    misses: int = 0
    searches: int = 0
    size: int = 0
    maximum: int = 0
    library_version: str | None = None
    reason: str | None = None
    choices: tuple[ProductChoice, ...] = ()


def sparse_product_reason(device: torch.device | int | str | None = None) -> str | None:
    """Why products on ``device`` (default: torch's current CUDA device) never use the sparse tensor cores: a sentence
    without its full stop, or None."""
    if device is not None and not isinstance(device, int):
        device = torch.device(device)
        if device.type != "cuda":
            return f"there are no sparse tensor cores on {device.type} devices"
        device = device.index
    reason = _library._cuda_reason(device)
    return _problem(_index(device)) if reason is None else reason


def plan_cache_info(device: int | None = None) -> PlanCacheInfo:
    """Plans, counts and choices of a CUDA device (default: torch's current one); without one the reason alone."""
    reason = sparse_product_reason(device)
    if not _has_device(device):
        return PlanCacheInfo(reason=reason)
    info = json.loads(lors.sparse_product_info(_index(device)))
    return PlanCacheInfo(
        hits=info["hits"],
        misses=info["misses"],
        searches=info["searches"],
        size=len(info["plans"]),
        maximum=info["maximum"],
        library_version=info["version"] or None,
        reason=reason,
        choices=tuple(_choice(entry) for entry in info["choices"]),
    )


def plan_cache_clear(device: int | None = None) -> None:
    """Forget plans, choices and counts of a CUDA device (default: torch's current one).

    Plans that a CUDA graph holds stay.
    """
    if _has_device(device):
        lors.sparse_product_clear(_index(device))


def save_product_choices(path: str | os.PathLike[str], device: int | None = None) -> int:
    """Write what was measured on a CUDA device (default: torch's current one) as JSON; how many choices there were.

    Loaded on a machine of the same kind, it spares the measurements and makes two runs take the same products.
    """
    choices = plan_cache_info(device).choices
    document = {
        "format": _FORMAT,
        "version": 1,
        **_machine(device),
        "choices": [dataclasses.asdict(choice) for choice in choices],
    }
    replace_file(Path(path), (json.dumps(document, indent=1) + "\n").encode())
    return len(choices)


def load_product_choices(path: str | os.PathLike[str], device: int | None = None) -> int:
    """Take over the choices that :func:`save_product_choices` wrote; how many. All of them, or none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or is of another device, another version of cuSPARSELt or another lors_cuda.
        RuntimeError: no product of this device can be taken on the sparse tensor cores, for the reason that is given.
    """
    choices = _read(Path(path), _machine(device))
    reason = sparse_product_reason(device)
    if choices and reason is not None:
        raise RuntimeError(f"The choices in {path} cannot be used here: {reason}.")
    for c in choices:
        algorithm = (-1, 1, 0) if c.algorithm is None else c.algorithm
        lors.sparse_product_set(
            _index(device),
            c.out_features,
            c.in_features,
            c.tokens,
            c.dtype,
            c.operation,
            c.in_place,
            c.bias,
            c.products,
            c.dense_us,
            c.sparse_us,
            c.note,
            *algorithm,
        )
    return len(choices)


def library_metadata(values: Tensor, metadata: Tensor) -> Tensor | None:
    return None
    """What cuSPARSELt puts behind the values of a 2:4 weight [N, K]: uint8, 1/16 of the dense 16-bit bytes.

    It depends on the mask alone, and its order is not documented: the library makes it, from a weight with this mask.
    That also shows whether its values stand where ours do, which is not documented either; None if not, or if the
    library does not serve values [N, K/2] of this type on their device. Waits for the device. Where making it fails
    (the library refuses, or memory for 2.1 times the dense weight is not there), a warning says why, and the weight
    goes without: its sparse products are then compressed by the library each time.
    """
    N, K = values.shape[0], 2 * values.shape[1]
    served = values.dtype in (torch.bfloat16, torch.float16) and N % _SIDES == 0 and K % _SIDES == 0
    if not served or sparse_product_reason(values.device) is not None:
        return None
    # Every group has two here, so the library has no choice of its own where it puts them.
    try:
        full = torch.tensor(_full_codes(), dtype=torch.uint8, device=values.device)[metadata.int()]
        dense = lors.sparse24_decompress(_pattern(values), full)
        del full
        compressed = lors.sparse_product_compress(dense)
        del dense
    except RuntimeError as error:
        warnings.warn(f"A 2:4 weight of {N} x {K} goes without cuSPARSELt's metadata: {error}", stacklevel=2)
        return None
    if not torch.equal(compressed[: values.nbytes].view(values.dtype).view(values.shape), _pattern(values)):
        return None
    return compressed[values.nbytes :].clone()


def is_transposable(values: Tensor, metadata: Tensor) -> bool:
    return False
    """Whether the mask of a 2:4 weight is 2:4 along out_features too. Waits for the device; on meta False."""
    if values.device.type == "meta":
        return False
    bits = lors.sparse24_mask(metadata, 2 * values.shape[1])
    # The mask says what is kept; the weight is there for its shape.
    return not lors.sparse24_inspect(lors.sparse24_decompress(values, metadata), bits)[2].item()


def check_products(products: str) -> None:
    """Refuse another word than "auto", "dense" or "sparse"."""
    if products not in PRODUCTS:
        raise ValueError(f"products is {products!r}; it must be {', '.join(map(repr, PRODUCTS))}.")


def _index(device: int | None) -> int:
    return torch.cuda.current_device() if device is None else device


def _has_device(device: int | None) -> bool:
    return _library._cuda_reason(device) is None


@functools.cache
def _problem(index: int) -> str | None:
    problem: str = lors.sparse_product_problem(index)
    return problem.removesuffix(".") or None


def _pattern(values: Tensor) -> Tensor:
    """Values that tell their place: 1 to 251, a prime, exact in 8 bits; neighbours differ."""
    rows, columns = (torch.arange(n, device=values.device).remainder(251).to(torch.int16) for n in values.shape)
    return rows.mul(97).remainder(251)[:, None].add(columns).remainder_(251).add_(1).to(values.dtype)


@functools.cache
def _full_codes() -> list[int]:
    """For each byte of 2:4 metadata the one whose groups keep two, the kept ones in their slots (docs/formats.md)."""
    codes = []
    for code in range(16):
        first, second = code & 3, code >> 2
        if first == second:
            first, second = (2, 3) if first == 3 else (first, 3)
        elif first > second:
            first, second = 0, 1
        codes.append(first | second << 2)
    return [codes[byte & 15] | codes[byte >> 4] << 4 for byte in range(256)]


def _choice(entry: dict[str, Any]) -> ProductChoice:
    fields = {field.name: entry[field.name] for field in dataclasses.fields(ProductChoice)}
    if fields["algorithm"] is not None:
        fields["algorithm"] = tuple(fields["algorithm"])
    return ProductChoice(**fields)


def _machine(device: int | None) -> dict[str, Any]:
    """What choices hold for."""
    if not _has_device(device):
        return {"device": None, "cusparselt": None, "lors_cuda": BUILD["version"]}
    name = torch.cuda.get_device_name(_index(device))
    return {"device": name, "cusparselt": plan_cache_info(device).library_version, "lors_cuda": BUILD["version"]}


_TYPES: dict[str, type | tuple[type, ...]] = {
    "operation": str,
    "out_features": int,
    "in_features": int,
    "tokens": int,
    "dtype": str,
    "bias": bool,
    "in_place": bool,
    "products": str,
    "dense_us": (int, float),
    "sparse_us": (int, float),
    "note": str,
}
_WORDS = {
    "operation": ("forward", "input_gradient"),
    "dtype": ("bfloat16", "float16"),
    "products": ("dense", "sparse"),
}


def _read(path: Path, machine: dict[str, Any]) -> list[ProductChoice]:
    """The choices of a file, all of them checked."""
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it must be what save_product_choices wrote.") from None
    if not isinstance(document, dict) or document.get("format") != _FORMAT or document.get("version") != 1:
        raise ValueError(
            f"{path} holds no product choices of this version; it must be what save_product_choices wrote."
        )
    for key, here in machine.items():
        if document.get(key) != here:
            raise ValueError(
                f"The choices in {path} were measured with {key} {document.get(key)}, and here it is {here}; times do "
                "not carry over. Measure them here and save them again."
            )
    choices = document.get("choices")
    if not isinstance(choices, list):
        raise ValueError(f"{path} has no list of choices; it must be what save_product_choices wrote.")
    for number, entry in enumerate(choices):
        problem = _problem_of(entry)
        if problem is not None:
            raise ValueError(f"Choice {number} in {path} {problem}; save the choices again.")
    return [_choice(entry) for entry in choices]


def _problem_of(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return "is no table of fields"
    for name, wanted in _TYPES.items():
        value = entry.get(name)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            return f"has {value!r} for {name}"
        if name in _WORDS and value not in _WORDS[name]:
            return f"has {value!r} for {name}, which must be one of {', '.join(_WORDS[name])}"
        if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
            return f"has {value!r} for {name}"
        multiple = _MULTIPLES.get(name)
        if multiple and isinstance(value, int) and (value == 0 or value % multiple or value >= 2**31):
            return f"has {value!r} for {name}, which must be a multiple of {multiple} below 2^31"
    N, K, T = (entry[name] for name in _MULTIPLES)
    if max(N * K, N * T, K * T) >= 2**31:
        return f"is of {T} tokens and a weight of {N} x {K}; each matrix must have fewer than 2^31 elements"
    algorithm = entry.get("algorithm")
    if algorithm is not None and not (
        isinstance(algorithm, list)
        and len(algorithm) == 3
        and all(type(number) is int and abs(number) < 2**31 for number in algorithm)
    ):
        return f"has {algorithm!r} for algorithm, which must be three numbers or null"
    return None
