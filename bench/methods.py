#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Every adapter method on the demo's 2:4 model: held-out perplexity over seeds, a step's time and memory, each claim.

python bench/methods.py --workers 2 --output methods.json   makes the demo's model, trains, then measures the steps
python bench/methods.py --demo DIR ...                      on the model that `lors-cuda demo --output DIR` has left
python bench/methods.py --search                            one seed at half, once and twice each row's learning rate
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import report
from lors_cuda import LoRSConfig, get_lors_model, merge_and_unload, named_lors_layers
from lors_cuda._batches import running
from lors_cuda.cli import _trainer, demo
from lors_cuda.cli._common import load_model
from lors_cuda.cli._demo_peers import AutogradMasking, _peak_bytes, replace_layers
from lors_cuda.data import TokenDataset, load_data
from lors_cuda.evaluation import evaluate
from lors_cuda.gradient_init import estimate_gradients
from lors_cuda.methods import METHODS, Method, Run, get_method
from lors_cuda.pruning import prune
from protocol import AGAIN, Protocol, measure

BASELINE = "LoRS, r = 16"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row: what is trained, and how.

    ``lr`` is the best of three on one seed, each twice the one before (--search).
    """

    name: str
    lr: float
    method: str = "lors"
    rank: int = 16
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str = ""  # "badly scaled": lora_A / 16; "reversed": GeLoRA's ranks in the other order of blocks

    def make(self) -> Method:
        return get_method(self.method, **self.options)


# lora_alpha is twice the rank everywhere. Ours, not the authors': 100 steps are few.
ENTRIES = (
    Entry(BASELINE, 4e-3),
    Entry("LoRS, r = 8", 8e-3, rank=8),
    Entry("LoRS, r = 2", 8e-3, rank=2),
    Entry("LoRS, r = 1", 1.6e-2, rank=1),
    Entry("SP-LoRA, r = 16", 4e-3, "sp-lora"),
    Entry("GeLoRA, twice its ranks", 8e-3, "gelora", options={"multiplier": 2.0, "points": 500}),
    Entry("GeLoRA, ranks reversed", 8e-3, "gelora", options={"multiplier": 2.0, "points": 500}, start="reversed"),
    Entry("SoRA, from r = 16", 8e-3, "sora", options={"threshold": 5e-3, "gate_start": "ones"}),
    Entry("RM-LoRA, r = 16", 4e-3, "rm-lora"),
    Entry("LoRA-Mini, a = b = 32", 1.6e-2, "lora-mini"),
    Entry("LoRA-Mini, gradient start", 8e-3, "lora-mini", options={"aux": "gradient"}),
    Entry("MoRA, as r = 2", 4e-3, "mora", rank=2),
    Entry("MoRA rotation, as r = 2", 1.6e-2, "mora", rank=2, options={"type": "rotation"}),
    Entry("XGBLoRA, 25 steps each", 1.6e-2, "xgblora"),
    Entry("GeoLoRA, from r = 4", 6e-3, "geolora", rank=4, options={"cycle": 20, "basis_lr": 0.1, "max_rank": 16}),
    Entry("GeoLoRA, from r = 16", 6e-3, "geolora", options={"cycle": 20, "basis_lr": 0.1, "max_rank": 16}),
    Entry("LoRA-RITE, r = 16", 2e-3, "lora-rite"),
    Entry("LoRA-RITE, badly scaled", 2e-3, "lora-rite", start="badly scaled"),
    Entry("LoRS, badly scaled", 4e-3, start="badly scaled"),
    Entry("Flat-LoRA, r = 16", 4e-3, "flat-lora"),
    Entry("SHERL, one late block", 6e-3, "sherl"),
)


def available() -> list[Entry]:
    """The rows whose methods exist here and have what they need."""
    found = []
    for entry in ENTRIES:
        try:
            entry.make()
            if entry.method == "lora-rite":
                import pytorch_optimizer  # noqa: F401
        except (ValueError, ImportError) as error:
            print(f"{entry.name} is left out: {error}", file=sys.stderr)
            continue
        found.append(entry)
    return found


# ---- the demo's model and text ----


@dataclasses.dataclass(frozen=True)
class Place:
    """A demo's directory and its options."""

    directory: Path
    length: int
    batch_size: int

    def data(self, name: str) -> TokenDataset:
        from transformers import ByT5Tokenizer

        return load_data(self.directory / name, ByT5Tokenizer(), self.length)

    def model(self) -> nn.Module:
        return load_model(self.directory / "sparse", "cpu")


