# SPDX-License-Identifier: Apache-2.0
# A pytest plugin of test_cli*.py, so that they share one pruned model and one run; none of them may change these.
"""What the command line's tests start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byte_model import TEXT, byte_llama, byte_tokenizer
from cli_calls import call, finetune


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A dense model with a tokenizer, a text, and what `prune` makes of them."""
    home = tmp_path_factory.mktemp("cli")
    byte_llama().save_pretrained(home / "dense")
    byte_tokenizer().save_pretrained(home / "dense")
    (home / "text.txt").write_text(TEXT)
    (home / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(40))
    )
    assert call("prune", "--model", home / "dense", "--output", home / "sparse", "--data", home / "text.txt") == 0
    return home


@pytest.fixture(scope="session")
def adapter(home) -> Path:
    """A short finished run; tests must not change it."""
    output = home / "adapter"
    assert call(*finetune(home, output, "--json")) == 0
    return output
