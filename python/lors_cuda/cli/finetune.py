# SPDX-License-Identifier: Apache-2.0
# lors-cuda finetune: adapter_config.json, adapter_model.safetensors, training.jsonl, loss.png, run.json, checkpoint.pt
# in one directory. Killed at any time, the same command with --resume goes on from the last checkpoint. torchrun
# runs it in several processes, each with a copy of the model and its part of every step's batches.
"""``lors-cuda finetune``: train a LoRS adapter on a sparse model."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from .._checks import GRADIENTS, LAYOUTS
from .._files import replace_file
from .._processes import alike, check_launcher, from_first, group, is_first, process_count, process_rank, together
from ..adapter_directory import CONFIG_NAME, WEIGHTS_NAME, require_safetensors
from ..checkpoint import save_adapter
from ..config import LoRSConfig
from ..data import TokenDataset
from ..gradient_init import estimate_gradients, init_from_gradients
from ..model import get_lors_model, named_lors_layers
from ..pruning import measure_sparsity, total_sparsity
from ..targets import Target, check_targets, find_targets
from ..training import SCHEDULES, TrainingConfig, train
from ..training_files import CHECKPOINT_NAME, LOG_NAME, PLOT_NAME, plot_loss
from ._common import (
    add_data,
    add_model,
    add_targets,
    describe_data,
    find_device,
    load_dataset,
    load_model,
    non_negative_int,
    positive_float,
    positive_int,
    say,
    seed_number,
    target_config,
)

RUN_NAME = "run.json"
_FILES = (CONFIG_NAME, WEIGHTS_NAME, CHECKPOINT_NAME, LOG_NAME, PLOT_NAME, RUN_NAME)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model(parser)
    add_data(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where adapter, log and plot go")
    parser.add_argument("--rank", type=positive_int, default=16, help="rank r of the adapters")
    parser.add_argument("--alpha", type=positive_float, default=16.0, help="lora_alpha; the scaling is alpha / rank")
    parser.add_argument("--use-rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    add_targets(parser)
    parser.add_argument("--gradient", choices=GRADIENTS, default="lors", help="how adapter gradients are computed")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="how the sparse weights are stored")
    parser.add_argument("--init", choices=("gradient", "default"), default="gradient", help="how the adapters start")
    parser.add_argument(
        "--init-batches", type=positive_int, default=8, metavar="N", help="batches that estimate the gradient"
    )
    parser.add_argument("--lr", type=positive_float, default=2e-4, help="peak learning rate of AdamW")
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="learning rate after the warmup")
    parser.add_argument("--warmup-steps", type=non_negative_int, metavar="N", help="3 %% of the steps if left out")
    parser.add_argument("--steps", type=positive_int, default=200, help="optimizer steps")
    parser.add_argument("--accumulate", type=positive_int, default=1, metavar="N", help="batches per step and process")
    parser.add_argument("--seed", type=seed_number, default=0, help="order of the data, start of the adapters, dropout")
    parser.add_argument(
        "--checkpoint-every", type=non_negative_int, default=50, metavar="STEPS", help="0: at the end only"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the output's last checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="replace the run that is in the output")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, convert, start or resume, train, and save; under torchrun in all its processes, of which one writes."""
    check_launcher()
    with alike():
        training = TrainingConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            accumulate=args.accumulate,
            lr=args.lr,
            schedule=args.schedule,
            warmup_steps=args.warmup_steps,
            seed=args.seed,
            checkpoint_every=args.checkpoint_every,
        )
        config = target_config(
            args,
            r=args.rank,
            lora_alpha=args.alpha,
            layout=args.layout,
            gradient=args.gradient,
            use_rslora=args.use_rslora,
        )
        device = find_device(args.device)
    with group(device):
        return _run(args, training, config)


