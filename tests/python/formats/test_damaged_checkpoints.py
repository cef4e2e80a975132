# SPDX-License-Identifier: Apache-2.0
"""Damaged tensors, files and configurations of compressed-tensors' formats: read, or refused with a ValueError."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interchange_cases import DIRECTORIES, WRITTEN, damage, raw, sparse24
from lors_cuda.compressed_tensors.bitmask import FORMATS, decode_weight, encode_weight
from lors_cuda.compressed_tensors.files import INDEX_NAME, read_tensors, stored_format

safetensors_torch = pytest.importorskip("safetensors.torch")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def damaged_parts(draw):
    """The parts of a weight after bytes of one were changed, or it was cut, retyped, reshaped or taken from another."""
    format = draw(st.sampled_from(FORMATS))
    N, K = draw(st.integers(1, 5)), 4 * draw(st.integers(1, 10))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    parts = encode_weight(sparse24(N, K, draw(st.sampled_from(DTYPES))), format)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(parts)))
        part = parts[name].clone()
        kind = draw(st.sampled_from(["bytes", "cut", "dtype", "shape", "swap", "drop"]))
        if kind == "bytes" and part.numel():
            data = part.reshape(-1).view(torch.uint8)
            for _ in range(draw(st.integers(1, 4))):
                data[draw(st.integers(0, data.numel() - 1))] = draw(st.integers(0, 255))
        elif kind == "cut":
            part = part[: draw(st.integers(0, part.shape[0]))] if part.dim() else part
        elif kind == "dtype":
            part = part.to(draw(st.sampled_from([*DTYPES, torch.uint8, torch.int32, torch.int64])))
        elif kind == "shape":
            part = draw(st.sampled_from([part.reshape(-1), part.reshape(1, -1), part.reshape(-1, 1, 1), part[..., :0]]))
        elif kind == "swap":
            part = parts[draw(st.sampled_from(sorted(parts)))]
        parts[name] = part
        if kind == "drop":
            del parts[name]
        if not parts:
            break
    return format, parts


@given(damaged_parts())
def test_damaged_parts_decode_or_are_refused(case):
    format, parts = case
    before = {name: part.clone() for name, part in parts.items()}
    with contextlib.suppress(ValueError):
        dense = decode_weight(parts, format)
        # What is left cannot be told from a sound weight: it says its own shape, and holds its values in order.
        assert list(dense.shape) == parts["shape"].reshape(-1).tolist()
        values = parts["compressed"].reshape(-1)
        torch.testing.assert_close(dense[dense != 0], values[values != 0], rtol=0, atol=0, equal_nan=True)
    assert all(raw(part) == raw(before[name]) for name, part in parts.items())


@given(st.sampled_from(DIRECTORIES), damage(), st.sampled_from(["model.safetensors", "config.json", INDEX_NAME]))
def test_damaged_bytes_are_read_or_refused(tmp_path_factory, name, damaged, file):
    source, path = WRITTEN / name, tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(source, path)
    if file == INDEX_NAME:
        (path / "model.safetensors").rename(path / "model-1.safetensors")
        names = safetensors_torch.load_file(path / "model-1.safetensors")
        (path / file).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    (path / file).write_bytes(damaged((path / file).read_bytes()))
    with contextlib.suppress(ValueError):
        format = stored_format(path)
        if format is not None:
            read_tensors(path, format)
    shutil.rmtree(path.parent)
