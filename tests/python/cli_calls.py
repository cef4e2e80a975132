# SPDX-License-Identifier: Apache-2.0
"""Ways to call `lors-cuda` and to look at what it wrote, for test_cli*.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lors_cuda.cli import main

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
safetensors_torch = pytest.importorskip("safetensors.torch")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHORT = ["--sequence-length", "48", "--batch-size", "4"]


def lors_cuda(*arguments, **options) -> subprocess.CompletedProcess[str]:
    """Run `python -m lors_cuda` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "lors_cuda", *map(str, arguments)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False, **options,
    )  # fmt: skip


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def call(*arguments) -> int:
    """The same in this process, on one thread as there: sums depend on the number of threads in their last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def linear_zeros(directory: Path) -> dict[str, torch.Tensor]:
    tensors = safetensors_torch.load_file(directory / "model.safetensors")
    return {name: tensor == 0 for name, tensor in tensors.items() if name.endswith("proj.weight")}


def curve(run: Path) -> list[dict]:
    """The steps of a run's log, evaluations left out."""
    entries = [json.loads(line) for line in (run / "training.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def finetune(home: Path, output: Path, *more) -> list:
    return [
        "finetune", "--model", home / "sparse", "--data", home / "text.txt", "--output", output, "--rank", "4",
        "--lr", "3e-3", "--steps", "6", *SHORT, *more,
    ]  # fmt: skip


def failed(capsys, *arguments) -> str:
    capsys.readouterr()
    assert call(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("lors-cuda: error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err