def _run(args: argparse.Namespace, training: TrainingConfig, config: LoRSConfig) -> dict[str, Any]:
    with together():
        if is_first():
            _check_output(args)
        # Asked for before an hour of training, not after it.
        import matplotlib  # noqa: F401

        require_safetensors()
        model = load_model(args.model, args.device)
        targets = find_targets(model, config)
        check_targets(targets, config)  # before the work of estimating gradients
        sparsity = total_sparsity(measure_sparsity(model, targets=targets))
        data = load_dataset(args, model)
    say(args, f"Model: '{args.model}', sparsity {sparsity:.2%}. Data: {describe_data(data)}.")
    if process_count() > 1:
        say(args, f"{process_count()} processes; {process_count() * args.accumulate} batches make a step.")
    resuming = from_first(args.resume and (args.output / CHECKPOINT_NAME).is_file())
    if args.resume and not resuming:
        say(args, "There is no checkpoint yet; training starts from the beginning.")
    _convert(args, model, config, targets, data, resuming)
    identity = {**config.to_dict(), "init": args.init, "base": _base_fingerprint(model)}
    if args.init == "gradient":
        identity["init_batches"] = args.init_batches
    with together():
        if is_first() and args.overwrite:
            _remove_run(args.output)
        if is_first() and not resuming:
            _write_run(args, None)
    entries = train(
        model,
        data,
        training,
        directory=args.output,
        resume=args.resume,
        identity=identity,
        progress=not args.json,
        on_step=_report(training.steps) if is_first() and not args.json and not sys.stdout.isatty() else None,
    )
    window = min(10, len(entries))
    last = sum(entry["loss"] for entry in entries[-window:]) / window
    result = {
        "output": str(args.output),
        "processes": process_count(),
        "steps": training.steps,
        "first_loss": entries[0]["loss"],
        "last_loss": last,
        "sparsity": sparsity,
        "adapted_layers": sum(1 for _ in named_lors_layers(model)),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens": sum(entry["tokens"] for entry in entries),
        "ms_per_step": 1e3 * sum(entry["seconds"] for entry in entries) / len(entries),
        "log": str(args.output / LOG_NAME),
        "plot": str(args.output / PLOT_NAME),
    }
    with together():
        if is_first():
            save_adapter(model, args.output)
            plot_loss(entries, args.output / PLOT_NAME)
            _write_run(args, result)
    say(
        args,
        f"Loss {result['first_loss']:.4f} at the first step, {last:.4f} over the last {window}; "
        f"{result['ms_per_step']:.1f} ms per step. Adapter, log and plot saved in '{args.output}'.",
    )
    return result


def _check_output(args: argparse.Namespace) -> None:
    """Refuse an output directory that holds something else, or a run that nobody asked to go on with or replace."""
    output: Path = args.output
    if output.resolve() == args.model.resolve():
        raise ValueError(f"The output '{output}' is the model's directory; choose another one.")
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"The output '{output}' is a file; choose another directory.")
    if not any(output.iterdir()):
        return
    if not any((output / name).exists() for name in _FILES):
        raise FileExistsError(
            f"The output directory '{output}' is not empty and holds no fine-tuning run; nothing was written. Choose "
            "another directory."
        )
    if not (args.resume or args.overwrite):
        raise FileExistsError(
            f"The output directory '{output}' already holds a run; nothing was written. Go on with it with --resume, "
            "replace it with --overwrite, or choose another directory."
        )


def _convert(
    args: argparse.Namespace,
    model: nn.Module,
    config: LoRSConfig,
    targets: list[Target],
    data: TokenDataset,
    resuming: bool,
) -> None:
    """Give the model its adapters; where a checkpoint follows, their start does not matter and is not computed."""
    gradients = None
    if args.init == "gradient" and not resuming:
        batches = data.shuffled_batches(args.batch_size, args.init_batches, args.seed)
        mine = batches[process_rank() :: process_count()]
        gradients = estimate_gradients(
            model, mine, steps=args.init_batches, targets=targets, progress=is_first() and not args.json
        )
    with together():
        torch.manual_seed(args.seed)
        get_lors_model(model, config, targets=targets)
        if gradients is not None:
            init_from_gradients(model, gradients)


def _base_fingerprint(model: nn.Module) -> str:
    """A short name of the base model: every layer's mask and the beginning of its weights."""
    digest = hashlib.sha256()
    for name, layer in named_lors_layers(model):
        digest.update(name.encode() + layer.sparse_weight.fingerprint().encode())
        digest.update(layer.weight_values.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _remove_run(output: Path) -> None:
    for name in _FILES:
        (output / name).unlink(missing_ok=True)


def _write_run(args: argparse.Namespace, result: dict[str, Any] | None) -> None:
    """run.json: how the run was started, and what came out."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("command", "json", "debug", "resume", "overwrite")
    }
    content = {"lors_cuda": __version__, "torch": torch.__version__, "options": options, "result": result}
    replace_file(args.output / RUN_NAME, (json.dumps(content, indent=2) + "\n").encode())


def _report(steps: int) -> Any:
    """Print about ten lines over the whole run, where the output is a file; a terminal has a bar."""
    every = max(1, steps // 10)

    def print_step(entry: dict[str, Any]) -> None:
        if entry["step"] % every == 0 or entry["step"] == steps:
            print(f"step {entry['step']:>6}  loss {entry['loss']:.4f}  lr {entry['lr']:.2e}", flush=True)

    return print_step
