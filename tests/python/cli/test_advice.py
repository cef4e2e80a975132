# SPDX-License-Identifier: Apache-2.0
"""Every advice of the command line can be followed there: what a message names is an option of the command."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lors_cuda
from cli_calls import call, failed, finetune
from lors_cuda.cli import COMMANDS, _parser_of
from lors_cuda.cli._as_options import _DESTINATIONS, as_options

pytest_plugins = ["cli_fixtures"]

PACKAGE = Path(lors_cuda.__file__).parent
# Rooms whose sentences no command prints: no command imports them, or only what raises nothing of the kind.
ELSEWHERE = ("peft", "interchange.py", "reference.py")
OF_OTHER_PROGRAMS = {"--nproc-per-node"}  # torchrun's
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]+")  # "--x" is one that is filled in
CALL = re.compile(r"`lors-cuda (\w+)([^`]*)`")


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a file that are made of words, f-strings with x for what is filled in; no docstrings."""
    module = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(module)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    inside = {id(part) for node in ast.walk(module) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(v.value if isinstance(v, ast.Constant) else "x" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | inside:
            yield node.lineno, node.value


def rooms() -> Iterator[Path]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] not in ELSEWHERE:
            yield path


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings} | {"--json", "--debug", "--version"}


def test_every_option_that_a_sentence_names_exists():
    commands = {name: options(_parser_of(name)) for name in COMMANDS}
    every = set.union(*commands.values()) | OF_OTHER_PROGRAMS
    found = 0
    for path in rooms():
        # A command's own sentences name its own options; those of shared rooms any.
        known = commands.get(path.stem, every) if path.parent.name == "cli" else every
        for line, text in sentences(path):
            for other, rest in CALL.findall(text):
                assert set(OPTION.findall(rest)) <= commands[other], f"{path.name}, line {line}: {text!r}"
            named = set(OPTION.findall(CALL.sub("", text)))
            found += len(named)
            assert named <= known, f"{path.name}, line {line}: {named - known} in {text!r}"
    assert found > 60, "the search has found too little to prove anything"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_sentence_advises_an_argument_of_the_library(command):
    """Printed by whichever command, no name of a configuration's field is left, and each option is one of somewhere."""
    parser, trains = _parser_of(command), _parser_of("finetune")
    argument = re.compile(rf"(?<![\w.-])({'|'.join(_DESTINATIONS)})(?!\w)|(?<![\w.-])(layout|gradient|method)=['\"]")
    known, of_finetune = options(parser) | OF_OTHER_PROGRAMS, options(trains)
    found = 0
    for path in rooms():
        for line, text in sentences(path):
            if argument.search(text) and " " in text:
                printed = as_options(CALL.sub("", text), parser, trains)
                where = f"{path.name}, line {line}: {printed}"
                left = argument.search(printed)
                # method is an option of prune alone, and no other command prints its sentence.
                assert left is None or left[0] == "method='", where
                for option in OPTION.findall(printed):
                    elsewhere = re.search(rf"{option}( \S+)* of 'lors-cuda finetune'", printed)
                    assert option in known or (elsewhere and option in of_finetune), where
                found += 1
    assert found > 10, "the search has found too little to prove anything"


def test_arguments_become_options():
    merge, finetune = _parser_of("merge"), _parser_of("finetune")
    for said, printed in [
        ("Use strict_mask=False to load it.", "Use --no-strict-mask to load it."),
        ("(exclude_modules=['a.b', 'c'] leaves it out)", "(--exclude-modules a.b c leaves it out)"),
        ("target_modules='all-linear' selects", "--target-modules all-linear selects"),
        ("target_modules='.*(q|v)' selects", "--target-modules '.*(q|v)' selects"),
        ("Use rank_pattern for it, layout='bitmap' or", "Use --rank-pattern for it, --layout bitmap or"),
        ("rank_pattern={'q': 2, 'v': 3} and", "--rank-pattern q=2 v=3 and"),
        ("the layout and my_target_modules", "the layout and my_target_modules"),
        ("its lora_alpha=8, use_rslora=True", "its --alpha 8, --use-rslora"),
        ("with requantize=False, not requantize=True", "with no --requantize, not --requantize"),
    ]:
        assert as_options(said, finetune, finetune) == printed
    assert as_options("Use rank_pattern.", merge, finetune) == "Use --rank-pattern of 'lors-cuda finetune'."


def test_advice_that_is_followed_helps(home, adapter, tmp_path, capsys):
    run = tmp_path / "run"
    error = failed(capsys, *finetune(home, run, "--rank", "33"))
    assert "--rank-pattern for smaller ranks, another layout, or --exclude-modules" in error
    assert "a regular expression for the whole name" in failed(
        capsys, *finetune(home, run, "--target-modules", "query")
    )
    followed = finetune(home, run, "--rank", "33", "--steps", "1", "--init", "default", "--rank-pattern", ".*=4")
    assert call(*followed, "--target-modules", r".*\.(q|v)_proj") == 0

    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    plain = tmp_path / "peft"
    model = AutoModelForCausalLM.from_pretrained(home / "sparse")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(plain)
    merge = ["merge", "--model", home / "sparse", "--adapter", plain, "--output", tmp_path / "merged"]
    assert "Use --no-strict-mask to load it all the same" in failed(capsys, *merge)
    assert call(*merge, "--no-strict-mask") == 0
