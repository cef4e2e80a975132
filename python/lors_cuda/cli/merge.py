# SPDX-License-Identifier: Apache-2.0
"""``lors-cuda merge``: a sparse model with its adapter merged in, every zero kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._draws import ROUNDINGS
from .._files import new_directory
from ..checkpoint import load_adapter
from ..compressed_tensors.checkpoint import SAVE_FORMATS
from ..compressed_tensors.files import stored_quantization
from ..compressed_tensors.kept import QUANTIZED, to_plain_linears
from ..compressed_tensors.quantized_files import quantized_files
from ..config import LoRSConfig
from ..formats import unpack_mask
from ..model import merge_and_unload, named_lors_layers
from ..sparsity import measure_sparsity
from . import UsageError
from ._common import (
    add_adapter,
    add_force,
    add_model,
    add_targets,
    layer_weight,
    load_model,
    say,
    seed_number,
    sparsity_table,
    target_config,
)
from ._model_files import check_new, save_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model(parser)
    add_adapter(parser, "what finetune wrote", required=True)
    add_force(parser)
    add_targets(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the merged model goes")
    parser.add_argument(
        "--rounding", choices=ROUNDINGS,
        help="of 16-bit weights, with the seed that the adapter was saved with; left out: as it was trained",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed_number, help="another seed for stochastic rounding")
    parser.add_argument(
        "--format",
        choices=SAVE_FORMATS,
        default="dense",
        help="how the weights are stored; dense loads everywhere, quantized as --model was",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in the output")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Merge, verify every layer's mask, and write the result at once or not at all."""
    check_new(args.output, [args.model, args.adapter], overwrite=args.overwrite)
    model = load_model(args.model, args.device, any_architecture=True, mask_from=args.mask_from)
    before = measure_sparsity(model, target_config(args))
    load_adapter(model, args.adapter, strict_mask=args.strict_mask, strict_values=args.strict_values)
    # One bit per weight: a copy of the weights would be as large as the model.
    masks = {name: layer.sparse_weight.packed_mask() for name, layer in named_lors_layers(model)}
    config: LoRSConfig = vars(model)["lors_config"]
    rounding = args.rounding or config.rounding
    seed = None if rounding == "nearest" else config.rounding_seed if args.seed is None else args.seed
    codes = args.format == QUANTIZED
    if codes and (args.rounding is not None or args.seed is not None):
        raise UsageError("--rounding and --seed are of plain weights; codes are what the adapter was trained with")
    if not codes:
        merge_and_unload(model, rounding=args.rounding, seed=args.seed)
        to_plain_linears(model)
    rounded = 0 if codes else _verify(model, masks)
    after = measure_sparsity(model, target_config(args))
    with new_directory(args.output, replace=args.overwrite) as directory:
        save_model(model, args.model, directory, args.format)
        if codes:
            rounded = _verify_codes(directory, masks)
    say(args, sparsity_table(after))
    also = f" {rounded} kept weights are rounded to zero." if rounded else ""
    say(
        args,
        f"Mask unchanged in all {len(masks)} merged layers: zeros in all weights of the model "
        f"{before.model_sparsity:.4%} before, {after.model_sparsity:.4%} after.{also} Sparsity {after}. "
        f"Saved in '{args.output}'.",
    )
    return {
        "output": str(args.output),
        "format": args.format,
        "merged_layers": len(masks),
        "mask_unchanged": True,
        "sparsity_before": before.sparsity,
        "model_sparsity_before": before.model_sparsity,
        **after.to_dict(),
        "kept_rounded_to_zero": rounded,
        "rounding": rounding,
        "rounding_seed": seed,
    }


def _verify(model: nn.Module, masks: dict[str, Tensor]) -> int:
    """Check that every weight off its mask is exactly zero; returns how many on it are zero.

    Raises:
        RuntimeError: a zero was lost (the layer is named); nothing has been written yet.
    """
    rounded = 0
    for name, bits in masks.items():
        rounded += _rounded(name, layer_weight(model, name) != 0, bits)
    return rounded


def _verify_codes(directory: Path, masks: dict[str, Tensor]) -> int:
    """The same of the codes that were written."""
    quantization = stored_quantization(directory)
    assert quantization is not None
    with quantized_files(directory, quantization) as files:
        return sum(
            _rounded(name, weight.nonzero(), masks[name])
            for name, weight in ((stored.name.removesuffix(".weight"), stored.weight) for stored in files)
            if name in masks
        )


def _rounded(name: str, nonzero: Tensor, bits: Tensor) -> int:
    """How many weights on the mask are 0; a weight off it that is not is an error."""
    mask = unpack_mask(bits.to(nonzero.device), nonzero.shape[1])
    lost = int((nonzero & ~mask).sum())
    if lost:
        raise RuntimeError(f"Merging '{name}' turned {lost} zeros into other values; nothing was written.")
    return int((mask & ~nonzero).sum())
