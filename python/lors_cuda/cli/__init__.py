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
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

from .._checks import check_environment
from .._distributed import OtherProcessFailed, is_first, launched
from ._as_options import as_options

COMMANDS = {
    "info": "show versions, devices and which kernels run on this machine",
    "prune": "make a model sparse (magnitude or Wanda; 2:4 or unstructured)",
    "quantize": "store a sparse model's weights as codes with scales, every zero kept",
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


class _Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM, as an exception: a KeyboardInterrupt, which nothing takes for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


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
        0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C, 143 by SIGTERM; but for 0 one line on stderr says why.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _stopped_by_signals():
        return _main(arguments, debug="--debug" in arguments)


def _main(arguments: list[str], *, debug: bool) -> int:
    parser = args = None
    try:
        parser, args = _parse(arguments)
        check_environment()
        if launched() and args.command not in DISTRIBUTED:
            raise UsageError(f"'{args.command}' runs in one process, not under torchrun; only finetune shares its work")
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, parser)
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
    except KeyboardInterrupt as stopped:
        number = getattr(stopped, "number", signal.SIGINT)
        code = 128 + number
        return _fail(_how_to_go_on(number, args), code, debug) if is_first() else code
    except BrokenPipeError:
        # The reader went away (`| head`). Python would complain once more when it flushes stdout at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        text = _sentence(error)
        advice = _after(args) if isinstance(error, OSError) and getattr(args, "begun", False) else None
        if advice is not None:
            text = f"{text}: {advice}"
        return _fail(text if parser is None else as_options(text, parser, _parser_of("finetune")), FAILED, debug)
    return DONE


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise :class:`_Stopped` in the block, so that it removes its temporary files.

    A second Ctrl-C then ends the process at once. A second SIGTERM does not: `timeout` and torchrun send several, as
    they do with SIGINT to the processes that torchrun has started.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN if launched() else signal.SIG_DFL)
        raise _Stopped(number)

    # One that is ignored (nohup, a shell's background) stays so.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _how_to_go_on(number: int, args: argparse.Namespace | None) -> str:
    what = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    return f"{what}; {_after(args) or 'nothing was written. The same command begins again'}"


def _after(args: argparse.Namespace | None) -> str | None:
    """How a command that had begun to write goes on; None if it had not, or has nothing to go on from."""
    after = None if args is None else getattr(_module(args.command), "after_interrupt", None)
    return None if after is None else after(args)


def _parse(arguments: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser of the command, and what it has read."""
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
    args = parser.parse_args(arguments)
    return subparsers.choices[args.command], args


def _parser_of(command: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"lors-cuda {command}")
    _module(command).add_arguments(parser)
    return parser


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
    if debug and code != WRONG_USAGE:
        traceback.print_exc()
    print(f"lors-cuda: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(
    parser: argparse.ArgumentParser,
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    # UserWarning: ours; deprecations inside other packages are not for this program's users.
    if category is UserWarning and is_first():
        text = as_options(str(message), parser, _parser_of("finetune"))
        print(f"lors-cuda: warning: {' '.join(text.split())}", file=sys.stderr)


def _plain(value: Any) -> Any:
    """The result with what JSON cannot hold (NaN, infinity) as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
