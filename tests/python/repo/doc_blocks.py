# SPDX-License-Identifier: Apache-2.0
# The code blocks of a page in Markdown, and running them as a reader would: Python and commands of a page in one
# directory, a failure where nobody said that a block cannot run. Used by test_docs.py. The same on top of sybil would
# need a parser for the marks, evaluators for commands and a fixture: as much as this.
"""Code blocks of the documentation."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RUN = ("python", "bash", "console")
# Shown, and nothing that could run. C++ stands in tests/cpp and is included from there.
SHOWN = ("text", "json", "yaml", "toml", "ini", "cmake", "diff", "cpp")
# What a page may tell a reader to do and this suite does not: run by CI itself (.ci/run), or changing the machine.
ELSEWHERE = {"make": "CI calls the targets of the Makefile", "pip": "installs packages", "apt-get": "installs packages"}
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

_FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[\w+-]*)")
_MARK = re.compile(r"\s*<!-- not run: *(?P<reason>.*?) *-->\s*$")


class BadPage(Exception):
    """A page that breaks the rules for code blocks; the sentence says which."""


@dataclass(frozen=True)
class Block:
    """A code block: the page's name, the line its code begins on, and why it is not run here (None: it is)."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def code_blocks(page: Path, name: str, *, indented_is_bash: bool = False) -> list[Block]:
    """The blocks of a page in order.

    Args:
        page: a file in Markdown; fences may be indented (in lists).
        name: what messages call it.
        indented_is_bash: whether paragraphs indented by four spaces are commands too (the README's style).

    Raises:
        BadPage: a fence without end or of an unknown language, or a mark without a reason or a block.
    """
    lines = page.read_text().splitlines()
    blocks: list[Block] = []
    reason: str | None = None
    marked_at = number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if mark := _MARK.match(line):
            reason, marked_at = mark["reason"], number
            if not reason:
                raise BadPage(f"{name}:{number}: the mark gives no reason; write <!-- not run: why -->.")
            continue
        if fence := _FENCE.match(line):
            language, indent, start = fence["language"], len(fence["indent"]), number
            while number < len(lines) and lines[number].strip() != fence["ticks"]:
                number += 1
            if number == len(lines):
                raise BadPage(f"{name}:{start}: this block has no end.")
            text = "\n".join(code[indent:] for code in lines[start:number])
            number += 1
            blocks.append(_checked(Block(name, start + 1, language, text, reason)))
            reason = None
        elif indented_is_bash and line.startswith("    ") and (number == 1 or not lines[number - 2].strip()):
            start = number
            while number < len(lines) and lines[number].startswith("    "):
                number += 1
            text = "\n".join(code[4:] for code in lines[start - 1 : number])
            blocks.append(_checked(Block(name, start, "bash", text, reason)))
            reason = None
        elif line.strip() and reason is not None:
            raise BadPage(f"{name}:{marked_at}: the mark must stand directly before a code block.")
    if reason is not None:
        raise BadPage(f"{name}:{marked_at}: no code block follows the mark.")
    return blocks


def _checked(block: Block) -> Block:
    if block.language not in RUN + SHOWN:
        raise BadPage(
            f"{block}: the language is {block.language!r}; write one that is run ({', '.join(RUN)}) or shown "
            f"({', '.join(SHOWN)})."
        )
    if block.language == "cpp" and not re.fullmatch(r'--8<-- "tests/cpp/[\w.:]+"', block.text):
        raise BadPage(f'{block}: include C++ from a test, as in --8<-- "tests/cpp/test_example.cpp:merge".')
    if block.language == "bash" and block.reason is None:
        first_words = {line.split()[0] for line in _commands(block.text)}
        if first_words and first_words <= ELSEWHERE.keys():
            reason = ELSEWHERE[min(first_words)]
            return Block(block.page, block.line, block.language, block.text, reason)
    return block


def _commands(text: str) -> list[str]:
    """The lines that begin a command."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def run_blocks(blocks: list[Block], directory: Path) -> None:
    """Run a page's blocks in order: Python in one namespace in this process, commands in `directory`.

    The caller's working directory must be `directory`.

    Raises:
        AssertionError: a command failed or printed something else. Whatever a Python block raises.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if block.reason is not None:
            continue
        if block.language == "python":
            # Empty lines before it, so that a traceback shows the page's line.
            code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
            exec(code, namespace)
        elif block.language == "bash":
            _bash(block.text, block, directory)
        elif block.language == "console":
            for command, shown in _session(block):
                _compare(shown, _bash(command, block, directory), command, block)


def _bash(command: str, block: Block, directory: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}: exit code {done.returncode}\n{command}\n{done.stderr}"
    return done.stdout


def _session(block: Block) -> list[tuple[str, str]]:
    """(command, output shown) pairs of a block whose commands begin with "$ "."""
    pairs: list[tuple[str, list[str]]] = []
    continued = False
    for line in block.text.splitlines():
        if line.startswith("$ "):
            pairs.append((line[2:], []))
        elif not pairs:
            raise BadPage(f"{block}: a console block begins with a command, '$ ...'.")
        elif continued:
            pairs[-1] = (f"{pairs[-1][0]}\n{line}", [])
        else:
            pairs[-1][1].append(line)
        continued = line.endswith("\\") and not pairs[-1][1]
    return [(command, "\n".join(output)) for command, output in pairs]


def _compare(shown: str, printed: str, command: str, block: Block) -> None:
    """Output that is shown must be what is printed; "..." stands for anything. Nothing shown: nothing compared."""
    if not shown.strip():
        return
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(f"{shown}\n", printed, options)
    assert same, f"{block}: {command}\nshown:\n{shown}\nprinted:\n{printed}"
