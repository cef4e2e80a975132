# SPDX-License-Identifier: Apache-2.0
# lors-cuda finetune: adapter_config.json, adapter_model.safetensors, training.jsonl, loss.png, run.json, checkpoint-N/
# in one directory, by transformers' Trainer (_trainer.py). Killed at any time, the same command with --resume goes on
# from the last complete checkpoint. torchrun runs it in several processes.
"""``lors-cuda finetune``: train a LoRS adapter on a sparse model."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import (
    alike,
    check_launcher,
    ended_together,
    from_first,
    group,
    is_first,
    is_partitioned,
    process_count,
    process_rank,
    together,
)
from ..adapter_directory import WEIGHTS_NAME, read_adapter, require_safetensors
from ..checkpoint import absent_modules, load_adapter, save_adapter
from ..config import LoRSConfig
from ..data import TokenDataset
from ..gradient_init import estimate_gradients, init_from_gradients
from ..model import get_lors_model, named_lors_layers
from ..sparsity import ModelSparsity, measure_sparsity
from ..targets import Target, check_targets, find_targets
from ._common import (
    describe_data,
    find_device,
    load_dataset,
    load_model,
    say,
)
from ._finetune_options import add_arguments, check_options, chosen_method, configuration
from ._run_directory import (
    LOG_NAME,
    PLOT_NAME,
    after_interrupt,
    check_output,
    default_warmup,
    go_on,
    newest_checkpoint,
    remove_run,
    write_run,
)

__all__ = ["add_arguments", "after_interrupt", "run"]

# What shapes the loss curve beside the adapters, the model and the data: a resumed run must have the same.
_CURVE_OPTIONS = ("batch_size", "accumulate", "lr", "schedule", "seed", "init", "init_batches", "bf16", "fp16", "fsdp")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, convert, start or resume, train, and save; under torchrun in all its processes, of which one writes."""
    check_launcher()
    with alike():
        config = configuration(args)
        device = find_device(args.device)
        check_options(args, device)
    with group(device):
        return _run(args, config, device)


def _run(args: argparse.Namespace, config: LoRSConfig, device: torch.device) -> dict[str, Any]:
    method = chosen_method(args)
    with together():
        if is_first():
            check_output(args)
        # Asked for before an hour of training, not after it.
        import accelerate  # noqa: F401
        import matplotlib  # noqa: F401
        import transformers

        require_safetensors()
        from . import _trainer

        model = load_model(args.model, args.device, mask_from=args.mask_from)
        _check_adapter(args, model)
        data = None
        if "ranks" in method.places():
            data = load_dataset(args, model, packing=args.packing)
            config = method.configure(config, model, data.shuffled_batches(args.batch_size, None, args.seed))
        targets = find_targets(model, config)
        check_targets(targets, config)  # before the work of estimating gradients
        sparsity = measure_sparsity(model, targets=targets)
        data = data or load_dataset(args, model, packing=args.packing)
        eval_data = None if args.eval_data is None else load_dataset(args, model, args.eval_data)
    say(args, f"Model: '{args.model}', sparsity {sparsity}. Data: {describe_data(data)}.")
    if eval_data is not None:
        say(args, f"Evaluation at every checkpoint: {describe_data(eval_data)}.")
    if process_count() > 1:
        say(args, f"{process_count()} processes; {process_count() * args.accumulate} batches make a step.")
    with together():
        checkpoint = newest_checkpoint(args.output) if is_first() and args.resume else None
    checkpoint = from_first(checkpoint)
    if args.resume and checkpoint is None:
        say(args, "There is no complete checkpoint yet; training starts from the beginning.")
    gradients = _convert(args, model, config, targets, data, checkpoint is not None)
    has_run = bool(method.places()) or config.rounding != "nearest"
    method_run = method.start(model, steps=args.steps, seed=args.seed, gradients=gradients) if has_run else None
    say(args, _about_trained(model, sparsity))
    identity = _identity(args, model, config, data)
    trained = 0
    with together():
        if checkpoint is not None:
            state = transformers.TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            trained = state.global_step
        if is_first() and checkpoint is not None:
            go_on(args, identity, trained)
        elif is_first():
            if args.overwrite:
                remove_run(args.output)
            write_run(args, identity, None)
        args.begun = True
    identity = from_first(identity)
    every = args.checkpoint_every or args.steps
    arguments = _trainer.arguments(
        args.output,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        device=device,
        schedule=args.schedule,
        warmup_steps=identity["warmup_steps"],
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
        **({"max_grad_norm": 0.0} if method.clips else {}),
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
            optimizer=None if method_run is None else method_run.optimizer(args.lr),
        )
        if checkpoint is not None and trained == args.steps:
            say(args, f"All {trained} steps are trained already; more are trained with --steps.")
            load_adapter(model, checkpoint)
            trainer.state = state
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    if method_run is not None:
        method_run.finish()
    adapted: Any = trainer.model  # the same, unless it was sharded
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
        "expert_sparsity": sparsity.expert_sparsity,
        "model_sparsity": sparsity.model_sparsity,
        "adapted_layers": sum(1 for _ in named_lors_layers(adapted)),
        "trained_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "tokens": sum(entry["tokens"] for entry in entries),
        "ms_per_step": 1e3 * sum(entry["seconds"] for entry in entries) / len(entries),
        "log": str(args.output / LOG_NAME),
        "plot": str(args.output / PLOT_NAME),
    }
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if measured:
        result |= {name: measured[-1][name] for name in ("eval_loss", "eval_perplexity")}
    _save(adapted, args.output)
    with together():
        if is_first():
            _trainer.plot_loss(entries, args.output / PLOT_NAME)
            write_run(args, identity, result)
    say(
        args,
        f"Loss {result['first_loss']:.4f} at the first step, {last:.4f} over the last {window}; "
        f"{result['ms_per_step']:.1f} ms per step. Adapter, log and plot saved in '{args.output}'.",
    )
    return result