def make_demo(directory: Path, quick: bool) -> Place:
    """What the demo makes before it fine-tunes: text, a dense model, and that pruned."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    small = ["--dense-steps", "2", "--hidden-size", "48", "--sequence-length", "64", "--batch-size", "2"]
    options = parser.parse_args(small if quick else [])
    options.json = True
    made = demo._Demo(options, directory)
    tokenizer = made.prepare_text()
    model = made.train_dense()
    prune(model, "2:4", method="wanda", batches=made.data.shuffled_batches(options.batch_size, 8, options.seed))
    made.save(model, "sparse", tokenizer)
    return Place(directory, options.sequence_length, options.batch_size)


# ---- one training ----


def prepared(entry: Entry, place: Place, data: TokenDataset, seed: int, steps: int) -> tuple[nn.Module, Run]:
    """A converted model and its run."""
    model, method = place.model(), entry.make()
    config = LoRSConfig(r=entry.rank, lora_alpha=2 * entry.rank, gradient=method.gradient)
    batches = data.shuffled_batches(place.batch_size, None, 0)
    gradients = None
    if method.needs_gradients:
        gradients = estimate_gradients(model, batches[:8], config=config, progress=False)
    config = method.configure(config, model, batches)
    if entry.start == "reversed":
        ranks, alphas = config.rank_pattern, config.alpha_pattern
        config.rank_pattern = dict(zip(ranks, reversed(list(ranks.values())), strict=True))
        config.alpha_pattern = dict(zip(alphas, reversed(list(alphas.values())), strict=True))
    torch.manual_seed(seed)
    get_lors_model(model, config)
    if entry.start == "badly scaled":
        with torch.no_grad():
            for _, layer in named_lors_layers(model):
                layer.lora_A /= 16
    return model, method.start(model, steps=steps, seed=seed, gradients=gradients)


def train(job: tuple[Entry, Place, int, int, int, float]) -> dict[str, Any]:
    """Train one row on one seed; what is known of the result, without times."""
    entry, place, seed, steps, threads, lr = job
    torch.set_num_threads(threads)
    data, held_out = place.data("train.txt"), place.data("heldout.txt")
    model, run = prepared(entry, place, data, seed, steps)
    masks = {name: layer.sparse_weight.mask() for name, layer in named_lors_layers(model)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as directory, running(model, training=True):
        arguments = _trainer.arguments(
            Path(directory), steps=steps, batch_size=place.batch_size, lr=lr, seed=seed + 1,
            device=torch.device("cpu"), save_strategy="no", max_grad_norm=0.0 if run.method.clips else 1.0,
        )  # fmt: skip
        _trainer.CommandTrainer(model, arguments, data, optimizer=run.optimizer(lr)).train()
    run.finish()
    found = {
        "perplexity": evaluate(model, held_out, progress=False).perplexity,
        "trained": trained,
        **_updates(model),
    }
    if entry.method != "sherl":
        merge_and_unload(model)
    found["zeros_lost"] = sum(_lost(model.get_submodule(name), mask) for name, mask in masks.items())
    return found


def _lost(layer: Any, mask: Tensor) -> int:
    weight = layer.merged_dense() if hasattr(layer, "merged_dense") else layer.weight
    return int((weight[~mask] != 0).sum())


@torch.no_grad()
def _updates(model: nn.Module) -> dict[str, float]:
    """Means over the layers: rank of the stored pair, and effective rank (exp of the singular values' entropy)."""
    ranks, effective = [], []
    for _, layer in named_lors_layers(model):
        ranks.append(layer.r)
        inner = torch.linalg.qr(layer.lora_B).R @ torch.linalg.qr(layer.lora_A.T).R.T
        share = torch.linalg.svdvals(inner.double())
        share = share[share > 0] / share.sum()
        effective.append(float(torch.exp(-(share * share.log()).sum())))
    return {"rank": statistics.fmean(ranks), "effective_rank": statistics.fmean(effective)}


# ---- a step's time and memory ----


def stepper(entry: Entry, place: Place, data: TokenDataset) -> tuple[nn.Module, Callable[[], None], dict[str, Any]]:
    """A model, a training step of it, and the batch."""
    model, run = prepared(entry, place, data, 0, 1000)
    batch = data.shuffled_batches(place.batch_size, 1, 0)[0]
    optimizer = run.optimizer(1e-4)
    model.train()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step, batch


# ---- what each paper claims ----


def claims(rows: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, float, bool]]:
    """(row, the claim's measure, its value, whether the claim shows here)."""

    def perplexity(name: str) -> float:
        return statistics.fmean(rows[name]["perplexity"])

    if BASELINE not in rows:
        return
    lors = perplexity(BASELINE)
    sparse = rows[BASELINE]["sparse_perplexity"]
    repaired = {name: (sparse - perplexity(name)) / (sparse - lors) for name in rows}

    def ratio(name: str, field: str, other: str = BASELINE) -> float:
        return statistics.fmean(rows[name][field]) / statistics.fmean(rows[other][field])

    def below(name: str, other: str, what: str) -> tuple[str, float, float, int]:
        """A lower perplexity than another row's, by more than either varies with the seed."""
        spread = max(statistics.stdev(rows[n]["perplexity"]) if len(rows[n]["perplexity"]) > 1 else 0.0
                     for n in (name, other))  # fmt: skip
        bound = 1 - spread / perplexity(other)
        return f"perplexity over {what}, below {bound:.3f}", perplexity(name) / perplexity(other), bound, -1

    def scaled(name: str) -> float:
        return abs(perplexity(f"{name}, badly scaled") - perplexity(f"{name}, r = 16"))

    def spread(name: str) -> float:
        starts = abs(perplexity(name) - perplexity("GeoLoRA, from r = 16"))
        return starts / abs(perplexity("LoRS, r = 2") - lors)

    def repair(name: str) -> tuple[str, float, float, int]:
        return "share of LoRS's repair, at least 0.8", repaired[name], 0.8, 1

    every: dict[str, Callable[[str], tuple[str, float, float, int]]] = {
        "SP-LoRA, r = 16": lambda n: ("memory over masking by autograd, at most 0.6", rows[n]["of_autograd"], 0.6, -1),
        "GeLoRA, twice its ranks": lambda n: below(n, "GeLoRA, ranks reversed", "that of the ranks reversed"),
        "SoRA, from r = 16": lambda n: below(n, "LoRS, r = 8", "LoRS with r = 8"),
        "RM-LoRA, r = 16": lambda n: ("effective rank over LoRS's, at least 1.1", ratio(n, "effective_rank"), 1.1, 1),
        "LoRA-Mini, a = b = 32": repair,
        "LoRA-Mini, gradient start": repair,
        "MoRA, as r = 2": lambda n: below(n, "LoRS, r = 2", "LoRS with r = 2"),
        "MoRA rotation, as r = 2": lambda n: below(n, "LoRS, r = 2", "LoRS with r = 2"),
        "XGBLoRA, 25 steps each": lambda n: below(n, "LoRS, r = 1", "LoRS with r = 1"),
        "GeoLoRA, from r = 4": lambda n: ("distance to r = 16 over LoRS's from r = 2, at most 0.5", spread(n), 0.5, -1),
        "LoRA-RITE, r = 16": lambda n: (
            "change under a badly scaled start, over LoRS's, at most 0.1",
            scaled("LoRA-RITE") / scaled("LoRS"),
            0.1,
            -1,
        ),
        "Flat-LoRA, r = 16": lambda n: ("perplexity over LoRS's, at most 1.005", perplexity(n) / lors, 1.005, -1),
        "SHERL, one late block": lambda n: ("memory over LoRS's, at most 0.5", ratio(n, "peak"), 0.5, -1),
    }
    for name, claim in every.items():
        try:
            measure, value, bound, sign = claim(name)
        except KeyError:  # a row that it compares with was not run
            continue
        yield name, measure, value, sign * (value - bound) > 0


