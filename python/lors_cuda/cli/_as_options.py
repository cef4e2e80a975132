# SPDX-License-Identifier: Apache-2.0
# The library's sentences name its arguments, because that is what a program passes. Before the command line prints one,
# each argument becomes the option that gives it, so that what is advised can be done where it is read.
"""Arguments of the library as options of a command."""

from __future__ import annotations

import argparse
import ast
import re
import shlex

# Of an argument the option's destination. Those of several words are replaced wherever they occur, the others, which
# are also words of the language, only before "=" and a quoted value.
_DESTINATIONS = {
    **{
        name: name
        for name in ("target_modules", "target_parameters", "exclude_modules", "rank_pattern", "alpha_pattern")
    },
    **{name: name for name in ("modules_to_save", "strict_mask", "strict_values", "use_rslora")},
    "lora_alpha": "alpha",
    "mask_from": "mask_from",
    "requantize": "requantize",
}
_PLAIN = ("remainder", "layout", "gradient", "rounding", "method", "format")
_VALUE = r"""\[[^\]]*\]|\{[^}]*\}|'[^']*'|"[^"]*"|True|False|None|[\d.]+"""
_ARGUMENT = re.compile(
    rf"(?<![\w.-])(?:(?P<name>{'|'.join(_DESTINATIONS)})(?:=(?P<value>{_VALUE}))?"
    rf"|(?P<plain>{'|'.join(_PLAIN)})=(?P<quoted>'[^']*'|\"[^\"]*\"))(?!\w)"
)


def as_options(text: str, command: argparse.ArgumentParser, trains: argparse.ArgumentParser) -> str:
    """``text`` with the library's arguments as options: "exclude_modules=['gate']" becomes "--exclude-modules gate".

    What ``command`` has no option for is one of ``trains``, the parser of finetune, and called so.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match["name"] or match["plain"]
        for parser in (command, trains):
            told = _told(parser, _DESTINATIONS.get(name, name), match["value"] or match["quoted"])
            if told is not None:
                return told if parser is command else f"{told} of '{parser.prog}'"
        return match[0]

    return _ARGUMENT.sub(replaced, text)


def _told(parser: argparse.ArgumentParser, destination: str, literal: str | None) -> str | None:
    """The parser's option and its values, as a shell takes them; "no --flag" for what a flag does not set."""
    action = next((action for action in parser._actions if action.dest == destination), None)
    if action is None:
        return None
    option, value = action.option_strings[-1], None if literal is None else ast.literal_eval(literal)
    if value is None or isinstance(value, bool):
        return f"no {option}" if value is (not action.const) else option
    if isinstance(value, dict):
        value = [f"{key}={one}" for key, one in value.items()]
    return f"{option} {shlex.join(map(str, value if isinstance(value, list) else [value]))}"
