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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import report
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


def results(model: nn.Module, rows: Tensor, seeds: int) -> dict[str, dict[str, float]]:
    """Perplexity of each way to merge, and the share of the kept weights that get other bits by it."""
    before = {name: layer.sparse_weight.to_dense() for name, layer in named_lors_layers(model)}
    kept = sum(int((w != 0).sum()) for w in before.values())
    ways: dict[str, dict[str, Any]] = {"nearest": {"rounding": "nearest"}}
    ways |= {f"seed {seed}": {"rounding": "stochastic", "seed": seed} for seed in range(seeds)}
    found: dict[str, dict[str, float]] = {"perplexity": {}, "changed": {}}
    for way, options in ways.items():
        merged = merge_and_unload(copy.deepcopy(model), **options)
        moved = sum(int((merged.get_submodule(name).weight != w).sum()) for name, w in before.items())
        found["perplexity"][way] = perplexity(merged, rows)
        found["changed"][way] = moved / kept
    wide = copy.deepcopy(model).float()
    found["perplexity"]["not rounded"] = perplexity(merge_and_unload(wide, rounding="nearest"), rows)
    return found


def cells(row: dict[str, Any]) -> list[str]:
    found, changed = row["perplexity"], row["changed"]
    chances = [way for way in found if way.startswith("seed")]
    return [
        f"{row['lr']:g}",
        row["trained"],
        f"{found['nearest']:.2f}",
        ", ".join(f"{found[way]:.2f}" for way in chances),
        f"{found['not rounded']:.2f}",
        f"{changed['nearest']:.1%}, {changed[chances[0]]:.1%}",
    ]


HEADER = ("lr", "trained", "merged to nearest", "by chance", "not rounded", "other bits: to nearest, by chance")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/rounding.py")
    parser.add_argument("--model", type=Path, required=True, help="its folder's name stands in the record")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--rank", type=report.positive, default=16)
    parser.add_argument("--steps", type=report.positive, default=12)
    parser.add_argument("--tokens", type=report.positive, default=256, help="of a sequence")
    parser.add_argument("--held-out", type=report.positive, default=16, help="sequences")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 1e-3])
    parser.add_argument("--seeds", type=report.positive, default=3, help="of the final merge")
    args = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = report.environment()
    print(report.describe(where), flush=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = split_topics(language_reference(), 8 * args.tokens * args.held_out)
    train, held_out = (
        torch.tensor(tokenizer(part)["input_ids"][: args.tokens * count]).view(-1, args.tokens)
        for part, count in ((text.train, 4 * args.steps), (text.held_out, args.held_out))
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    dense = perplexity(model, held_out)
    prune(model, "2:4", method="wanda", batches=[{"input_ids": row} for row in train.split(4)])
    sparse = model.to(torch.bfloat16)
    common = {
        "benchmark": "rounding",
        "model": args.model.resolve().name,
        "dtype": "bfloat16",
        "pattern": "2:4",
        "rank": args.rank,
        "dense_perplexity": dense,
        "sparse_perplexity": perplexity(sparse, held_out),
        "failed": None,
    }
    protocol = {name: getattr(args, name) for name in ("steps", "tokens", "held_out", "seeds")}
    rows: list[dict[str, Any]] = []
    for rate in args.rates:
        for rounding in ("nearest", "stochastic", "fixed"):
            adapted = trained(sparse, rounding, rate, train, args)
            found = results(adapted, held_out, args.seeds)
            rows.append({**common, "peer": f"lr {rate:g}, {rounding}", "lr": rate, "trained": rounding, **found})
            print("; ".join(f"{name}: {cell}" for name, cell in zip(HEADER, cells(rows[-1]), strict=True)), flush=True)
            if args.output:
                report.write_json(args.output, rows, where, protocol)
    print(f"Dense {dense:.2f}, sparse {common['sparse_perplexity']:.2f}.")
    print(report.table(HEADER, [cells(row) for row in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
