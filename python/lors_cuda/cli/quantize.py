# SPDX-License-Identifier: Apache-2.0
"""``lors-cuda quantize``: a sparse model's linears as codes with scales, every zero kept."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from .._checks import listed
from .._files import new_directory
from ..compressed_tensors.files import stored_quantization
from ..compressed_tensors.kept import QUANTIZED, SCHEMES, quantize_linears
from ..sparsity import EXPERTS, measure_sparsity
from ._common import add_model, add_targets, load_model, say, sparsity_table, target_config
from ._model_files import check_new, save_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the quantized model goes")
    parser.add_argument(
        "--scheme", choices=tuple(SCHEMES), required=True,
        help="bits, and the columns that share a scale (g128, ...; else a row); rounded to nearest, symmetric",
    )  # fmt: skip
    parser.add_argument(
        "--remainder", choices=("stored",),
        help="keep what int4 drops, as int8 codes, for `lors-cuda finetune --requantize --remainder stored`; what is "
        "merged is int4",
    )  # fmt: skip
    add_targets(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in the output")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Round the weights to codes, and write the result at once or not at all."""
    check_new(args.output, [args.model], overwrite=args.overwrite)
    if (args.model / "config.json").is_file() and stored_quantization(args.model) is not None:
        raise ValueError(
            f"The model in '{args.model}' is quantized already; name the sparse one that it was made from."
        )
    model = load_model(args.model, args.device, any_architecture=True, mask_from=args.mask_from)
    before = measure_sparsity(model, target_config(args))
    linears = [layer.name for layer in before if layer.kind != EXPERTS]
    names = [name for name in linears if type(model.get_submodule(name)) is nn.Linear]
    quantize_linears(model, args.scheme, names, remainder=args.remainder is not None)
    with new_directory(args.output, replace=args.overwrite) as directory:
        save_model(model, args.model, directory, QUANTIZED)
    stored = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    experts = [layer.name for layer in before.experts]
    if experts:
        warnings.warn(
            f"Not quantized: the experts {listed(experts)}. Only linears are; experts stay as they are.",
            UserWarning,
            stacklevel=2,
        )
    kept = f"{args.scheme} with its remainder" if args.remainder else args.scheme
    say(args, sparsity_table(before))
    say(
        args,
        f"{len(names)} linears are {kept}: {stored:,} bytes of weights. Sparsity {before}. Saved in '{args.output}'.",
    )
    return {"output": str(args.output), "scheme": args.scheme, "bytes": stored, **before.to_dict()}