# ---- the table, on the terminal and in the documentation ----

HEADER = ("", "lr", "trained", "perplexity", "ms a step", "peak MB", "rank", "effective rank", "zeros lost", "claim")


def cells(row: dict[str, Any]) -> list[str]:
    found = row["perplexity"]
    spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    claim = ""
    if row.get("claim"):
        claim = f"{row['claim']}: {row['value']:.3f}, {'shows' if row['shows'] else 'does not show'}"
    return [
        row["peer"],
        f"{row['lr']:g}",
        f"{row['trained']:,}",
        f"{statistics.fmean(found):.3f}{spread}",
        f"{1e3 * row['seconds']['median']:.0f}" if "seconds" in row else "-",
        f"{statistics.fmean(row['peak']) / 1e6:.1f}" if "peak" in row else "-",
        f"{statistics.fmean(row['rank']):.1f}",
        f"{statistics.fmean(row['effective_rank']):.1f}",
        str(sum(row["zeros_lost"])),
        claim,
    ]


def markdown(document: dict[str, Any]) -> list[str]:
    """The lines of one run for the documentation."""
    rows, protocol = document["rows"], document["protocol"]
    lines = [[*HEADER], ["---"] + ["---:"] * (len(HEADER) - 2) + ["---"], *map(cells, rows)]
    return [
        f"{protocol['steps']} steps, {protocol['seeds']} seeds. The sparse model has perplexity "
        f"{rows[0]['sparse_perplexity']:.3f}.",
        "",
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
        f"{report.describe(document['environment'])}.",
    ]


# ---- the command ----


