# SPDX-License-Identifier: Apache-2.0
# The command line: finds the command's module, parses, runs it, and turns every failure into one line on stderr.
# A command is a module with add_arguments(parser) and run(args) -> dict; it prints for people, the dict is --json.
# Only the chosen command's module is imported, so that --help and info need torch alone.
"""``lors-cuda``: fine-tune sparse language models from the command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .._checks import check_environment
from .._distributed import OtherProcessFailed, is_first, launched

COMMANDS = {
    "info": "show versions, devices and which kernels run on this machine",
    "prune": "make a model sparse (magnitude or Wanda; 2:4 or unstructured)",
    "finetune": "train a LoRS adapter on a sparse model",
    "merge": "merge an adapter into its model, every zero kept",
    "eval": "measure perplexity, with and without an adapter",
    "demo": "the whole story on a small model and real text, offline",
}
DISTRIBUTED = ("finetune", "info")  # what may run under torchrun
DONE, FAILED, WRONG_USAGE = 0, 1, 2
_EXTRA_PACKAGES = (
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "tqdm",
    "matplotlib",
    "datasets",
    "jinja2",
)


class UsageError(Exception):
    """Options that do not go together: exit code 2, like argparse's own errors."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line; argparse itself would print the usage first.
        raise UsageError(f"{message}; see '{self.prog} --help'")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" and "(default: False)" tell nobody anything.
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None: those of the process.

    Returns:
        0 done, 1 failed, 2 wrong usage; in the latter cases one line on stderr says why.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        args = _parse(arguments)
        check_environment()
        if launched() and args.command not in DISTRIBUTED:
            raise UsageError(f"'{args.command}' runs in one process, not under torchrun; only finetune shares its work")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            result = _module(args.command).run(args)
        if args.json and is_first():
            print(json.dumps(_plain(result), indent=2))
        sys.stdout.flush()
    except SystemExit as exit:  # argparse's --help and --version
        return exit.code if isinstance(exit.code, int) else DONE
    except UsageError as error:
        return _fail(str(error), WRONG_USAGE, debug) if is_first() else WRONG_USAGE
    except OtherProcessFailed:
        return FAILED  # that one has said why
    except KeyboardInterrupt:
        return _fail("interrupted", FAILED, debug) if is_first() else FAILED
    except BrokenPipeError:
        # The reader went away (`| head`). Python would complain once more when it flushes stdout at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _fail(_sentence(error), FAILED, debug)
    return DONE


def _parse(arguments: list[str]) -> argparse.Namespace:
    from .. import __version__

    parser = _Parser(prog="lors-cuda", description="Fine-tune sparse language models with LoRS: every zero is kept.")
    parser.add_argument("--version", action="version", version=f"lors-cuda {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, description=summary, formatter_class=_Help)
        if name == chosen:
            _module(name).add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def _module(command: str) -> Any:
    return importlib.import_module(f"{__name__}.{command}")


def _sentence(error: Exception) -> str:
    """What went wrong, in one line, for a person."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRA_PACKAGES:
            return (
                f"this command needs the package {package}, which is not installed; run: pip install 'lors-cuda[cli]'"
            )
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        # str() of an OSError begins with "[Errno 28]", which tells a person nothing.
        text = error.strerror + (f": '{error.filename}'" if error.filename else "")
    if isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError)) and text:
        return text
    return f"unexpected {type(error).__name__}: {text}; run it again with --debug to see where"


def _fail(message: str, code: int, debug: bool) -> int:
    if debug and code == FAILED:
        traceback.print_exc()
    print(f"lors-cuda: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    # UserWarning: ours; deprecations inside other packages are not for this program's users.
    if category is UserWarning and is_first():
        print(f"lors-cuda: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _plain(value: Any) -> Any:
    """The result with what JSON cannot hold (NaN, infinity) as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
