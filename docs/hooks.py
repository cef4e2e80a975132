# SPDX-License-Identifier: Apache-2.0
# What mkdocs does besides rendering: the command line's page from argparse, the benchmark page's plots and tables from
# bench/results/*.json, and formulas as MathML, so that the site needs no script and no font from elsewhere.
# A warning logged here fails `make docs`.
"""Generated parts of the documentation site."""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks.lors_cuda")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PLOTS = ROOT / "build" / "docs" / "plots"
MARKER = "<!-- generated: bench/results -->"
METHODS_MARKER = "<!-- generated: bench/results, methods -->"

_LOADED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^>]*>')
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?P<text>.*?)</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/cli.md", content=command_line_page()))
    for result in sorted(result for result, document in _documents().items() if _kind(document) in KINDS):
        files.append(File.generated(config, f"plots/{result.stem}.svg", abs_src_path=str(plot(result))))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    if METHODS_MARKER in markdown:
        return markdown.replace(METHODS_MARKER, methods_sections())
    return markdown.replace(MARKER, benchmark_sections()) if MARKER in markdown else markdown


def on_page_content(content: str, page: Page, **kwargs: Any) -> str:
    return _FORMULA.sub(lambda formula: _mathml(formula["text"], page), content)


def on_post_page(output: str, page: Page, **kwargs: Any) -> str:
    for tag in _LOADED.findall(output):
        if 'rel="canonical"' not in tag:
            LOG.warning("%s would load something from elsewhere when it is read: %s", page.file.src_uri, tag)
    return output


def on_serve(server: Any, config: MkDocsConfig, builder: Any) -> Any:
    server.watch(str(ROOT / "python" / "lors_cuda"))
    server.watch(str(RESULTS))
    return server


# ---- formulas ----


def _mathml(delimited: str, page: Page) -> str:
    r"""\(inline\) or \[display\] TeX, as pymdownx.arithmatex leaves it, as MathML."""
    text = html.unescape(delimited).strip()
    display = "block" if text.startswith(r"\[") else "inline"
    tex = text[2:-2].strip()
    try:
        mathml = convert(tex, display=display)
    except Exception as error:  # the converter raises its own types
        LOG.warning("%s: the formula %r could not be converted: %r", page.file.src_uri, tex, error)
        return html.escape(tex)
    # What it does not know it passes on as text.
    if "\\" in mathml or "<mi>&</mi>" in mathml:
        LOG.warning("%s: the formula %r has something latex2mathml does not know", page.file.src_uri, tex)
    return mathml


# ---- the command line ----


def command_line_page() -> str:
    """Every command's --help."""
    commands = importlib.import_module("lors_cuda.cli").COMMANDS
    lines = [
        "# Command line",
        "",
        "`lors-cuda`, also `python -m lors_cuda`. This page is what `--help` prints. Exit codes: 0 done, 1 failed,",
        "2 wrong usage. With `--json` a command prints its result as JSON, and nothing else.",
    ]
    for arguments in ([], *([name] for name in commands)):
        title = " ".join(["lors-cuda", *arguments])
        lines += ["", f"## {title}", "", "```text", _help(arguments), "```"]
    return "\n".join(lines) + "\n"


def _help(arguments: list[str]) -> str:
    """What `lors-cuda ... --help` prints on a terminal of 100 columns without colours."""
    main = importlib.import_module("lors_cuda.cli").main
    shown = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"), contextlib.redirect_stdout(shown):
        code = main([*arguments, "--help"])
    if code != 0:
        LOG.warning("lors-cuda %s --help ended with code %d", " ".join(arguments), code)
    return shown.getvalue().strip()


# ---- benchmarks ----


def _bench(module: str) -> Any:
    """A module of bench/, whose files import each other by their bare names."""
    if str(ROOT / "bench") not in sys.path:
        sys.path.insert(0, str(ROOT / "bench"))
    return importlib.import_module(module)


def plot(result: Path) -> Path:
    """The plot of one result by bench/plot.py; made again only where the result or the script is newer."""
    output = PLOTS / f"{result.stem}.svg"
    sources = (result, ROOT / "bench" / "plot.py", ROOT / "bench" / "report.py")
    if not output.exists() or output.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        output.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            code = _bench("plot").main([str(result), "--output", str(output)])
        if code != 0:
            LOG.warning("bench/plot.py could not plot %s", result)
    return output


