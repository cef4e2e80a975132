# SPDX-License-Identifier: Apache-2.0
# lors-cuda finetune: adapter_config.json, adapter_model.safetensors, training.jsonl, loss.png, run.json, checkpoint-N/
# in one directory, by transformers' Trainer (_trainer.py). Killed at any time, the same command with --resume goes on
# from the last complete checkpoint. torchrun runs it in several processes.
"""``lors-cuda finetune``: train a LoRS adapter on a sparse model."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from .._checks import GRADIENTS, LAYOUTS
from .._distributed import (
    alike,
    check_launcher,
    ended_together,
    from_first,
    group,
    is_first,
    is_partitioned,
    launched,
    process_count,
    process_rank,
    together,
)
from .._files import replace_file
from ..adapter_directory import CONFIG_NAME, WEIGHTS_NAME, require_safetensors
from ..checkpoint import load_adapter, save_adapter
from ..config import LoRSConfig
from ..data import TokenDataset
from ..gradient_init import estimate_gradients, init_from_gradients
from ..model import get_lors_model, named_lors_layers
from ..sparsity import measure_sparsity
from ..targets import Target, check_targets, find_targets
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

RUN_NAME, LOG_NAME, PLOT_NAME = "run.json", "training.jsonl", "loss.png"
_FORMER_CHECKPOINT = "checkpoint.pt"  # of the training loop that the Trainer has replaced
_EVENTS = "tensorboard"
_RUN_FILES = (
    CONFIG_NAME, WEIGHTS_NAME, LOG_NAME, PLOT_NAME, RUN_NAME, _FORMER_CHECKPOINT, _EVENTS, "checkpoint-[0-9]*",
    ".incomplete",
)  # fmt: skip
_REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
# What shapes the loss curve beside the adapters, the model and the data: a resumed run must have the same.
_CURVE_OPTIONS = (
    "steps", "batch_size", "accumulate", "lr", "schedule", "warmup_steps", "seed", "init", "init_batches",
    "bf16", "fp16", "fsdp",
)  # fmt: skip


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
    parser.add_argument(
        "--schedule", choices=("cosine", "constant"), default="cosine", help="learning rate after the warmup"
    )
    parser.add_argument("--warmup-steps", type=non_negative_int, metavar="N", help="3 %% of the steps if left out")
    parser.add_argument("--steps", type=positive_int, default=200, help="optimizer steps")
    parser.add_argument("--accumulate", type=positive_int, default=1, metavar="N", help="batches per step and process")
    parser.add_argument("--seed", type=seed_number, default=0, help="order of the data, start of the adapters, dropout")
    parser.add_argument(
        "--checkpoint-every", type=non_negative_int, default=50, metavar="STEPS", help="0: at the end only"
    )
    parser.add_argument(
        "--eval-data", type=Path, metavar="FILE", help="perplexity of it at every checkpoint, in the log"
    )
    parser.add_argument("--report-to", nargs="+", choices=tuple(_REPORTERS), default=[], help="send the log there too")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    precision.add_argument("--fp16", action="store_true", help="compute in float16 (autocast, scaled loss); on a GPU")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: memory for time")
    sharding = parser.add_mutually_exclusive_group()
    sharding.add_argument("--deepspeed", type=Path, metavar="FILE", help="DeepSpeed's configuration; on GPUs")
    sharding.add_argument("--fsdp", action="store_true", help="shard the model by FSDP2; under torchrun, on GPUs")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the output's last complete checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="replace the run that is in the output")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, convert, start or resume, train, and save; under torchrun in all its processes, of which one writes."""
    check_launcher()
    with alike():
        config = target_config(
            args,
            r=args.rank,
            lora_alpha=args.alpha,
            layout=args.layout,
            gradient=args.gradient,
            use_rslora=args.use_rslora,
        )
        device = find_device(args.device)
        _check_options(args, device)
    with group(device):
        return _run(args, config, device)


