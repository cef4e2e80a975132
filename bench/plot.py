#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Plots of the JSON that the benchmarks write: speed and memory against tokens, the merge alone, whole models.

python bench/plot.py linear.json [--output linear.png]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from report import case_label, describe

# name -> label, colour, line style; a method and its checkpointed form share a colour
STYLE: dict[str, tuple[str, str, str]] = {
    "lors_cuda": ("lors_cuda", "#0b5fa5", "-"),
    "lors_cuda_24": ("lors_cuda, 2:4 weight", "#0b5fa5", "--"),
    "lors_cuda_bitmap": ("lors_cuda, bitmap weight", "#0b5fa5", ":"),
    "lors_cuda_exact": ("lors_cuda, exact gradients", "#6baed6", "-"),
    "official": ("official LoRS, eager", "#333333", "-"),
    "official_upcast": ("official LoRS, matmuls in float32", "#333333", "--"),
    "compiled": ("torch.compile", "#e07b00", "-"),
    "compiled_max_autotune": ("torch.compile, max-autotune", "#e07b00", "--"),
    "sqft": ("SQFT", "#2e8b57", "-"),
    "sqft_checkpointed": ("SQFT, checkpointed", "#2e8b57", "--"),
    "spp": ("SPP", "#b5495b", "-"),
    "spp_checkpointed": ("SPP, checkpointed", "#b5495b", "--"),
    "peft_lora": ("plain LoRA (loses the zeros)", "#7b5ea7", ":"),
    "frozen_linear": ("no adapter", "#999999", ":"),
    "clone": ("copy of the weight", "#bbbbbb", "-"),
}
TEXT = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.dpi": 150,
}
Row = dict[str, Any]
_LEGEND_COLUMNS = 4


