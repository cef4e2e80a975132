# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the adapter methods: every row trains, keeps its zeros, and fills the documentation's table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
BENCH = Path(__file__).resolve().parents[3] / "bench"

MARKDOWN = "import json, sys, methods; print('\\n'.join(methods.markdown(json.load(open(sys.argv[1])))))"


def run(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=280, cwd=BENCH,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_method_has_a_row(tmp_path: Path) -> None:
    output = tmp_path / "methods.json"
    run("methods.py", "--quick", "--steps", 2, "--output", output)
    document = json.loads(output.read_text())
    rows = {row["peer"]: row for row in document["rows"]}
    from lors_cuda.methods import METHODS

    missing = set(METHODS) - {row["method"]["name"] for row in rows.values()}
    assert missing <= {"lora-rite"}  # whose package may be missing
    for name, row in rows.items():
        assert row["failed"] is None
        assert row["benchmark"] == "methods"
        assert sum(row["zeros_lost"]) == 0, name
        assert 1 <= row["effective_rank"][0] <= row["rank"][0] + 1e-6
        assert row["perplexity"][0] != row["sparse_perplexity"]
        assert min(row["raw_seconds"]) > 0
        assert row["peak"][0] > 0
    lors, sherl = rows["LoRS, r = 16"], rows["SHERL, one late block"]
    assert rows["LoRS, r = 1"]["trained"] * 16 == lors["trained"]
    assert sherl["peak"][0] < lors["peak"][0]
    assert rows["LoRA-Mini, a = b = 32"]["claim"].startswith("share of LoRS's repair")
    again = tmp_path / "again.json"  # in other processes the same numbers
    run("methods.py", "--quick", "--steps", 2, "--methods", "sora", "--no-times", "--workers", 2, "--output", again)
    (row,) = json.loads(again.read_text())["rows"]
    assert row["perplexity"] == rows[row["peer"]]["perplexity"]
    table = run("-c", MARKDOWN, output)
    assert all(f"| {name} |" in table for name in rows)


def test_rates_are_searched() -> None:
    lines = run("methods.py", "--quick", "--steps", 2, "--methods", "sora", "--search").splitlines()
    half, once, twice = (float(line.split("lr ")[1].split()[0]) for line in lines if "lr " in line)
    assert once == 2 * half
    assert twice == 2 * once