# In the page's order: first what a user meets, generation and training, then the parts.
KINDS = {
    "generate": "Generation, tokens per second",
    "decode": "Few tokens through one linear, forward",
    "model": "A training step of a whole model",
    "memory": "Memory of large models, counted from shapes, not measured",
    "linear": "One linear, forward + backward",
    "experts": "The experts of one mixture-of-experts layer, forward + backward, and the forward of one token",
    "host": "One linear of 64 x 64: the host's time",
    "merge": "The merge alone",
}


def _documents() -> dict[Path, dict[str, Any]]:
    return {result: json.loads(result.read_text()) for result in RESULTS.glob("*.json")}


def _kind(document: dict[str, Any]) -> str:
    kind: str = document["rows"][0]["benchmark"]
    return kind


def methods_sections() -> str:
    """One table per run of bench/methods.py, the newest first."""
    documents = {result: document for result, document in _documents().items() if _kind(document) == "methods"}
    if not documents:
        return "No run is recorded yet."
    sections = []
    for result, document in sorted(documents.items(), key=lambda item: item[0].name, reverse=True):
        sections += [
            f"## {result.name[:10]}: bench/results/{result.name}",
            "",
            *_bench("methods").markdown(document),
            "",
        ]
    return "\n".join(sections)


def benchmark_sections() -> str:
    """One section per file of bench/results, by kind, then the newest first: machine, plot, every row's numbers."""
    sections = []
    documents = {result: document for result, document in _documents().items() if _kind(document) in KINDS}
    for result, document in sorted(documents.items(), key=lambda item: _order(*item)):
        where, rows = document["environment"], document["rows"]
        dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
        on = "" if rows[0]["benchmark"] == "memory" else f", {_processor(where)}"
        sections += [
            f"## {where['date'][:10]}: {KINDS[rows[0]['benchmark']]}, {dtypes}{on}",
            "",
            f"![{result.stem}](plots/{result.stem}.svg){{.plot}}",
            "",
            f'??? note "The numbers: bench/results/{result.name}"',
            "",
            *(f"    {line}" for line in _table(rows)),
            "",
            f"    {_bench('report').describe(where)}.",
            "",
        ]
    return "\n".join(sections)


def _order(result: Path, document: dict[str, Any]) -> tuple[int, int, str]:
    """Kind, newest day, name."""
    return list(KINDS).index(document["rows"][0]["benchmark"]), -int(result.name[:10].replace("-", "")), result.name


def _processor(where: dict[str, Any]) -> str:
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    maker = where["cpu_model"].replace("(R)", "").replace(" Processor", "").replace("Intel ", "")
    best = next((text for name, text in names.items() if name in where["cpu_features"]), "baseline")
    return f"{maker} with {best}"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A line per peer, a column per case."""
    label = _bench("report").case_label
    cases = list(dict.fromkeys(label(row) for row in rows))
    cells = {(row["peer"], label(row)): _cell(row) for row in rows}
    lines = [["", *cases], ["---"] + ["---:"] * len(cases)]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        name = f"`{peer}`"
        lines.append([f"**{name}**" if peer == "lors_cuda" else name, *(cells.get((peer, case), "") for case in cases)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(row: dict[str, Any]) -> str:
    """Times as fast as the baseline, median [p20, p80]; tokens per second; peak memory; page faults."""
    if row["failed"]:
        return "failed"
    lines, sizes = [], row.get("bytes", {})
    if "tokens_per_second" in row:
        lines.append(f"{row['tokens_per_second']:.1f} tokens/s")
    if "ratio" in row:
        ratio = row["ratio"]
        lines.append(f"{ratio['median']:.2f} [{ratio['p20']:.2f}, {ratio['p80']:.2f}]")
    if row["benchmark"] == "memory":
        lines.append(f"{sizes['total'] / 1e9:.1f} GB")
    elif sizes:
        lines.append(f"{sizes.get('total', sizes['peak']) / 1e6:.1f} MB")
    if "page_faults" in row:
        lines.append(f"{row['page_faults']} page faults")
    return "<br>".join(lines)
