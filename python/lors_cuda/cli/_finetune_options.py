# SPDX-License-Identifier: Apache-2.0
# The options of finetune: what they are, the configuration that they describe, and what this machine cannot do.
"""Options of ``lors-cuda finetune``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from .._checks import GRADIENTS, LAYOUTS
from .._distributed import launched
from .._draws import ROUNDINGS
from ..adapter_directory import read_adapter
from ..config import LoRSConfig
from ..methods import METHODS, Method, get_method
from ..quantization import REMAINDERS
from ._common import (
    add_adapter,
    add_data,
    add_force,
    add_model,
    add_targets,
    non_negative_int,
    pattern_entry,
    positive_float,
    positive_int,
    seed_number,
    target_config,
)

_REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
# What an adapter brings that training starts from, and what it is without one. Where "left out" and "the default, asked
# for" differ, argparse has no default.
_OF_ADAPTER = {
    "rank": 16,
    "alpha": 16.0,
    "use_rslora": False,
    "gradient": "lors",
    "layout": "auto",
    "rounding": "nearest",
    "requantize": False,
    "remainder": None,
}
_NOT_BESIDE_ADAPTER = (
    "target_modules", "target_parameters", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save",
    "init",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model(parser)
    add_data(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where adapter, log and plot go")
    add_adapter(parser, "start from this one: its weights, rank, alpha and modules")
    add_force(parser)
    parser.add_argument("--rank", type=positive_int, help="rank r of the adapters; 16 if left out")
    parser.add_argument("--alpha", type=positive_float, help="lora_alpha, 16 if left out; the scaling is alpha / rank")
    parser.add_argument("--use-rslora", action="store_true", default=None, help="scale by alpha / sqrt(rank)")
    add_targets(parser)
    parser.add_argument(
        "--rank-pattern", type=pattern_entry(positive_int), nargs="+", metavar="NAME=RANK",
        help="other ranks, by the end of a module's name, of experts a parameter's (a regular expression)",
    )  # fmt: skip
    parser.add_argument(
        "--alpha-pattern", type=pattern_entry(positive_float), nargs="+", metavar="NAME=ALPHA", help="other alphas"
    )
    parser.add_argument("--modules-to-save", nargs="+", metavar="NAME", help="name suffixes of what is trained whole")
    parser.add_argument("--gradient", choices=GRADIENTS, help="how adapter gradients are computed; lors if left out")
    parser.add_argument("--layout", choices=LAYOUTS, help="how the sparse weights are stored; auto if left out")
    parser.add_argument(
        "--rounding", choices=ROUNDINGS,
        help="of 16-bit merged weights, in training and when the adapter is merged; nearest if left out",
    )  # fmt: skip
    parser.add_argument(
        "--requantize", action="store_true", default=None,
        help="of a quantized --model: round merged weights to its codes, also in training, so that merge --format "
        "quantized loses nothing",
    )  # fmt: skip
    parser.add_argument(
        "--remainder", choices=REMAINDERS,
        help="what stands for the weight between two codes, with --requantize; dither for int4, none for 8 bits if "
        "left out; stored is of a model made by quantize --remainder stored",
    )  # fmt: skip
    parser.add_argument(
        "--method", default="lors", metavar="NAME",
        help=f"how the adapters are trained: {', '.join(METHODS)}; NAME+NAME combines them",
    )  # fmt: skip
    parser.add_argument(
        "--method-option", type=method_option, nargs="+", default=[], metavar="OPTION=VALUE",
        help=f"of the method ({_options_text()})",
    )  # fmt: skip
    parser.add_argument(
        "--init",
        choices=("gradient", "default"),
        help="how the adapters start; gradient if left out, where the method has no start of its own",
    )
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
    parser.add_argument(
        "--packing",
        action="store_true",
        help="put as many examples into a sequence as fit; each attends to itself only",
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
    existing.add_argument(
        "--resume", action="store_true", help="go on from the output's last complete checkpoint, also for more --steps"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run that is in the output")
    parser.set_defaults(begun=False)


def method_option(text: str) -> tuple[str, Any]:
    """The type of ``--method-option``'s values: numbers and null as JSON writes them, else a word."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not OPTION=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _options_text() -> str:
    """Every method's options with their defaults."""
    described = []
    for name, kind in METHODS.items():
        options = [f"{field.name}={json.dumps(field.default)}" for field in dataclasses.fields(kind)]
        if options:
            described.append(f"{name}: {', '.join(options)}")
    return "; ".join(described)


def chosen_method(args: argparse.Namespace) -> Method:
    """What ``--method`` and ``--method-option`` describe.

    Raises:
        ValueError: there is no such method, or it has no such option.
    """
    return get_method(args.method, **dict(args.method_option))


def configuration(args: argparse.Namespace) -> LoRSConfig:
    """What is adapted and how, from the options or from the adapter to start with; fills in what was left out.

    Raises:
        ValueError: an option says otherwise than the adapter.
    """
    own = _OF_ADAPTER
    if args.adapter is not None:
        config = read_adapter(args.adapter).config
        own = {name: getattr(config, {"rank": "r", "alpha": "lora_alpha"}.get(name, name)) for name in _OF_ADAPTER}
        for name in (*_OF_ADAPTER, *_NOT_BESIDE_ADAPTER):
            value = getattr(args, name)
            if value not in (None, own.get(name)):
                option = f"--{name.replace('_', '-')}"
                has = f"has {own[name]}" if name in own else "has its own"
                raise ValueError(
                    f"{option} was given, and the adapter in '{args.adapter}', from which training starts, {has}. "
                    f"Leave {option} out, or start without --adapter."
                )
    method = chosen_method(args)
    if args.adapter is None:
        own = {**own, "gradient": method.gradient}
    elif method.places():
        raise ValueError(
            f"--method {args.method} makes its own adapters, and --adapter starts from others. Leave one of them out."
        )
    elif args.method_option:
        raise ValueError("--method-option was given, and the method has no options.")
    for name, value in own.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if method.has_own_start and args.init == "gradient":
        raise ValueError(
            f"--init gradient was given, and the method '{method.name}' draws its own start. Leave it out."
        )
    args.init = args.init or (
        "adapter" if args.adapter is not None else "default" if method.has_own_start else "gradient"
    )
    if args.adapter is not None:
        return config
    return target_config(
        args,
        r=args.rank,
        lora_alpha=args.alpha,
        layout=args.layout,
        gradient=args.gradient,
        rounding=args.rounding,
        rounding_seed=args.seed,
        requantize=args.requantize,
        remainder=args.remainder,
        dither_seed=args.seed,
        use_rslora=args.use_rslora,
        rank_pattern=dict(args.rank_pattern or ()),
        alpha_pattern=dict(args.alpha_pattern or ()),
        modules_to_save=args.modules_to_save,
    )


def check_options(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse what this machine or these packages cannot do, before anything is loaded."""
    if args.warmup_steps is not None and args.warmup_steps > args.steps:
        raise ValueError(f"--warmup-steps is {args.warmup_steps}; it must be between 0 and --steps, {args.steps}.")
    if device.index and not launched():
        raise ValueError(
            f"--device is '{args.device}', but the Trainer takes the first GPU it sees; start the command with "
            f"CUDA_VISIBLE_DEVICES={device.index} and --device cuda."
        )
    if args.fsdp and (chosen_method(args).places() or args.rounding != "nearest"):
        raise ValueError(
            "--fsdp was given with --method or --rounding stochastic, and the state of such a run is not saved from a "
            "sharded model by the Trainer. Leave --fsdp out: under torchrun the processes then train by "
            "DistributedDataParallel."
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
