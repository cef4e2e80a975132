# SPDX-License-Identifier: Apache-2.0
"""What rounding the merged weight costs: perplexity after training and merging, to nearest and by chance.

    python bench/rounding.py --model DIR --output FILE.json

DIR holds a dense causal language model and its tokenizer. It is pruned to 2:4 by Wanda, converted to bfloat16, and a
LoRS adapter is trained on the language reference inside CPython, at each rate with each rounding: "nearest",
"stochastic" with the step's draws, and "fixed", one draw for all steps and the merge. Each adapter is then merged to
nearest, by chance with several seeds, and without rounding (in float32), and evaluated on held-out topics.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lors_cuda import LoRSConfig, get_lors_model, merge_and_unload, named_lors_layers
from lors_cuda.cli._demo_text import language_reference, split_topics
from lors_cuda.gradient_init import estimate_gradients, init_from_gradients
from lors_cuda.methods import Method
from lors_cuda.pruning import prune


def perplexity(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=row, labels=row).loss.item() for row in rows.split(4)]
    return float(torch.tensor(losses).mean().exp())


def trained(sparse: nn.Module, rounding: str, rate: float, rows: Tensor, args: argparse.Namespace) -> nn.Module:
    """A converted model after ``args.steps`` steps; the same start and batches for all."""
    model = copy.deepcopy(sparse)
    config = LoRSConfig(
        r=args.rank, lora_alpha=args.rank, rounding="nearest" if rounding == "nearest" else "stochastic"
    )
    first = [{"input_ids": rows[:4], "labels": rows[:4]}]
    gradients = estimate_gradients(model, first, steps=1, config=config)
    torch.manual_seed(0)
    init_from_gradients(get_lors_model(model, config), gradients)
    run = Method().start(model, steps=args.steps) if rounding == "stochastic" else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    if run is not None:
        run.attach(optimizer)
    model.train()
    for step in range(args.steps):
        batch = rows[4 * step : 4 * step + 4]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if run is not None:
        run.finish()
    return model


def results(model: nn.Module, rows: Tensor, seeds: int) -> dict[str, Any]:
    """Perplexity of each way to merge, and how many kept weights have other bits than before."""
    before = {name: layer.sparse_weight.to_dense() for name, layer in named_lors_layers(model)}
    found: dict[str, Any] = {}
    for way in ("nearest", *range(seeds)):
        merged = copy.deepcopy(model)
        merged = (
            merge_and_unload(merged, rounding="nearest")
            if way == "nearest"
            else merge_and_unload(merged, rounding="stochastic", seed=way)
        )
        kept = sum(int((w != 0).sum()) for w in before.values())
        moved = sum(int((merged.get_submodule(name).weight != w).sum()) for name, w in before.items())
        found[f"merged {way}"] = perplexity(merged, rows)
        found[f"changed {way}"] = moved / kept
    wide = copy.deepcopy(model).float()
    found["merged without rounding"] = perplexity(merge_and_unload(wide, rounding="nearest"), rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=16, help="sequences")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 1e-3])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begun = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = split_topics(language_reference(), 8 * args.tokens * args.held_out)
    train, held_out = (
        torch.tensor(tokenizer(part)["input_ids"][: args.tokens * count]).view(-1, args.tokens)
        for part, count in ((text.train, 4 * args.steps), (text.held_out, args.held_out))
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    record: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, **vars(args)}
    record["dense"] = perplexity(model, held_out)
    prune(model, "2:4", method="wanda", batches=[{"input_ids": row} for row in train.split(4)])
    sparse = model.to(torch.bfloat16)
    record["sparse"] = perplexity(sparse, held_out)
    for rate in args.rates:
        for rounding in ("nearest", "stochastic", "fixed"):
            adapted = trained(sparse, rounding, rate, train, args)
            row = results(adapted, held_out, args.seeds)
            record[f"rate {rate}, trained {rounding}"] = row
            print(f"{time.monotonic() - begun:5.0f} s  rate {rate}  trained {rounding}: {row}", flush=True)
            args.output.write_text(json.dumps(record, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
