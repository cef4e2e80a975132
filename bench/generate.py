# SPDX-License-Identifier: Apache-2.0
"""model.generate of a 2:4 Llama, greedy, batch 1: `bench/model.py --generate`.

The time of a call has both parts of generation: the prompt in one forward, then one token at a time with a KV cache.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import llama
import lors_cuda
import report
from protocol import AGAIN, measure, minor_faults

BASELINE = "dense"
PROMPT, NEW = 32, 64  # tokens
GOAL = 1.0  # of the dense model's tokens per second, with the adapter under merge_cache


@dataclass(frozen=True)
class Runner:
    """How a model with an adapter is run. `layout` None: the pruned model alone, without one."""

    layout: str | None
    note: str
    cached: bool = False
    merged: bool = False


RUNNERS = {
    "dense": Runner(None, "the pruned model in transformers, nn.Linear with zeros"),
    "merged": Runner("2:4", "merge_and_unload: the same with the adapter merged in", merged=True),
    "lors_cuda": Runner("dense", "a live adapter, dense weights"),
    "lors_cuda_24": Runner("2:4", "a live adapter, 2:4 weights"),
    "lors_cuda_bitmap": Runner("bitmap", "a live adapter, bitmap weights"),
    "lors_cuda_cached": Runner("dense", "a live adapter under merge_cache, dense weights", cached=True),
    "lors_cuda_24_cached": Runner("2:4", "a live adapter under merge_cache, 2:4 weights", cached=True),
    "lors_cuda_bitmap_cached": Runner("bitmap", "a live adapter under merge_cache, bitmap weights", cached=True),
}


def made(runner: Runner, base: nn.Module, rank: int, open_blocks: contextlib.ExitStack) -> Any:
    """The model, its cache switched on until `open_blocks` ends."""
    if runner.layout is None:
        return llama.shared_copy(base).eval()
    model = llama.with_adapters(base, rank, runner.layout).eval()
    if runner.merged:
        return lors_cuda.merge_and_unload(model)
    if runner.cached:
        open_blocks.enter_context(lors_cuda.merge_cache(model))
    return model


def generation(model: Any, prompt: Tensor, new: int) -> Callable[[], Tensor]:
    """A call that gives the new tokens."""

    @torch.inference_mode()
    def run() -> Tensor:
        whole: Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False
        )
        return whole[0, prompt.shape[1] :]

    return run


def bench_case(base: nn.Module, common: dict[str, Any], protocol: Any) -> list[dict[str, Any]]:
    vocabulary = base.config.vocab_size
    prompt = torch.randint(vocabulary, (1, common["prompt"]), generator=torch.Generator().manual_seed(3))
    prefix = f"{common['model']} {common['dtype']} "
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as open_blocks:
        cases = {}
        for name, runner in RUNNERS.items():
            report.progress(f"{prefix}making {name}")
            model = made(runner, base, common["rank"], open_blocks)
            cases[name] = generation(model, prompt, common["new_tokens"])
            rows[name] = {**common, "peer": name, "note": runner.note, "baseline": BASELINE, "failed": None}
            rows[name]["model_bytes"] = llama.held_bytes(model)
        texts = {name: run() for name, run in cases.items()}
        timings = measure(cases, protocol, baseline=BASELINE, progress=lambda text: report.progress(prefix + text))
        report.progress("")
        for name, run in cases.items():
            # Where two tokens are about equally likely, the order of summation may decide, and all later ones differ.
            rows[name]["tokens_as_merged"] = int((texts[name] == texts["merged"]).cumprod(0).sum())
            rows[name]["page_faults"] = minor_faults(run)
    rows[BASELINE + AGAIN] = {**rows[BASELINE], "peer": BASELINE + AGAIN, "note": "the baseline again: the noise"}
    for name, timing in timings.items():
        rows[name].update(timing.row())
        rows[name]["tokens_per_second"] = common["new_tokens"] / rows[name]["seconds"]["median"]
    return list(rows.values())


def print_case(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"\n{first['model']}, {first['dtype']}: generate, batch 1, prompt of {first['prompt']} tokens, "
        f"{first['new_tokens']} new ones"
    )
    lines = [
        [
            row["peer"],
            f"{row['tokens_per_second']:.1f}",
            report.times(row["ratio"]),
            report.verdict(GOAL if row["peer"] == "lors_cuda_24_cached" else None, row["ratio"]),
            str(row["rounds"]),
            str(row["tokens_as_merged"]),
            report.megabytes(row["model_bytes"]),
            str(row["page_faults"]),
        ]
        for row in rows
    ]
    header = ["model", "tokens/s", f"x {BASELINE} [p20, p80]", "goal", "rounds", "first tokens as merged", "model MB"]
    print(report.table([*header, "page faults"], lines))


def bench(arguments: argparse.Namespace, save: Callable[[Sequence[dict[str, Any]]], None]) -> None:
    shapes = llama.QUICK_SHAPES if arguments.quick else {name: llama.SHAPES[name] for name in arguments.models}
    prompt, new = (4, 6) if arguments.quick else (PROMPT, NEW)
    for model, shape in shapes.items():
        report.progress(f"{model}: making and pruning")
        base = llama.pruned_llama(shape, arguments.seed)
        for dtype in arguments.dtype:
            base = base.to(report.DTYPES[dtype])
            common = {
                "benchmark": "generate",
                "model": model,
                "shape": dataclasses.asdict(shape),
                "parameters": sum(parameter.numel() for parameter in base.parameters()),
                "device": "cpu",
                "dtype": dtype,
                "prompt": prompt,
                "new_tokens": new,
                "tokens": 1,
                "rank": arguments.rank,
                "pattern": "2:4",
            }
            rows = bench_case(base, common, report.protocol_from(arguments))
            print_case(rows)
            save(rows)