def _unique(values: list[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _plain_ticks(axes: Axes, tokens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def _plain_log_y(axes: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic y axis, its ticks (those within reach of the data) written as ordinary numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def _ratio_panel(axes: Axes, rows: list[Row], tokens: list[int]) -> None:
    """How many times faster than the baseline: medians of per-round ratios, a band from p20 to p80."""
    noise = sorted((row for row in rows if row["peer"] == "official_again"), key=lambda row: row["tokens"])
    if noise:
        low = [row["ratio"]["p20"] for row in noise]
        high = [row["ratio"]["p80"] for row in noise]
        axes.fill_between([row["tokens"] for row in noise], low, high, color="#333333", alpha=0.12, linewidth=0)
    axes.axhline(1.0, color="#333333", linewidth=1.2)
    for name in [name for name in STYLE if name != "official"]:
        label, colour, line = STYLE[name]
        own = sorted((row for row in rows if row["peer"] == name), key=lambda row: row["tokens"])
        if not own:
            continue
        x = [row["tokens"] for row in own]
        ours = name.startswith("lors_cuda")
        axes.plot(
            x,
            [row["ratio"]["median"] for row in own],
            line,
            color=colour,
            label=label,
            marker="o",
            markersize=5 if ours else 3.5,
            linewidth=2.4 if ours else 1.3,
            zorder=3 if ours else 2,
        )
        axes.fill_between(
            x,
            [row["ratio"]["p20"] for row in own],
            [row["ratio"]["p80"] for row in own],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
    _plain_ticks(axes, tokens)
    _plain_log_y(axes, [0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100])
    axes.set_ylabel("times faster than official LoRS")


def _memory_panel(axes: Axes, rows: list[Row], tokens: list[int]) -> None:
    """Peak bytes of tensors allocated during one forward + backward."""
    for name, (label, colour, line) in STYLE.items():
        own = sorted((row for row in rows if row["peer"] == name), key=lambda row: row["tokens"])
        if own:
            ours = name.startswith("lors_cuda")
            axes.plot(
                [row["tokens"] for row in own],
                [row["bytes"]["peak"] / 1e6 for row in own],
                line,
                color=colour,
                label=label,
                marker="o",
                markersize=5 if ours else 3.5,
                linewidth=2.4 if ours else 1.3,
                zorder=3 if ours else 2,
            )
    axes.set_ylim(bottom=0)
    _plain_ticks(axes, tokens)
    axes.set_ylabel("peak of one forward + backward, MB")


def plot_linear(rows: list[Row], where: dict[str, Any]) -> Figure:
    """One line of panels per dtype: speed on the left, memory on the right. All rows must be of one shape and rank."""
    first = rows[0]
    dtypes = _unique([row["dtype"] for row in rows])
    drawn = {row["peer"] for row in rows} & STYLE.keys()
    legend_lines = -(-len(drawn) // _LEGEND_COLUMNS)
    figure = plt.figure(figsize=(9.5, 3.4 * len(dtypes) + 0.7 + 0.25 * legend_lines), layout="constrained")
    # The last line of the grid holds the legend: beside a caption, a legend outside the axes would be drawn over it.
    panels = figure.subplots(
        len(dtypes) + 1, 2, squeeze=False, gridspec_kw={"height_ratios": [1.0] * len(dtypes) + [0.1 * legend_lines]}
    )
    figure.get_layout_engine().set(wspace=0.06)
    for axes in panels[-1]:
        axes.set_axis_off()
    labelled: dict[str, Any] = {}
    for dtype, (left, right) in zip(dtypes, panels[:-1], strict=True):
        own = [row for row in rows if row["dtype"] == dtype]
        tokens = sorted(_unique([row["tokens"] for row in own]))
        _ratio_panel(left, own, tokens)
        _memory_panel(right, own, tokens)
        left.set_title(f"{dtype}: speed")
        right.set_title(f"{dtype}: memory")
        for axes in (left, right):
            labelled.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [label for label, _, _ in STYLE.values() if label in labelled]
    panels[-1][0].legend(
        [labelled[label] for label in order],
        order,
        loc="upper left",
        ncols=_LEGEND_COLUMNS,
        fontsize=8,
        bbox_to_anchor=(0.0, 1.0),
    ).set_in_layout(False)
    figure.suptitle(
        f"Forward + backward of one linear, {first['out_features']} x {first['in_features']}, r = {first['rank']}, "
        f"{1 - first['density']:.0%} sparse",
        fontweight="bold",
    )
    _caption(figure, where)
    return figure


def plot_merge(rows: list[Row], where: dict[str, Any]) -> Figure:
    """The merge alone: how much of the speed of copying the weight each reaches, a group per dtype and rank."""
    groups = _unique([(row["dtype"], row["rank"]) for row in rows])
    names = ["lors_cuda", "official"]
    figure, axes = plt.subplots(figsize=(9.5, 0.75 * len(groups) + 1.6), layout="constrained")
    for index, (dtype, rank) in enumerate(groups):
        own = {row["peer"]: row for row in rows if (row["dtype"], row["rank"]) == (dtype, rank)}
        floor = own["clone"]["seconds"]["median"]
        for offset, name in enumerate(names):
            if name not in own:
                continue
            label, colour, _ = STYLE[name]
            share = floor / own[name]["seconds"]["median"]
            y = index + (offset - 0.5) * 0.36
            axes.barh(y, share, height=0.34, color=colour, label=label if index == 0 else None)
            text = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
            if name != "official":
                text += f"   {own[name]['ratio']['median']:.1f} x official"
            axes.text(share, y, f" {text}", va="center", fontsize=8, color=colour)
    axes.axvline(1.0, color="#999999", linewidth=1.2, linestyle="--")
    axes.set_yticks(range(len(groups)), [f"{dtype}, r = {rank}" for dtype, rank in groups])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, max(1.25, axes.get_xlim()[1] * 1.25))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("share of the speed of weight.clone(), which moves as many bytes as a merge must")
    axes.legend(loc="lower right")
    axes.set_title(f"The merge alone, {rows[0]['out_features']} x {rows[0]['in_features']}")
    _caption(figure, where)
    return figure


# What bars show: the label of the axis, and a row's value; None: it was not measured.
BARS: dict[str, list[tuple[str, Callable[[Row], float | None]]]] = {
    "model": [
        ("times faster than PEFT's LoRA", lambda row: row["ratio"]["median"]),
        ("model, optimizer and step, MB", lambda row: row["bytes"]["total"] / 1e6 if "bytes" in row else None),
    ],
    "generate": [("tokens per second", lambda row: row["tokens_per_second"])],
    "decode": [("times faster than torch's matmul with the dense weight", lambda row: row["ratio"]["median"])],
    "experts": [
        ("times faster than PEFT's LoRA", lambda row: row["ratio"]["median"]),
        ("peak of one step, MB", lambda row: row["bytes"]["peak"] / 1e6),
    ],
    "experts_forward": [("times faster than transformers' grouped_mm", lambda row: row["ratio"]["median"])],
    "memory": [("GB, counted from shapes", lambda row: row["bytes"]["total"] / 1e9)],
}


def plot_bars(rows: list[Row], where: dict[str, Any]) -> Figure:
    """A line of panels per case, a bar per method."""
    columns = BARS[rows[0]["benchmark"]]
    cases = _unique([case_label(row) for row in rows])
    by_case = [[row for row in rows if case_label(row) == case] for case in cases]
    heights = [len(own) for own in by_case]
    figure = plt.figure(figsize=(9.5, 0.24 * sum(heights) + 0.9 * len(cases) + 0.4), layout="constrained")
    panels = figure.subplots(
        len(cases), len(columns), squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights}
    )
    for line, case, own in zip(panels, cases, by_case, strict=True):
        for axes, (label, value) in zip(line, columns, strict=True):
            values = [value(row) for row in own]
            colours = ["#0b5fa5" if row["peer"].startswith("lors_cuda") else "#999999" for row in own]
            axes.barh(range(len(own)), [v or 0.0 for v in values], height=0.7, color=colours)
            for y, v in enumerate(values):
                axes.text(v or 0.0, y, "" if v is None else f" {v:.3g}", va="center", fontsize=7)
            axes.set_yticks(range(len(own)), [row["peer"] for row in own], fontsize=7)
            axes.margins(x=0.15)
            axes.grid(False, axis="y")
            axes.set_xlabel(label)
        line[0].invert_yaxis()
        line[0].set_title(case)
    _caption(figure, where)
    return figure


def _caption(figure: Figure, where: dict[str, Any]) -> None:
    figure.supxlabel(describe(where), fontsize=6, color="#666666")


DRAW: dict[str, Callable[[list[Row], dict[str, Any]], Figure]] = {
    "linear": plot_linear,
    "host": plot_linear,
    "merge": plot_merge,
    **dict.fromkeys(BARS, plot_bars),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/plot.py")
    parser.add_argument("input", type=Path, metavar="FILE.json")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: beside the input")
    arguments = parser.parse_args(argv)
    document = json.loads(arguments.input.read_text())
    rows = [row for row in document["rows"] if not row["failed"]]
    by_kind: dict[str, list[Row]] = {kind: [row for row in rows if row["benchmark"] == kind] for kind in DRAW}
    if not rows:
        print(f"{arguments.input} has no rows to plot", file=sys.stderr)
        return 1
    output = arguments.output or arguments.input.with_suffix(".png")
    with plt.rc_context(TEXT):
        drawn = {kind: own for kind, own in by_kind.items() if own}
        for kind, own in drawn.items():
            path = output if kind == next(iter(drawn)) else output.with_name(f"{output.stem}-{kind}{output.suffix}")
            figure = DRAW[kind](own, document["environment"])
            figure.savefig(path)
            plt.close(figure)
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
