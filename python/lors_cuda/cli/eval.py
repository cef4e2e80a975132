# SPDX-License-Identifier: Apache-2.0
"""``lors-cuda eval``: perplexity of a model on a text, with and without an adapter."""

from __future__ import annotations

import argparse
from typing import Any

from ..checkpoint import load_adapter
from ..evaluation import evaluate
from ..sparsity import measure_sparsity
from ._common import (
    add_adapter,
    add_data,
    add_model,
    add_targets,
    describe_data,
    load_dataset,
    load_model,
    say,
    target_config,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model(parser)
    add_adapter(parser, "adapter to measure as well")
    add_targets(parser)
    add_data(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the model, and the model with the adapter if one is given."""
    model = load_model(args.model, args.device, mask_from=args.mask_from)
    sparsity = measure_sparsity(model, target_config(args))
    data = load_dataset(args, model)
    say(args, f"Data: {describe_data(data)}. Sparsity {sparsity}.")
    options = {"batch_size": args.batch_size, "progress": not args.json}
    result: dict[str, Any] = {"tokens": data.loss_tokens, **sparsity.to_dict()}
    if args.adapter is None:
        measured = evaluate(model, data, **options)
        say(args, f"Perplexity {measured.perplexity:.4f}")
        return {**result, "loss": measured.loss, "perplexity": measured.perplexity}
    without = evaluate(model, data, **options)  # before it: modules_to_save are part of the adapter
    load_adapter(model, args.adapter, strict_mask=args.strict_mask)
    measured = evaluate(model, data, **options)
    say(args, f"Perplexity {without.perplexity:.4f} without the adapter, {measured.perplexity:.4f} with it")
    return {
        **result,
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "loss_without_adapter": without.loss,
        "perplexity_without_adapter": without.perplexity,
    }
