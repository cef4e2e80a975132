# SPDX-License-Identifier: Apache-2.0
"""What the tests of adapter directories share (the fixture `saved` is in conftest.py)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

Q_PROJ = "model.layers.0.self_attn.q_proj"
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def edit_config(directory: Path, **changes: object) -> None:
    """Change fields of adapter_config.json; ``...`` removes one."""
    path = directory / FILES[0]
    fields = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del fields[key]
        else:
            fields[key] = value
    path.write_text(json.dumps(fields))


def assert_same_files(one: Path, other: Path) -> None:
    """Equal configurations, and equal tensors bit for bit."""
    assert json.loads((one / FILES[0]).read_text()) == json.loads((other / FILES[0]).read_text())
    tensors, expected = load_file(one / FILES[1]), load_file(other / FILES[1])
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
