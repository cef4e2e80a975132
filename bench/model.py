#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Whole models: a training step of a 2:4 Llama by each method; generation; the memory of larger ones, counted.

python bench/model.py --output model.json          a step (forward, backward, AdamW): time, peak memory, page faults
python bench/model.py --device cuda                the same on a GPU
python bench/model.py --generate                   tokens per second of model.generate with a live adapter, and without
python bench/model.py --memory                     the memory of Llama-3-8B and 70B from shapes alone: nothing is run
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import counted
import generate
import llama
import report
from protocol import AGAIN, CPU, measure, minor_faults, peak_bytes, resident_bytes

BASELINE = "peft_lora"  # what a user would run otherwise
PLAIN = tuple(llama.METHODS)
PREFETCHED = ("lors_cuda_prefetch", "lors_cuda_24_prefetch")  # on CUDA
VARIED = ("official_gc", "peft_lora_gc", "lors_cuda_24_gc", "peft_lora_compiled", "lors_cuda_24_compiled")
TIME_GOAL = 1.0  # at least the speed of PEFT's LoRA at 512 tokens and more
MEMORY_GOAL = 0.7  # of the authors' formula's peak, with 2:4 storage


def memory(path: str, name: str, rank: int, batch: tuple[int, int], vocabulary: int, threads: int) -> dict[str, Any]:
    """What a method holds and how far a step goes beyond it; run in a process that has done nothing else."""
    torch.set_num_threads(threads)
    before = resident_bytes()
    base = torch.load(path, weights_only=False)
    model = llama.make(name, base, rank)
    del base
    trainer = llama.Trainer(model, vocabulary, *batch)
    trainer.step()  # makes the optimizer's state
    trainer.step()
    gc.collect()
    faults = minor_faults(trainer.step)
    sizes: dict[str, Any] = {"model": llama.held_bytes(model), "optimizer": trainer.state_bytes()}
    held = resident_bytes(trim=True)
    sizes |= peak_bytes(trainer.step, trainer.device)
    sizes["total"] = sizes["model"] + sizes["optimizer"] + sizes["peak"]
    known = None not in (before, held, sizes["peak_resident"])
    sizes["total_resident"] = held - before + sizes["peak_resident"] if known else None
    return {"bytes": sizes, "page_faults": faults}


def bench_case(
    base: nn.Module, names: Sequence[str], common: dict[str, Any], arguments: argparse.Namespace, memory_too: bool
) -> list[dict[str, Any]]:
    """The rows of one model, dtype and batch. A method that fails keeps its row, with the reason in `failed`."""
    prefix = f"{common['model']} {common['dtype']} {common['batch']} x {common['length']} "
    batch = common["batch"], common["length"]
    rows: dict[str, dict[str, Any]] = {}
    trainers: dict[str, llama.Trainer] = {}

    def attempt(name: str, what: str, call: Any) -> Any:
        report.progress(f"{prefix}{what} {name}")
        try:
            return call()
        except Exception as found:  # a missing compiler, say: the other methods must still be measured
            rows[name]["failed"] = f"{type(found).__name__}: {str(found).strip().splitlines()[0][:300]}"
            return None

    for name in names:
        rows[name] = {**common, "peer": name, "note": llama.note(name), "baseline": BASELINE, "failed": None}

    if memory_too:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["llama"])
        with tempfile.TemporaryDirectory() as directory:
            path = str(Path(directory) / "model.pt")
            torch.save(base, path)
            for name in names:
                call = (path, name, common["rank"], batch, base.config.vocab_size, torch.get_num_threads())
                # One process at a time, and a new one for each.
                with context.Pool(1) as pool:
                    found = attempt(name, "memory of", lambda p=pool, c=call: p.apply(memory, c))
                rows[name].update(found or {})

    for name in names:
        if rows[name]["failed"]:
            continue
        model = attempt(name, "making", lambda n=name: llama.make(n, base, common["rank"]))
        if model is None:
            continue
        trainer = llama.Trainer(model, base.config.vocab_size, *batch)
        losses = attempt(name, "first steps of", lambda t=trainer: [float(t.step()) for _ in range(2)])
        if losses is None:
            continue
        rows[name]["loss"] = losses
        if any(loss != loss for loss in losses):
            rows[name]["failed"] = "the loss is not a number"
            continue
        trainers[name] = trainer
    if BASELINE not in trainers:
        raise SystemExit(f"the baseline failed: {rows[BASELINE]['failed']}")

    cases = {name: trainer.step for name, trainer in trainers.items()}
    timings = measure(
        cases,
        report.protocol_from(arguments),
        baseline=BASELINE,
        device=arguments.device,
        progress=lambda text: report.progress(prefix + text),
    )
    report.progress("")
    rows[BASELINE + AGAIN] = {**rows[BASELINE], "peer": BASELINE + AGAIN, "note": "the baseline again: the noise"}
    for name, timing in timings.items():
        rows[name].update(timing.row())
    official = rows.get("official", {}).get("bytes")
    for row in rows.values():
        if official and "bytes" in row:
            row["bytes"]["of_official"] = row["bytes"]["total"] / official["total"]
    return list(rows.values())


