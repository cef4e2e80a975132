# SPDX-License-Identifier: Apache-2.0
"""The benchmark of rounding: a small model through all of its ways, and its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from byte_model import byte_llama, byte_tokenizer

BENCH = Path(__file__).resolve().parents[3] / "bench"


def test_every_way_to_merge_is_recorded(tmp_path: Path) -> None:
    model, output = tmp_path / "tiny", tmp_path / "rounding.json"
    byte_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    options = ("--steps", 2, "--tokens", 16, "--held-out", 2, "--rank", 4, "--rates", 0.01, "--seeds", 2)
    done = subprocess.run(
        [sys.executable, "rounding.py", "--model", model, "--output", output, *map(str, options)],
        capture_output=True, text=True, timeout=280, cwd=BENCH, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in output.read_text()
    rows = json.loads(output.read_text())["rows"]
    assert [row["trained"] for row in rows] == ["nearest", "stochastic", "fixed"]
    for row in rows:
        assert row["model"] == "tiny"
        assert list(row["perplexity"]) == ["nearest", "seed 0", "seed 1", "not rounded"]
        assert len(set(row["perplexity"].values())) == 4  # none merges as another does
        assert 0 < row["changed"]["nearest"] <= 1
        assert row["perplexity"]["nearest"] != row["sparse_perplexity"]