def _check_options(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse what this machine or these packages cannot do, before anything is loaded."""
    if args.warmup_steps is not None and args.warmup_steps > args.steps:
        raise ValueError(f"--warmup-steps is {args.warmup_steps}; it must be between 0 and --steps, {args.steps}.")
    if device.index and not launched():
        raise ValueError(
            f"--device is '{args.device}', but the Trainer takes the first GPU it sees; start the command with "
            f"CUDA_VISIBLE_DEVICES={device.index} and --device cuda."
        )
    for name in ("fp16", "fsdp", "deepspeed"):
        if getattr(args, name) and device.type != "cuda":
            instead = " Use --bf16." if name == "fp16" else ""
            raise ValueError(f"--{name} needs a GPU, and the device is {device}.{instead}")
    if args.fsdp and not launched():
        raise ValueError("--fsdp shards the model over several processes; start the command by torchrun.")
    if args.deepspeed is not None:
        _require("deepspeed", ("deepspeed",))
        _check_json(args.deepspeed)
    for name in args.report_to:
        _require(f"report-to {name}", _REPORTERS[name])


def _require(option: str, packages: tuple[str, ...]) -> None:
    if not any(importlib.util.find_spec(package) for package in packages):
        raise ModuleNotFoundError(
            f"--{option} needs the package {packages[0]}, which is not installed; run: pip install {packages[0]}"
        )


def _check_json(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"The DeepSpeed configuration '{path}' does not exist; give a JSON file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The DeepSpeed configuration '{path}' is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"The DeepSpeed configuration '{path}' must be a JSON object.")


def _run(args: argparse.Namespace, config: LoRSConfig, device: torch.device) -> dict[str, Any]:
    with together():
        if is_first():
            _check_output(args)
        # Asked for before an hour of training, not after it.
        import accelerate  # noqa: F401
        import matplotlib  # noqa: F401
        import transformers  # noqa: F401

        require_safetensors()
        from . import _trainer

        model = load_model(args.model, args.device)
        targets = find_targets(model, config)
        check_targets(targets, config)  # before the work of estimating gradients
        sparsity = measure_sparsity(model, targets=targets)
        data = load_dataset(args, model)
        eval_data = None if args.eval_data is None else load_dataset(args, model, args.eval_data)
    say(args, f"Model: '{args.model}', sparsity {sparsity}. Data: {describe_data(data)}.")
    if eval_data is not None:
        say(args, f"Evaluation at every checkpoint: {describe_data(eval_data)}.")
    if process_count() > 1:
        say(args, f"{process_count()} processes; {process_count() * args.accumulate} batches make a step.")
    with together():
        checkpoint = _last_checkpoint(args) if is_first() and args.resume else None
    checkpoint = from_first(checkpoint)
    if args.resume and checkpoint is None:
        say(args, "There is no complete checkpoint yet; training starts from the beginning.")
    _convert(args, model, config, targets, data, checkpoint is not None)
    identity = _identity(args, model, config, data)
    with together():
        if is_first() and checkpoint is not None:
            _check_identity(args.output, identity)
        elif is_first():
            if args.overwrite:
                _remove_run(args.output)
            _write_run(args, identity, None)
    every = args.checkpoint_every or args.steps
    arguments = _trainer.arguments(
        args.output,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        device=device,
        schedule=args.schedule,
        warmup_steps=args.warmup_steps,
        gradient_accumulation_steps=args.accumulate,
        save_steps=every,
        save_total_limit=2,
        eval_strategy="no" if eval_data is None else "steps",
        eval_steps=every,
        report_to=args.report_to or "none",
        bf16=args.bf16,
        fp16=args.fp16,
        gradient_checkpointing=args.gradient_checkpointing,
        deepspeed=None if args.deepspeed is None else str(args.deepspeed),
        fsdp=args.fsdp,
    )
    on_terminal = sys.stdout.isatty()
    report = None if args.json or on_terminal else _report(args.steps)
    with ended_together(FloatingPointError):
        trainer = _trainer.CommandTrainer(
            model,
            arguments,
            data,
            eval_data,
            callbacks=[_trainer.StepLog(args.output / LOG_NAME), _trainer.Report(bar=not args.json, each=report)],
        )
        if checkpoint is not None and trainer.finished(checkpoint):
            load_adapter(model, checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    trained: Any = trainer.model  # the same, unless it was sharded
    entries = _trainer.steps_of(trainer.state)
    window = min(10, len(entries))
    last = sum(entry["loss"] for entry in entries[-window:]) / window
    result = {
        "output": str(args.output),
        "processes": process_count(),
        "steps": args.steps,
        "first_loss": entries[0]["loss"],
        "last_loss": last,
        "sparsity": sparsity.sparsity,
        "model_sparsity": sparsity.model_sparsity,
        "adapted_layers": sum(1 for _ in named_lors_layers(trained)),
        "trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "tokens": sum(entry["tokens"] for entry in entries),
        "ms_per_step": 1e3 * sum(entry["seconds"] for entry in entries) / len(entries),
        "log": str(args.output / LOG_NAME),
        "plot": str(args.output / PLOT_NAME),
    }
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if measured:
        result |= {name: measured[-1][name] for name in ("eval_loss", "eval_perplexity")}
    _save(trained, args.output)
    with together():
        if is_first():
            _trainer.plot_loss(entries, args.output / PLOT_NAME)
            _write_run(args, identity, result)
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


def _last_checkpoint(args: argparse.Namespace) -> str | None:
    """The output's newest complete checkpoint.

    Raises:
        ValueError: what is there is of the former training loop.
    """
    from ..hf import last_checkpoint

    found = last_checkpoint(args.output) if args.output.is_dir() else None
    former = args.output / _FORMER_CHECKPOINT
    if found is None and former.is_file():
        raise ValueError(
            f"'{former}' was written by an older lors_cuda, whose training loop is gone, and cannot be resumed. The "
            "adapter beside it, if that run was finished, is as good as ever; train again in another output directory, "
            "or with --overwrite."
        )
    return None if found is None else str(found)


def _identity(args: argparse.Namespace, model: nn.Module, config: LoRSConfig, data: TokenDataset) -> dict[str, Any]:
    """What a run and its continuation must have in common to have one loss curve."""
    options = {name: getattr(args, name) for name in _CURVE_OPTIONS}
    if args.init != "gradient":
        del options["init_batches"]
    options["deepspeed"] = None if args.deepspeed is None else hashlib.sha256(args.deepspeed.read_bytes()).hexdigest()
    shared = {"data": data.fingerprint, "processes": process_count(), "base": _base_fingerprint(model)}
    plain: dict[str, Any] = json.loads(json.dumps({**config.to_dict(), **options, **shared}))
    return plain


def _check_identity(output: Path, identity: dict[str, Any]) -> None:
    path = output / RUN_NAME
    advice = "Start again in another output directory, or with --overwrite."
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["identity"]
        names = sorted({*before, *identity})
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"'{path}', which says how the run was started, is missing or damaged. {advice}") from None
    different = [name for name in names if before.get(name) != identity.get(name)]
    if different:
        listed = "; ".join(f"{name} was {before.get(name)!r}, is {identity.get(name)!r}" for name in different)
        raise ValueError(
            f"The run in '{output}' was started with other settings ({listed}). Resume with the same ones. {advice}"
        )


def _save(model: nn.Module, output: Path) -> None:
    """Write the adapter; of a model that is sharded, all processes gather it."""
    partitioned = any(hasattr(parameter, "ds_shape") for parameter in model.parameters())
    with contextlib.ExitStack() as stack:
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(list(model.parameters())))
        if is_partitioned(model) and not partitioned:
            save_adapter(model, output)
            return
        with together():
            if is_first():
                save_adapter(model, output)


def _files_of_run(output: Path) -> list[Path]:
    return [path for pattern in _RUN_FILES for path in output.glob(pattern)]


def _remove_run(output: Path) -> None:
    for path in _files_of_run(output):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_run(args: argparse.Namespace, identity: dict[str, Any], result: dict[str, Any] | None) -> None:
    """run.json: how the run was started, and what came out."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("command", "json", "debug", "resume", "overwrite")
    }
    versions = {"lors_cuda": __version__, "torch": torch.__version__}
    content = {**versions, "options": options, "identity": identity, "result": result}
    replace_file(args.output / RUN_NAME, (json.dumps(content, indent=2) + "\n").encode())


def _report(steps: int) -> Any:
    """Print about ten lines over the whole run, where the output is a file; a terminal has a bar."""
    every = max(1, steps // 10)

    def print_entry(entry: dict[str, Any]) -> None:
        step = entry["step"]
        if "eval_loss" in entry:
            print(f"step {step:>6}  evaluation: loss {entry['eval_loss']:.4f}", end="  ")
            print(f"perplexity {entry['eval_perplexity']:.4f}", flush=True)
        elif step % every == 0 or step == steps:
            print(f"step {step:>6}  loss {entry['loss']:.4f}  lr {entry['lr']:.2e}", flush=True)

    return print_entry
