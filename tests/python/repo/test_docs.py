# SPDX-License-Identifier: Apache-2.0
"""Every code block of the README and of docs/ that can run is run, and what the reference must name is there.

A block that cannot run here is marked in the page, `<!-- not run: why -->`, and listed here as skipped. A page finds
these files: `path/to/dense-model` (also `DENSE`) and `path/to/pruned-model`, small and with a tokenizer; `text.txt`,
`held_out.txt` and `pairs.jsonl`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from doc_blocks import BadPage, Block, code_blocks, run_blocks

import lors_cuda
from byte_model import TEXT, byte_llama, byte_tokenizer
from models import prune_two_of_four

ROOT = Path(__file__).resolve().parents[3]
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCKS = {name: code_blocks(page, name, indented_is_bash=name == "README.md") for name, page in PAGES.items()}
SOURCES = {".cpp", ".cu", ".cuh", ".h", ".py"}
NOT_RUN = [block for blocks in BLOCKS.values() for block in blocks if block.reason is not None]


def _run_here(name: str) -> bool:
    return any(block.reason is None and block.language in ("python", "bash", "console") for block in BLOCKS[name])


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """What a page may take for granted."""
    files = tmp_path_factory.mktemp("docs")
    for name, model in (("dense", byte_llama()), ("pruned", prune_two_of_four(byte_llama()))):
        model.save_pretrained(files / "path/to" / f"{name}-model")
        byte_tokenizer().save_pretrained(files / "path/to" / f"{name}-model")
    shutil.copytree(files / "path/to/dense-model", files / "DENSE")
    (files / "text.txt").write_text(TEXT)
    (files / "held_out.txt").write_text(TEXT[-800:])
    pairs = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(40)]
    (files / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return files


@pytest.mark.parametrize("name", [name for name in PAGES if _run_here(name)])
def test_the_page_runs_from_top_to_bottom(name, files, tmp_path, monkeypatch):
    directory = tmp_path / "reader"
    shutil.copytree(files, directory)
    monkeypatch.chdir(directory)
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            run_blocks(BLOCKS[name], directory)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_marked_blocks_are_listed(block):
    pytest.skip(f"{block} is not run: {block.reason}")


# ---- what the reference must name ----


def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    documented = set(re.findall(r"^::: lors_cuda\.(\w+)$", text, re.MULTILINE))
    assert set(lors_cuda.__all__) - documented == set(), "add '::: lors_cuda.NAME' to a page of docs/reference"


def test_every_environment_variable_is_documented():
    """Read: a string that is nothing but the name."""
    sources = [path for where in ("csrc", "python") for path in (ROOT / where).rglob("*") if path.suffix in SOURCES]
    read = {name for path in sources for name in re.findall(r'"(LORS_[A-Z0-9_]+)"', path.read_text())}
    assert "LORS_CPU_FUSED" in read
    table = (ROOT / "docs/reference/environment.md").read_text()
    assert read == set(re.findall(r"^\| `(LORS_\w+)`", table, re.MULTILINE))


def test_every_header_is_named():
    page = (ROOT / "docs/reference/cpp.md").read_text()
    headers = {path.name for path in (ROOT / "csrc/core/include/lors").glob("*.h")}
    assert headers == set(re.findall(r"^\| `(\w+\.h)`", page, re.MULTILINE))


# ---- the runner itself can fail ----


def _blocks(tmp_path: Path, text: str) -> list[Block]:
    (tmp_path / "page.md").write_text(text)
    return code_blocks(tmp_path / "page.md", "page.md")


def test_python_shares_a_namespace_and_a_traceback_names_the_page(tmp_path):
    blocks = _blocks(tmp_path, "# Page\n\n```python\nx = 1\n```\n\n- item\n\n    ```python\n    x += 1\n    ```\n")
    assert [block.line for block in blocks] == [4, 10]
    run_blocks([*blocks, Block("page.md", 13, "python", "assert x == 2", None)], tmp_path)
    with pytest.raises(ZeroDivisionError) as error:
        run_blocks([*blocks, Block("page.md", 13, "python", "x / 0", None)], tmp_path)
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno) == ("page.md", 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nls\n```\n", "the language is ''"),
        ("```fortran\nEND\n```\n", "the language is 'fortran'"),
        ("```bash\nls\n", "has no end"),
        ("<!-- not run: -->\n```bash\nls\n```\n", "gives no reason"),
        ("<!-- not run: needs a GPU -->\nText.\n\n```bash\nls\n```\n", "directly before"),
        ("Text.\n<!-- not run: needs a GPU -->\n", "no code block follows"),
        ("```cpp\nint x;\n```\n", "include C++ from a test"),
    ],
)
def test_a_page_that_breaks_the_rules_is_refused(tmp_path, text, message):
    with pytest.raises(BadPage, match=re.escape(message)):
        _blocks(tmp_path, text)


def test_marked_and_elsewhere_are_not_run(tmp_path):
    text = "<!-- not run: needs a GPU -->\n\n```bash\nfalse\n```\n\n```bash\n# here\nmake no-such-target\n```\n"
    blocks = _blocks(tmp_path, text)
    assert [block.reason for block in blocks] == ["needs a GPU", "CI calls the targets of the Makefile"]
    run_blocks(blocks, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nfalse\ntrue\n```\n",
        "```bash\nfalse | true\n```\n",
        "```bash\nmake no-such-target\nls no-such-file\n```\n",
        "```console\n$ echo one two\none three\n```\n",
        "```console\n$ echo one\none\n$ echo two\n...one\n```\n",
    ],
)
def test_a_command_that_fails_or_prints_something_else_fails(tmp_path, text):
    with pytest.raises(AssertionError):
        run_blocks(_blocks(tmp_path, text), tmp_path)


def test_output_is_compared_up_to_dots(tmp_path):
    text = "```console\n$ echo a; \\\n  echo 17 seconds\na\n... seconds\n$ touch made\n```\n"
    run_blocks(_blocks(tmp_path, text), tmp_path)
    assert (tmp_path / "made").exists()
