# SPDX-License-Identifier: Apache-2.0
"""``lors-cuda prune``: a sparse checkpoint (dense safetensors with exact zeros) of a dense model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._files import new_directory
from ..pruning import METHODS, SparsityPattern, prune
from . import UsageError
from ._common import (
    add_data,
    add_model,
    add_targets,
    describe_data,
    load_dataset,
    load_model,
    positive_int,
    say,
    sparsity_table,
    target_config,
)
from ._model_files import check_new, save_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the sparse model goes")
    parser.add_argument(
        "--pattern", type=_pattern, default="2:4", help="2:4 (2 of 4 kept; any N:M), or the zeros: 50%% or 0.5"
    )
    parser.add_argument("--method", choices=METHODS, default="wanda", help="how weights are scored")
    add_targets(parser)
    add_data(parser, required=False)
    parser.add_argument(
        "--calibration-batches", type=positive_int, default=16, metavar="N", help="batches of --data for wanda"
    )
    parser.add_argument("--seed", type=int, default=0, help="which sequences calibrate")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in the output")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, calibrate, prune, and write the result at once or not at all."""
    if args.method == "wanda" and args.data is None:
        raise UsageError("--method wanda needs calibration text: give --data FILE, or use --method magnitude")
    check_new(args.output, [args.model], overwrite=args.overwrite)
    model = load_model(args.model, args.device, any_architecture=True, quantized="dequantize", mask_from=args.mask_from)
    batches = None
    if args.method == "wanda":
        data = load_dataset(args, model)
        batches = data.shuffled_batches(args.batch_size, args.calibration_batches, args.seed)
        used = sum(int(batch["attention_mask"].sum()) for batch in batches)
        say(args, f"Calibration: {describe_data(data)}; {len(batches)} batches with {used} tokens are used.")
    config = target_config(args)
    sparsity = prune(model, args.pattern, method=args.method, batches=batches, config=config, progress=not args.json)
    with new_directory(args.output, replace=args.overwrite) as directory:
        save_model(model, args.model, directory)
    say(args, sparsity_table(sparsity))
    say(args, f"Sparsity {sparsity}. Saved in '{args.output}'.")
    return {
        "output": str(args.output),
        "method": args.method,
        "pattern": str(args.pattern),
        **sparsity.to_dict(),
    }


def _pattern(text: str) -> str:
    try:
        SparsityPattern.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
