#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The end of bench/gpu/run.sh: our rows in short, why parts failed, and what became of each part.

python bench/gpu/summary.py OUTDIR name,status,seconds …           exit code 1 if a part failed or ran out of time
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHOWN_LINES = 12  # of the log of a part that failed


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a benchmark's file; none where it is missing or was cut off."""
    try:
        return list(json.loads(path.read_text())["rows"])
    except (OSError, ValueError, KeyError):
        return []


def kernel_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row["peer"] != "lors_cuda":
            continue
        name = (
            f"{row['kernel']:<15}{row['layout']:<7}{row['out_features']:>6}x{row['in_features']:<6}T={row['tokens']:<5}"
        )
        name += f"r={row['rank']:<4}{row['cuda_fused'] or '':<7}{'' if row.get('graph', True) else 'eager ':<6}"
        if row["failed"]:
            lines.append(f"{name} failed: {row['failed'][:60]}")
        else:
            median, floor = row["seconds"]["median"] * 1e6, row["floor_seconds"] * 1e6
            lines.append(
                f"{name}{median:>9.1f} us  floor {floor:>7.1f}  of floor {row['fraction_of_floor']:.2f}  "
                f"x torch {row['ratio']['median']:.2f}  error {row['error']:.0e}"
            )
    return lines


def layer_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        cell = "failed" if row["failed"] else f"{row['seconds']['median'] * 1e3:.3f} ({row['ratio']['median']:.2f})"
        if row["peer"] == row["baseline"]:  # the first of its case
            lines.append(f"{row['out_features']}x{row['in_features']} T={row['tokens']}: ms")
        lines[-1] += f" {row['peer']} {cell}"
    return lines


def words_of(log: str, name: str) -> list[str]:
    """The last lines a part wrote."""
    begin, end = log.find(f"\n==== {name}: "), log.rfind(f"\n==== {name}: ")
    if begin < 0:
        return []
    return [line[:200] for line in log[begin:end].strip().splitlines()[1:][-SHOWN_LINES:]]


def main() -> int:
    directory = Path(sys.argv[1])
    parts = [dict(zip(("part", "status", "seconds"), text.split(","), strict=True)) for text in sys.argv[2:]]
    log = (directory / "log.txt").read_text(errors="replace")
    if kernels := kernel_lines(rows_of(directory / "kernels.json")):
        print("Operators, device time", *kernels, sep="\n")
    if layers := layer_lines(rows_of(directory / "linear.json")):
        print("\nForward + backward (x official)", *layers, sep="\n")
    bad = [part for part in parts if part["status"] not in ("ok", "skipped")]
    for part in parts:
        if part["status"] != "ok" and (words := words_of(log, part["part"])):
            print(f"\n{part['part']}, {part['status']}:", *words, sep="\n  ")
    print("\npart        status        seconds")
    for part in parts:
        print(f"{part['part']:<12}{part['status']:<14}{part['seconds']:>7}")
    (directory / "summary.json").write_text(json.dumps(parts, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
