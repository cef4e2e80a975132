# SPDX-License-Identifier: Apache-2.0
"""The code of docs/interchange.md, run as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from interchange_cases import WRITTEN

pytest.importorskip("transformers")
PAGE = Path(__file__).parents[2] / "docs" / "interchange.md"


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
def test_the_pages_code_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    shutil.copytree(WRITTEN / "sparse-24-bitmask-0.12.2", tmp_path / "sparse-model")
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), {})
    assert (tmp_path / "dense-model" / "model.safetensors").is_file()
    assert (tmp_path / "compressed-model" / "model.safetensors").is_file()
