# SPDX-License-Identifier: Apache-2.0
"""Damaged quantised weights, files and configurations: refused, or read as a slow reader reads them."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interchange_cases import damage, raw, sparse24
from lors_cuda.compressed_tensors.files import stored_quantization
from lors_cuda.compressed_tensors.quantized import decode_quantized
from lors_cuda.compressed_tensors.quantized_files import quantized_files, read_plain
from lors_cuda.compressed_tensors.schemes import parse_quantization
from quantized_writers import SCHEMES, config_of, parts_of, quantized, read_slowly

safetensors_torch = pytest.importorskip("safetensors.torch")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int32, torch.int64]


@st.composite
def damaged_parts(draw):
    """The parts of a weight after bytes of one were changed, or it was cut, retyped, reshaped or taken from another."""
    scheme = SCHEMES[draw(st.sampled_from(sorted(SCHEMES)))]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    K = (scheme.group or 32) * draw(st.integers(1, 2))
    N = 64 if scheme.format == "marlin-24" else 8 * draw(st.integers(1, 2))
    parts = parts_of(quantized(sparse24(N, K), scheme), scheme)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(parts)))
        part = parts[name].clone()
        kind = draw(st.sampled_from(["bytes", "bytes", "cut", "dtype", "shape", "swap", "drop"]))
        if kind == "bytes" and part.numel():
            data = part.reshape(-1).view(torch.uint8)
            for _ in range(draw(st.integers(1, 4))):
                data[draw(st.integers(0, data.numel() - 1))] = draw(st.integers(0, 255))
        elif kind == "cut":
            part = part[: draw(st.integers(0, part.shape[0]))] if part.dim() else part
        elif kind == "dtype":
            part = part.to(draw(st.sampled_from(DTYPES)))
        elif kind == "shape":
            part = draw(
                st.sampled_from(
                    [
                        part.reshape(-1),
                        part.reshape(1, -1),
                        part.reshape(-1, 1),
                        part[..., :0],
                        part.t() if part.dim() == 2 else part,
                    ]
                )
            )
        elif kind == "swap":
            part = parts[draw(st.sampled_from(sorted(parts)))]
        parts[name] = part
        if kind == "drop" and len(parts) > 1:
            del parts[name]
    return scheme, parts


@given(damaged_parts())
def test_damaged_parts_are_refused_or_read_as_they_are(case):
    scheme, parts = case
    before = {name: part.clone() for name, part in parts.items()}
    with contextlib.suppress(ValueError):
        read = decode_quantized(parts, scheme, "w")
        dense = read.dequantize("w")
        assert torch.equal(dense, read_slowly(parts, scheme).to(dense.dtype))
        assert torch.equal(read.masked(torch.zeros_like(read.nonzero())).dequantize("w"), torch.zeros_like(dense))
    assert all(raw(part) == raw(before[name]) for name, part in parts.items())


def read_all(directory) -> None:
    found = stored_quantization(directory)
    if found is not None:
        with quantized_files(directory, found) as files:
            read_plain(files)
            for _, weight, mask in files:
                assert mask.shape == weight.codes.shape


@given(st.sampled_from(["int4 asymmetric groups", "fp8", "gptq", "int8 bitmask"]), damage(),
       st.sampled_from(["model.safetensors", "config.json", "lors_mask.safetensors"]))  # fmt: skip
def test_damaged_bytes_are_read_or_refused(tmp_path_factory, name, damaged, file):
    scheme, path = SCHEMES[name], tmp_path_factory.mktemp("damaged")
    torch.manual_seed(0)
    group = scheme.group or 32
    tensors = {f"a.{part}": tensor for part, tensor in parts_of(quantized(sparse24(8, group), scheme), scheme).items()}
    safetensors_torch.save_file({**tensors, "b.weight": torch.ones(2)}, path / "model.safetensors")
    safetensors_torch.save_file(
        {"a.weight": torch.full((8, group // 32), -1, dtype=torch.int32)}, path / "lors_mask.safetensors"
    )
    (path / "config.json").write_text(json.dumps({"quantization_config": config_of(scheme)}))
    read_all(path)
    (path / file).write_bytes(damaged((path / file).read_bytes()))
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore", UserWarning)
        read_all(path)
    shutil.rmtree(path)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["", "re:(", "group", "pack-quantized", "int", "dense"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["weights", "format", "targets"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(block, above=()):
    """The keys that lead to every value in it."""
    items = block.items() if isinstance(block, dict) else enumerate(block) if isinstance(block, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


@given(st.sampled_from(sorted(SCHEMES)), st.data())
def test_any_configuration_is_parsed_or_refused(tmp_path_factory, name, data):
    block = json.loads(json.dumps(config_of(SCHEMES[name])))
    *way, last = data.draw(st.sampled_from(sorted(places(block), key=str)))
    inner = block
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(ANYTHING)
    with contextlib.suppress(ValueError):
        found = parse_quantization(tmp_path_factory.getbasetemp(), block)
        if found is not None:
            found.scheme("model.layers.0.mlp.up_proj")