def train_all(jobs: Sequence[tuple[Entry, Place, int, int, int, float]], workers: int) -> list[dict[str, Any]]:
    """In the jobs' order; in several processes the results are the same."""
    found = []
    if workers == 1:
        results: Any = map(train, jobs)
    else:
        pool = multiprocessing.get_context("spawn").Pool(workers)
        results = pool.imap(train, jobs)
    for job, result in zip(jobs, results, strict=True):
        found.append(result)
        report.progress(f"{len(found)}/{len(jobs)} {job[0].name}, seed {job[2]}: {result['perplexity']:.3f}")
    report.progress("")
    if workers > 1:
        pool.close()
        pool.join()
    return found


def search(entries: Sequence[Entry], place: Place, arguments: argparse.Namespace) -> None:
    rates = [(entry, entry.lr * factor) for entry in entries for factor in (0.5, 1.0, 2.0)]
    jobs = [(entry, place, 0, arguments.steps, arguments.job_threads, lr) for entry, lr in rates]
    for (entry, lr), result in zip(rates, train_all(jobs, arguments.workers), strict=True):
        print(f"{entry.name:28} lr {lr:<9g} {result['perplexity']:.3f}", flush=True)


def measure_steps(rows: dict[str, dict[str, Any]], entries: Sequence[Entry], place: Place, protocol: Protocol) -> None:
    """Adds times and memory, one step of all methods after the other in every round."""
    data = place.data("train.txt")
    cases: dict[str, Callable[[], object]] = {}
    for entry in entries:
        model, step, batch = stepper(entry, place, data)
        step()
        rows[entry.name]["peak"] = [_peak_bytes(model, batch)]
        if entry.method == "sp-lora":
            twin, _ = prepared(entry, place, data, 0, 1)
            replace_layers(twin, AutogradMasking)
            rows[entry.name]["of_autograd"] = rows[entry.name]["peak"][0] / _peak_bytes(twin, batch)
        cases[entry.name] = step
    baseline = BASELINE if BASELINE in cases else next(iter(cases))
    for name, timing in measure(cases, protocol, baseline=baseline, progress=report.progress).items():
        if not name.endswith(AGAIN):
            rows[name] |= timing.row()
    report.progress("")


def run(arguments: argparse.Namespace, place: Place) -> None:
    entries = [entry for entry in available() if not arguments.methods or entry.method in arguments.methods]
    if arguments.search:
        search(entries, place, arguments)
        return
    where = report.environment()
    print(report.describe(where), flush=True)
    sparse = evaluate(place.model(), place.data("heldout.txt"), progress=False).perplexity
    jobs = [
        (entry, place, seed, arguments.steps, arguments.job_threads, entry.lr)
        for entry in entries
        for seed in range(arguments.seeds)
    ]
    results = train_all(jobs, arguments.workers)
    rows: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        own = results[number * arguments.seeds : (number + 1) * arguments.seeds]
        rows[entry.name] = {
            "benchmark": "methods",
            "peer": entry.name,
            "method": entry.make().fields(),
            "start": entry.start,
            "lr": entry.lr,
            "r": entry.rank,
            "trained": own[0]["trained"],
            "sparse_perplexity": sparse,
            **{key: [each[key] for each in own] for key in ("perplexity", "rank", "effective_rank", "zeros_lost")},
            "failed": None,
        }
    if not arguments.no_times:
        few = Protocol(rounds=7, warmups=1, budget_seconds=4.0, seed=arguments.seed)
        measure_steps(rows, entries, place, Protocol.quick() if arguments.quick else few)
    for name, claim, value, shows in claims(rows):
        if math.isfinite(value):
            rows[name] |= {"claim": claim, "value": value, "shows": shows}
    print(f"The sparse model: {sparse:.3f}. {arguments.steps} steps, {arguments.seeds} seeds.")
    print(report.table(list(HEADER), [cells(row) for row in rows.values()]))
    if arguments.output:
        protocol = {"steps": arguments.steps, "seeds": arguments.seeds, "workers": arguments.workers}
        report.write_json(arguments.output, list(rows.values()), where, protocol)
        print(f"\n{len(rows)} rows in {arguments.output}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/methods.py")
    parser.add_argument("--demo", type=Path, metavar="DIR", help="a demo's output, with the default options")
    parser.add_argument("--steps", type=report.positive, default=100)
    parser.add_argument("--seeds", type=report.positive, default=3)
    parser.add_argument("--workers", type=report.positive, default=1, help="processes that train, of one thread each")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="these alone")
    parser.add_argument("--search", action="store_true", help="try learning rates, on one seed")
    parser.add_argument("--no-times", action="store_true", help="do not measure steps, on a busy machine")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, measures nothing")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the measured steps")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.seeds = min(arguments.steps, 4), 1
    arguments.job_threads = 1 if arguments.workers > 1 else torch.get_num_threads()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.demo:
        run(arguments, Place(arguments.demo, 128, 8))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        run(arguments, make_demo(Path(directory), arguments.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