def _convert(
    args: argparse.Namespace,
    model: nn.Module,
    config: LoRSConfig,
    targets: list[Target],
    data: TokenDataset,
    resuming: bool,
) -> dict[str, Tensor] | None:
    """Give the model its adapters; where a checkpoint follows, their start does not matter and is not computed.

    Returns:
        The gradients, for a method that needs them.
    """
    if args.adapter is not None:
        with together():
            torch.manual_seed(args.seed)
            load_adapter(model, args.adapter, strict_mask=args.strict_mask, strict_values=args.strict_values)
        return None
    gradients = None
    needed = chosen_method(args).needs_gradients
    if needed or (args.init == "gradient" and not resuming):
        batches = data.shuffled_batches(args.batch_size, args.init_batches, args.seed)
        mine = batches[process_rank() :: process_count()]
        gradients = estimate_gradients(
            model,
            mine,
            steps=args.init_batches,
            targets=targets,
            progress=is_first() and not args.json,
            sketch_experts=True,
        )
    with together():
        torch.manual_seed(args.seed)
        get_lors_model(model, config, targets=targets)
        if gradients is not None and args.init == "gradient":
            init_from_gradients(model, gradients)
    return gradients if needed else None


def _about_trained(model: nn.Module, sparsity: ModelSparsity) -> str:
    """How many parameters are trained, and where; adapters of experts are many."""
    layers = [layer for _, layer in named_lors_layers(model)]
    experts = [layer for layer in layers if layer.num_experts is not None]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(layer.weights for layer in (*sparsity.layers, *sparsity.rest))
    text = (
        f"Trained: {trained:,} parameters, {trained / weights:.2%} of the model's weights; {len(layers)} adapted layers"
    )
    if not experts:
        return f"{text}."
    own = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in experts)
    adapters = sum(layer.num_experts or 0 for layer in experts)
    return f"{text}, of which {len(experts)} of experts with {adapters} adapters, {own:,} parameters."


def _check_adapter(args: argparse.Namespace, model: nn.Module) -> None:
    """Refuse an adapter of another model before its modules are looked for."""
    absent = None if args.adapter is None else absent_modules(model, read_adapter(args.adapter))
    if absent is not None:
        raise ValueError(f"The adapter in '{args.adapter}' was not loaded. {absent}")


def _base_fingerprint(model: nn.Module) -> str:
    """A short name of the base model: every layer's mask and the beginning of its weights."""
    digest = hashlib.sha256()
    for name, layer in named_lors_layers(model):
        digest.update(name.encode() + layer.sparse_weight.fingerprint().encode())
        digest.update(layer.weight_values.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _identity(args: argparse.Namespace, model: nn.Module, config: LoRSConfig, data: TokenDataset) -> dict[str, Any]:
    """What a run and its continuation must have in common to have one loss curve."""
    options = {name: getattr(args, name) for name in _CURVE_OPTIONS}
    if args.init != "gradient":
        del options["init_batches"]
    options |= {"steps": args.steps, "warmup_steps": args.warmup_steps}
    if args.warmup_steps is None:
        options["warmup_steps"] = default_warmup(args.steps)
    method = chosen_method(args)
    if method.places():
        options["method"] = method.fields()
    files = {"deepspeed": args.deepspeed, "adapter": args.adapter and args.adapter / WEIGHTS_NAME}
    for name, path in files.items():
        options[name] = None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    shared = {"data": data.fingerprint, "processes": process_count(), "base": _base_fingerprint(model)}
    plain: dict[str, Any] = json.loads(json.dumps({**config.to_dict(), **options, **shared}))
    return plain


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