def print_case(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"\n{first['model']}, {first['dtype']}, {first['batch']} x {first['length']} tokens, r = {first['rank']}, "
        f"{first['parameters'] / 1e6:.0f} M parameters: forward + backward + AdamW"
    )
    lines = []
    for row in rows:
        if row["failed"]:
            continue
        ours = row["peer"] in PLAIN and row["peer"].startswith("lors_cuda")
        sizes = row.get("bytes", {})
        share = sizes.get("of_official")
        goal = ours and row["peer"] == "lors_cuda_24" and share is not None
        verdict = f"<= {MEMORY_GOAL:g} {'met' if share <= MEMORY_GOAL else 'missed'}" if goal else ""
        lines.append(
            [
                row["peer"],
                report.milliseconds(row["seconds"]),
                report.times(row["ratio"]),
                report.verdict(TIME_GOAL if ours and row["tokens"] >= 512 else None, row["ratio"]),
                str(row["rounds"]),
                f"{row['loss'][0]:.4f} {row['loss'][1]:.4f}",
                *(report.megabytes(sizes.get(key)) for key in ("model", "peak", "total", "total_resident")),
                "-" if share is None else f"{share:.2f}",
                verdict,
                str(row.get("page_faults", "-")),
            ]
        )
    header = ["method", "ms [p20, p80]", f"x {BASELINE} [p20, p80]", "goal", "rounds", "first losses", "model MB"]
    header += ["step MB", "total MB", "resident MB", "of official", "goal", "page faults"]
    print(report.table(header, lines))
    for row in rows:
        if row["failed"]:
            print(f"{row['peer']} failed: {row['failed']}")


def bench(arguments: argparse.Namespace, save: Any) -> None:
    shapes = llama.QUICK_SHAPES if arguments.quick else {name: llama.SHAPES[name] for name in arguments.models}
    for model, shape in shapes.items():
        report.progress(f"{model}: making and pruning")
        base = llama.pruned_llama(shape, arguments.seed)
        for dtype in arguments.dtype:
            base = base.to(arguments.device, report.DTYPES[dtype])
            for index, (batch, length) in enumerate(arguments.tokens):
                varied = VARIED if arguments.device == CPU else VARIED + PREFETCHED
                wanted = arguments.methods or (PLAIN + varied if index == 0 else PLAIN)
                names = [name for name in dict.fromkeys((BASELINE, *wanted)) if dtype != "float32" or usable(name)]
                common = {
                    "benchmark": "model",
                    "model": model,
                    "shape": dataclasses.asdict(shape),
                    "parameters": sum(parameter.numel() for parameter in base.parameters()),
                    "device": arguments.device.type,
                    "dtype": dtype,
                    "batch": batch,
                    "length": length,
                    "tokens": batch * length,
                    "rank": arguments.rank,
                    "pattern": "2:4",
                }
                rows = bench_case(base, names, common, arguments, index == 0 and not arguments.no_memory)
                print_case(rows)
                save(rows)


def usable(name: str) -> bool:
    """Whether a method is one of its own in float32."""
    return not llama.METHODS[llama.split(name)[0]].only_16_bit


def batch_shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return report.positive(batch), report.positive(length)


def method(text: str) -> str:
    if llama.split(text)[0] not in llama.METHODS:
        suffixes = ", ".join(filter(None, llama.VARIANTS))
        raise argparse.ArgumentTypeError(
            f"{text} is no method; give one of {', '.join(llama.METHODS)}, alone or with one of {suffixes} behind it"
        )
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/model.py")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--generate", action="store_true", help="tokens per second of generation, instead of steps")
    parts.add_argument("--memory", action="store_true", help="count the memory of large models, instead of steps")
    report.add_run_arguments(parser, rounds=5, budget=6.0)
    report.add_device_argument(parser)
    parser.add_argument("--models", nargs="+", choices=list(llama.SHAPES), default=list(llama.SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rank", type=report.positive, default=16)
    parser.add_argument(
        "--tokens", nargs="+", type=batch_shape, metavar="BxT", help="batch and length; default: 1x512 4x128"
    )
    parser.add_argument("--methods", nargs="+", type=method, help=f"the baseline, {BASELINE}, always runs")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    arguments = parser.parse_args(argv)
    if arguments.device != CPU and (arguments.generate or arguments.memory):
        parser.error("--device cuda goes with training steps alone; leave out --generate and --memory, or --device")
    arguments.tokens = arguments.tokens or ([(1, 8), (2, 4)] if arguments.quick else [(1, 512), (4, 128)])
    if arguments.quick:
        arguments.rank = min(arguments.rank, 4)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = report.environment(arguments.device)
    print(report.describe(where))
    before = report.rows_before(arguments)
    rows: list[dict[str, Any]] = []

    def save(found: Sequence[dict[str, Any]]) -> None:  # after every case: a long run must survive an interrupt
        rows.extend(found)
        if arguments.output:
            protocol = dataclasses.asdict(report.protocol_from(arguments))
            report.write_json(arguments.output, rows, where, protocol, before)

    if arguments.memory:
        save(counted.rows(arguments.rank))
        counted.print_rows(rows)
    elif arguments.generate:
        generate.bench(arguments, save)
    else:
        bench(arguments, save)
    if arguments.output:
        print(f"\n{len(rows)} rows in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
