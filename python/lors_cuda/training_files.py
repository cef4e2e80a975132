# SPDX-License-Identifier: Apache-2.0
# What a training run leaves behind: training.jsonl (one line per step), checkpoint.pt, loss.png.
# Called by training.py and the command line. The checkpoint is one file, replaced whole; the log is cut back to it.
"""Log, checkpoint and loss plot of a training run."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ._files import not_written, replace_file

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "training.jsonl"
PLOT_NAME = "loss.png"
_FORMAT_VERSION = 2


@dataclass
class Checkpoint:
    """Everything that training needs to go on after ``step`` as if it had never stopped.

    The random states have one row for each process.
    """

    step: int
    settings: dict[str, Any]
    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    cpu_rng: Tensor
    cuda_rng: Tensor | None


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Replace the directory's checkpoint.

    Raises:
        OSError: it could not be written; the one before is complete.
    """
    fields = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    # Through memory: torch reports a full disk as an unspecific RuntimeError of its zip writer.
    buffer = io.BytesIO()
    torch.save({"format_version": _FORMAT_VERSION, **fields}, buffer)
    replace_file(directory / CHECKPOINT_NAME, buffer.getvalue())


def load_checkpoint(
    directory: Path, settings: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> Checkpoint | None:
    """Read the directory's checkpoint and check that it belongs to this run; None if there is none yet.

    Raises:
        ValueError: it is corrupted, of another version, or of a run with other settings or other parameters.
    """
    path = directory / CHECKPOINT_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    advice = "Start anew in another output directory, or with overwriting."
    try:
        # weights_only: a checkpoint is data, and must not be able to run code.
        fields = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        version = fields.pop("format_version")
        checkpoint = Checkpoint(**fields) if version == _FORMAT_VERSION else None
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'{path}' is truncated or corrupted and cannot be resumed. {advice}") from error
    if checkpoint is None:
        raise ValueError(f"'{path}' has format version {version}, and this lors_cuda reads {_FORMAT_VERSION}. {advice}")
    names = sorted({*settings, *checkpoint.settings})
    different = [name for name in names if settings.get(name) != checkpoint.settings.get(name)]
    if different:
        listed = "; ".join(
            f"{name} was {checkpoint.settings.get(name)!r}, is {settings.get(name)!r}" for name in different
        )
        raise ValueError(f"'{path}' is of a run with other settings ({listed}). Resume with the same ones. {advice}")
    own = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if own != {name: tuple(tensor.shape) for name, tensor in checkpoint.parameters.items()}:
        raise ValueError(f"'{path}' is of another model: its trained parameters have other names or shapes. {advice}")
    return checkpoint


class StepLog:
    """The entries of a run's steps, in memory and, with a directory, in its ``training.jsonl``.

    Opened at step ``start``, it keeps the entries up to there and drops what a killed run wrote after its checkpoint,
    an unfinished line included. Every entry reaches the operating system at once, so a kill loses none.
    """

    def __init__(self, directory: Path | None, start: int) -> None:
        self.entries: list[dict[str, Any]] = []
        self._path = None if directory is None else directory / LOG_NAME
        self._file: TextIO | None = None
        if self._path is not None:
            self.entries = [entry for entry in read_log(self._path) if entry["step"] <= start] if start else []
            replace_file(self._path, "".join(_line(entry) for entry in self.entries).encode())

    def __enter__(self) -> StepLog:
        if self._path is not None:
            self._file = open(self._path, "a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if self._file is not None and self._path is not None:
            try:
                self._file.write(_line(entry))
                self._file.flush()
            except OSError as error:
                raise not_written(self._path, error, error.errno) from error

    def flush(self) -> None:
        """Bring the log to the disk, before a checkpoint that counts on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, up to the first line that is not whole; [] if there is no file."""
    entries = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if not line.endswith("\n") or not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            break
        entries.append(entry)
    return entries


def plot_loss(entries: list[dict[str, Any]], path: Path, *, title: str = "LoRS fine-tuning") -> None:
    """Draw the loss of every step and its running mean into a PNG file; needs matplotlib.

    Raises:
        OSError: the file could not be written.
    """
    # Without pyplot: no display is asked for and no figure stays alive.
    from matplotlib.figure import Figure

    steps, losses = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    window = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    axes.plot(steps, means, color="tab:blue", linewidth=2, label=f"mean of the last {window}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    replace_file(path, buffer.getvalue())


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
