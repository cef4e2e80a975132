# SPDX-License-Identifier: Apache-2.0
# The directory of a fine-tuning run: which files it has, what run.json says of its start, and what may go on from it.
"""What ``lors-cuda finetune`` keeps in its output."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._files import real, replace_file
from ..adapter_directory import CONFIG_NAME, WEIGHTS_NAME

RUN_NAME, LOG_NAME, PLOT_NAME = "run.json", "training.jsonl", "loss.png"
_FORMER_CHECKPOINT = "checkpoint.pt"  # of the training loop that the Trainer has replaced
_RUN_FILES = (
    CONFIG_NAME, WEIGHTS_NAME, LOG_NAME, PLOT_NAME, RUN_NAME, _FORMER_CHECKPOINT, "tensorboard", "checkpoint-[0-9]*",
    ".incomplete",
)  # fmt: skip
_AGAIN = "Start again in another output directory, or with --overwrite."


def check_output(args: argparse.Namespace) -> None:
    """Refuse an output directory that holds something else, or a run that nobody asked to go on with or replace."""
    output: Path = args.output
    for name, source in (("model", args.model), ("adapter", args.adapter)):
        if source is not None and real(output) == real(source):
            raise ValueError(f"The output '{output}' is the {name}'s directory; choose another one.")
    if args.overwrite and args.adapter is not None and real(output) in real(args.adapter).parents:
        raise ValueError(f"--overwrite would remove the adapter '{args.adapter}'; choose another output directory.")
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"The output '{output}' is a file; choose another directory.")
    if not any(output.iterdir()):
        return
    if not _files_of_run(output):
        raise FileExistsError(
            f"The output directory '{output}' is not empty and holds no fine-tuning run; nothing was written. Choose "
            "another directory."
        )
    if not (args.resume or args.overwrite):
        raise FileExistsError(
            f"The output directory '{output}' already holds a run; nothing was written. Go on with it with --resume, "
            "replace it with --overwrite, or choose another directory."
        )


def newest_checkpoint(output: Path) -> str | None:
    """The output's newest complete checkpoint.

    Raises:
        ValueError: what is there is of the former training loop.
    """
    from ..hf import last_checkpoint

    found = last_checkpoint(output) if output.is_dir() else None
    former = output / _FORMER_CHECKPOINT
    if found is None and former.is_file():
        raise ValueError(
            f"'{former}' was written by an older lors_cuda, whose training loop is gone, and cannot be resumed. The "
            "adapter beside it, if that run was finished, is as good as ever: give it to --adapter, and another output "
            "directory. Or start again with --overwrite."
        )
    return None if found is None else str(found)


def go_on(args: argparse.Namespace, identity: dict[str, Any], trained: int) -> None:
    """Check that the run in the output, of which ``trained`` steps are done, was started as ``identity`` says.

    More steps than it was started for, or fewer, are no other run. Its warmup stays what it was:
    ``identity["warmup_steps"]`` is set.

    Raises:
        ValueError: other settings, or fewer steps than are done; run.json is missing or damaged.
    """
    path = args.output / RUN_NAME
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["identity"]
        names = sorted({*before, *identity} - {"steps"})
        planned = int(before["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"'{path}', which says how the run was started, is missing or damaged. {_AGAIN}") from None
    if before.get("warmup_steps") is None:  # of an earlier version
        before["warmup_steps"] = default_warmup(planned)
    if args.warmup_steps is None:
        identity["warmup_steps"] = before["warmup_steps"]
    different = [name for name in names if before.get(name) != identity.get(name)]
    if different:
        listed = "; ".join(f"{name} was {before.get(name)!r}, is {identity.get(name)!r}" for name in different)
        raise ValueError(
            f"The run in '{args.output}' was started with other settings ({listed}). Resume with the same ones. "
            f"{_AGAIN} To train its adapter further with other settings, give it to --adapter."
        )
    if args.steps < trained:
        raise ValueError(
            f"The run in '{args.output}' has trained {trained} steps already, and --steps is {args.steps}. Give "
            f"--steps {trained} or more. {_AGAIN}"
        )
    if args.steps != planned and args.schedule == "cosine" and args.steps > trained:
        warnings.warn(
            f"The cosine rate of this run was to reach 0 at step {planned}. After step {trained} it is that of a run "
            f"of {args.steps} steps, so the loss curve is not that of one run of {args.steps} steps. With --schedule "
            "constant, from the start, it would be.",
            UserWarning,
            stacklevel=2,
        )
    elif args.steps > planned and args.warmup_steps is None and default_warmup(args.steps) != before["warmup_steps"]:
        warnings.warn(
            f"The warmup of this run was {before['warmup_steps']} steps, and stays so; one run of {args.steps} steps "
            f"is the same with --warmup-steps {before['warmup_steps']}.",
            UserWarning,
            stacklevel=2,
        )


def default_warmup(steps: int) -> int:
    """3 % of the steps."""
    return math.ceil(0.03 * steps)


def remove_run(output: Path) -> None:
    """Delete the files of a run, and nothing else."""
    for path in _files_of_run(output):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_run(args: argparse.Namespace, identity: dict[str, Any], result: dict[str, Any] | None) -> None:
    """run.json: how the run was started, and what came out."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("command", "json", "debug", "resume", "overwrite", "begun")
    }
    versions = {"lors_cuda": __version__, "torch": torch.__version__}
    content = {**versions, "options": options, "identity": identity, "result": result}
    replace_file(args.output / RUN_NAME, (json.dumps(content, indent=2) + "\n").encode())


def after_interrupt(args: argparse.Namespace) -> str | None:
    """How an interrupted run goes on; None if it had not begun."""
    if not args.begun and (args.overwrite or not (args.output / RUN_NAME).is_file()):
        return None
    from ..hf import last_checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = last_checkpoint(args.output)
    how = "the same command with --resume" + (" instead of --overwrite" if args.overwrite else "")
    if checkpoint is None:
        return f"no checkpoint was complete yet: {how} begins again"
    return f"{how} goes on after step {checkpoint.name.rpartition('-')[2]}"


def _files_of_run(output: Path) -> list[Path]:
    return [path for pattern in _RUN_FILES for path in output.glob(pattern)]
