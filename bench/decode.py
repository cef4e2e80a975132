#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Forward alone, of few tokens, as in generation: each layout with a live adapter, in a merge cache, and without one.

python bench/decode.py --output decode.json        4096 x 4096, r = 16, 1/8/64 tokens
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import report
from peers import make_problem
from protocol import AGAIN, CPU, Protocol, last_level_cache_bytes, measure, relative_error

BASELINE = "torch_dense"
LAYOUTS = ("dense", "2:4", "bitmap")
STATES = {
    "live": "the adapter is merged in every call",
    "cached": "inside lors_cuda.merge_cache",
    "frozen": "without an adapter: SparseLinear, or a disabled adapter",
}


def cases_of(
    weights: Sequence[Tensor], input: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """By peer: the call, and the weight [N, K] in float64 that its first result belongs to."""
    import lors_cuda
    from lors_cuda._merged_weight import MergedWeight
    from lors_cuda.functional import sparse_linear

    base = weights[0].double()
    merged = base + scaling * (base != 0) * (lora_B.double() @ lora_A.double())

    def turns(call: Callable[[Any], Tensor], operands: Sequence[Any]) -> Callable[[], Tensor]:
        cycle = itertools.cycle(operands)
        return lambda: call(next(cycle))

    cases = {BASELINE: (turns(lambda weight: F.linear(input, weight), weights), base)}
    for layout in LAYOUTS:
        stored = [lors_cuda.SparseWeight.from_dense(weight, layout) for weight in weights]
        caches = [(weight, MergedWeight()) for weight in stored]

        def live(weight: Any, cache: Any = None) -> Tensor:
            return lors_cuda.lors_linear(input, weight, lora_A, lora_B, scaling, cache=cache)

        cases[f"live_{layout}"] = turns(live, stored), merged
        cases[f"cached_{layout}"] = turns(lambda operand: live(*operand), caches), merged
        cases[f"frozen_{layout}"] = turns(lambda weight: sparse_linear(input, weight), stored), base
    return cases


@torch.inference_mode()
def bench_case(tokens: int, shape: tuple[int, int], rank: int, dtype: str, protocol: Protocol) -> list[dict[str, Any]]:
    with torch.inference_mode(False):  # a cache refuses tensors whose changes torch does not count
        problem = make_problem(tokens, shape, rank, report.DTYPES[dtype], seed=protocol.seed)
        # In a model a layer's weight was last read a token ago: take turns over copies that no cache holds.
        copies = max(2, -(-3 * last_level_cache_bytes() // problem.weight.nbytes))
        weights = [problem.weight.clone() for _ in range(copies)]
        input, lora_A, lora_B = problem.input.detach(), problem.lora_A.detach(), problem.lora_B.detach()
        cases = cases_of(weights, input, lora_A, lora_B, problem.scaling)
    rows: dict[str, dict[str, Any]] = {}
    for name, (call, weight) in cases.items():
        state, _, layout = name.partition("_")
        rows[name] = {
            "benchmark": "decode",
            "device": "cpu",
            "peer": name,
            "note": STATES.get(state, "F.linear with the dense weight, without an adapter"),
            "baseline": BASELINE,
            "failed": None,
            "dtype": dtype,
            "tokens": tokens,
            "out_features": shape[0],
            "in_features": shape[1],
            "rank": rank,
            "pattern": "2:4",
            "layout": layout,
            "rotated_weights": copies,
            "error": {"output": relative_error(call(), input.double() @ weight.T)},
        }
    timings = measure(
        {name: call for name, (call, _) in cases.items()},
        protocol,
        baseline=BASELINE,
        progress=lambda text: report.progress(f"{dtype} T={tokens} {text}"),
    )
    report.progress("")
    rows[BASELINE + AGAIN] = {**rows[BASELINE], "peer": BASELINE + AGAIN, "note": "the baseline again: the noise"}
    for name, timing in timings.items():
        rows[name].update(timing.row())
    return list(rows.values())


def print_case(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"\nforward, {first['dtype']}, {first['tokens']} tokens, {first['out_features']} x {first['in_features']}")
    header = ["peer", "ms [p20, p80]", f"x {BASELINE} [p20, p80]", "rounds", "faults", "error"]
    lines = [
        [
            row["peer"],
            report.milliseconds(row["seconds"]),
            report.times(row["ratio"]),
            str(row["rounds"]),
            report.page_faults(row),
            f"{row['error']['output']:.1e}",
        ]
        for row in rows
    ]
    print(report.table(header, lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/decode.py")
    report.add_common_arguments(parser)
    parser.add_argument("--tokens", nargs="+", type=report.positive)
    parser.add_argument("--rank", type=report.positive, default=16)
    arguments = parser.parse_args(argv)
    if arguments.device != CPU or arguments.density is not None:
        parser.error("bench/decode.py measures 2:4 weights on the CPU; leave --device and --density out")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape = tuple(arguments.shape or ((64, 96) if arguments.quick else (4096, 4096)))
    protocol = report.protocol_from(arguments)
    where = report.environment()
    print(report.describe(where))
    before = report.rows_before(arguments)
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtype or ["float32", "bfloat16"]:
        for tokens in arguments.tokens or ([1, 2] if arguments.quick else [1, 8, 64]):
            case = bench_case(tokens, shape, arguments.rank, dtype, protocol)
            print_case(case)
            rows += case
            if arguments.output:
                report.write_json(arguments.output, rows, where, dataclasses.asdict(protocol), before)
    if arguments.output:
        print(f"\n{len(rows)} rows in {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
