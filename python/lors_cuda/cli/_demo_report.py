# SPDX-License-Identifier: Apache-2.0
# What the demo shows at its end: one table, one picture, and what to do next. Measures nothing.
"""Table, plot and last words of the demo."""

from __future__ import annotations

import argparse
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .._files import replace_file
from ..sparsity import ModelSparsity

_HEADINGS = ("", "held-out perplexity", "sparsity after merge", "ms/step", "peak memory")


@dataclass
class Row:
    """One line of the table: a model, and for a method how it got there.

    Attributes:
        curve: (step, held-out perplexity) during fine-tuning; empty for a model that was not fine-tuned.
        sparsity: of the plain model, that is after merging: in its linears, and in all its weights.
        color, dashed: of its curve.
    """

    name: str
    label: str
    perplexity: float
    sparsity: float
    model_sparsity: float
    ms_per_step: float | None = None
    peak_bytes: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    color: str = "gray"
    dashed: bool = False

    def set_sparsity(self, measured: ModelSparsity) -> None:
        """After merging, what was measured."""
        self.sparsity, self.model_sparsity = measured.sparsity, measured.model_sparsity


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; "-" where there is nothing to measure."""
    cells = [list(_HEADINGS)]
    for row in rows:
        cells.append(
            [
                row.label,
                f"{row.perplexity:.3f}",
                f"{row.sparsity:.2%} ({row.model_sparsity:.2%})",
                "-" if row.ms_per_step is None else f"{row.ms_per_step:.1f}",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = []
    for first, *others in cells:
        aligned = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def notes(args: argparse.Namespace, held_out_bytes: int, rounds: int) -> str:
    """What the table's columns count."""
    lines = (
        f"perplexity: per byte, on {held_out_bytes:,} held-out bytes. Fine-tuning is also further training, alike for",
        "  all methods: compare with the pruned model and between methods; the dense model had no such steps.",
        f"sparsity after merge: zeros in the linears{' and experts' if args.moe else ''} of the plain model that comes "
        "out; in brackets in all its weights,",
        "  embeddings and output head included.",
        f"ms/step: forward and backward of {args.batch_size} x {args.sequence_length} bytes; the median of {rounds} "
        "rounds that go through all methods.",
        "peak memory: the most bytes such a step holds at once beside model, adapters and batch: activations,",
        "  temporaries and gradients, counted by torch's profiler.",
        "Layers as narrow as these cost about the same with every method; bench/linear.py measures real sizes.",
    )
    return "\n".join(lines)


def whats_next(args: argparse.Namespace) -> str:
    """What was written where, and commands that work on it."""

    def path(*parts: str) -> str:
        return shlex.quote(str(args.output.joinpath(*parts)))

    def beside(ending: str) -> str:
        return shlex.quote(f"{args.output}-{ending}")

    model = f"--model {path('sparse')}"
    models = "dense/  sparse/                   the model before and after pruning"
    if not args.moe:
        models = "dense/  sparse/  sparse-int4/     the model before and after pruning, and that as int4 codes"
    adapter = f"--adapter {path('lors', 'adapter')}"
    return f"""Written to {path()}:
  table.txt  demo.png  demo.json    the table, the plot, all numbers
  train.txt  heldout.txt            the text
  {models}
  lors*/adapter  lors*/merged       the adapters, and the sparse models with them merged in

Try next:
  lors-cuda eval {model} {adapter} --data {path("heldout.txt")}
  lors-cuda merge {model} {adapter} --output {beside("merged")}
  lors-cuda finetune {model} --data {path("train.txt")} --output {beside("run")} --lr {args.lr:g}"""


def plot(rows: Sequence[Row], masked_again: Sequence[Row], path: Path, layers: str) -> None:
    """Draw held-out perplexity against fine-tuning steps, and the sparsity that is left after merging.

    Args:
        rows: the dense model, the pruned one, and the methods.
        masked_again: plain LoRA with the mask put back after merging, if it is one of them.
        path: of the PNG file.
        layers: what the sparsity is of.

    Raises:
        OSError: the file could not be written.
    """
    # Without pyplot: no display is asked for and no figure stays alive.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    dense, pruned, *methods = rows
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[1.7, 1])
    last = max(step for row in methods for step, _ in row.curve)
    for row, place in ((pruned, "bottom"), (dense, "top")):
        curves.axhline(row.perplexity, color="black", linewidth=1.2, linestyle=":")
        curves.annotate(
            f"{row.label}: {row.perplexity:.2f}",
            (last, row.perplexity),
            xytext=(0, 3 if place == "bottom" else -3),
            textcoords="offset points",
            ha="right",
            va=place,
            fontsize=9,
        )
    for row in methods:
        steps, values = [step for step, _ in row.curve], [value for _, value in row.curve]
        style = (0, (4, 3)) if row.dashed else "solid"
        label = f"{row.label}: {row.perplexity:.2f}"
        curves.plot(steps, values, color=row.color, linestyle=style, linewidth=2, marker="o", markersize=4, label=label)
    for row in masked_again:
        label, color = f"{row.label}: {row.perplexity:.2f}", methods[-1].color
        curves.plot([last], [row.perplexity], color=color, linestyle="none", marker="X", markersize=8, label=label)
    curves.set(xlabel="fine-tuning step", ylabel="held-out perplexity per byte", xlim=(0, last * 1.03))
    curves.set_title("Fine-tuning the pruned model", fontsize=11)
    curves.grid(alpha=0.3)
    # Under the pruned model's line: the curves have come down from there by then.
    curves.legend(title="at the last step", loc="upper right", bbox_to_anchor=(1, 0.93), fontsize=9, title_fontsize=9)

    shown = [*reversed(methods), pruned]
    positions = range(len(shown))
    bars.barh(positions, [row.sparsity for row in shown], color=[row.color for row in shown], height=0.65)
    bars.set_yticks(positions, [row.label for row in shown], fontsize=9)
    for position, row in zip(positions, shown, strict=True):
        bars.annotate(
            f"{row.sparsity:.1%}",
            (row.sparsity, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    bars.set(xlim=(0, max(row.sparsity for row in shown) * 1.25), xlabel=f"zeros in the {layers}")
    bars.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bars.set_title("Sparsity after merging", fontsize=11)
    bars.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    replace_file(path, buffer.getvalue())
