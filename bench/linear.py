#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Forward + backward of one sparse linear with a live adapter, against its peers; `--merge` adds merge.py's rows.

python bench/linear.py --output linear.json        the numbers of performance: 2048 x 2048, r = 16, 128/512/2048 tokens
python bench/linear.py --device cuda               on a GPU: 4096 x 4096, bfloat16, 512/2048/8192 tokens
python bench/linear.py --host                      64 x 64, 8 tokens: what Python and the dispatcher take per layer
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

import merge
import report
from peers import (
    DEFAULT_PEERS,
    PEERS,
    LinearFunction,
    Peer,
    Problem,
    forward_backward,
    make_problem,
    stored_tensors,
    truth,
)
from protocol import (
    AGAIN,
    CPU,
    last_level_cache_bytes,
    measure,
    peak_bytes,
    poisoned_memory,
    relative_error,
    saved_bytes,
    summary,
)

BASELINE = "official"
HOST_PEERS = ["official", "peft_lora", "lors_cuda", "lors_cuda_layer"]
# (peer, other peer, how many times its time at most) where only the host's time counts.
HOST_TARGETS = (
    ("lors_cuda", "official", 1.35),
    ("lors_cuda", "peft_lora", 1.6),
    ("lors_cuda_layer", "lors_cuda", 1.1),
)


def errors(peer: Peer, function: LinearFunction, problem: Problem) -> dict[str, float]:
    """Relative L2 error of the output and of each gradient against the peer's own formula in float64."""
    if peer.compiled:
        # Deterministic mode is part of what code is compiled for: poisoning would measure other code than is timed.
        results = forward_backward(function, problem)
    else:
        with poisoned_memory():
            results = forward_backward(function, problem)
    expected = truth(peer.formula, problem)
    missing = expected.keys() - results.keys()
    if missing:
        raise RuntimeError(f"no {', '.join(sorted(missing))} came back")
    return {name: relative_error(results[name], expected[name]) for name in expected}


def memory(function: LinearFunction, problem: Problem) -> dict[str, int | None]:
    """Bytes of the stored weight, bytes kept for backward, and the peaks of one forward + backward."""
    stored = stored_tensors(function, problem.weight)
    output, sizes = saved_bytes(
        lambda: function(*problem.arguments()), [problem.input, *stored, problem.lora_A, problem.lora_B]
    )
    del output
    sizes = {"weight": sum(t.nbytes for t in stored), **sizes}

    return {**sizes, **peak_bytes(lambda: forward_backward(function, problem), problem.weight.device)}


def gemm_flop(tokens: int, shape: tuple[int, int]) -> int:
    """The work no peer can avoid: Y = X Wᵀ and dX = dY W."""
    return 2 * 2 * tokens * shape[0] * shape[1]


def bench_case(problem: Problem, names: Sequence[str], protocol: Any, common: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one dtype and token count. A peer that fails keeps its row, with the reason in `failed`."""
    rows: dict[str, dict[str, Any]] = {}
    functions: dict[str, LinearFunction] = {}
    made = {name: PEERS[name].make() for name in names}
    for name in names:
        peer = PEERS[name]
        row = {**common, "peer": name, "formula": peer.formula, "note": peer.note, "baseline": BASELINE, "failed": None}
        rows[name] = row
        report.progress(f"{common['dtype']} T={common['tokens']} checking {name}")
        try:
            row["error"] = errors(peer, made[name], problem)
            row["bytes"] = memory(made[name], problem)
        except Exception as problem_found:  # a missing compiler, say: the other peers must still be measured
            row["failed"] = f"{type(problem_found).__name__}: {str(problem_found).strip().splitlines()[0][:300]}"
            continue
        if any(value != value for value in row["error"].values()):
            row["failed"] = "a result is not a number"
            continue
        functions[name] = made[name]
    if BASELINE not in functions:
        raise SystemExit(f"the baseline failed: {rows[BASELINE]['failed']}")

    # A GPU's L2 holds a whole weight. In training it was last used a model ago: take turns over copies of everything.
    device = problem.weight.device
    copies = 1 if device == CPU else -(-3 * last_level_cache_bytes(device) // problem.bytes())
    problems = [problem] + [problem.copy() for _ in range(copies - 1)]
    cases = {}
    for name, function in functions.items():
        turns = itertools.cycle(problems)
        cases[name] = lambda f=function, t=turns: forward_backward(f, next(t))
    prefix = f"{common['dtype']} T={common['tokens']} "
    timings = measure(
        cases, protocol, baseline=BASELINE, device=device, progress=lambda text: report.progress(prefix + text)
    )
    report.progress("")
    rows[BASELINE + AGAIN] = {**rows[BASELINE], "peer": BASELINE + AGAIN, "note": "the baseline again: the noise"}
    for name, timing in timings.items():
        rows[name].update(timing.row(), rotated_problems=copies)
        rows[name]["gflop_per_second"] = rows[name]["gemm_flop"] / rows[name]["seconds"]["median"] / 1e9
    return list(rows.values())


def target(row: dict[str, Any]) -> float | None:
    cuda = row["device"] == "cuda"
    shape = report.CUDA_TARGET_SHAPE if cuda else report.TARGET_SHAPE
    on_target = (row["out_features"], row["in_features"]) == shape and row["rank"] == report.TARGET_RANK
    if row["peer"] != "lors_cuda" or not on_target:
        return None
    targets = report.CUDA_LINEAR_TARGETS if cuda else report.LINEAR_TARGETS
    return targets.get((row["dtype"], row["tokens"]))


def print_case(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"\n{first['dtype']}, {first['tokens']} tokens, {first['out_features']} x {first['in_features']}, "
        f"r = {first['rank']}, density {first['density']:g}: forward + backward"
    )
    lines, failures = [], []
    for row in rows:
        if row["failed"]:
            failures.append(f"{row['peer']} failed: {row['failed']}")
            continue
        gradients = [value for name, value in row["error"].items() if name != "output"]
        sizes = row["bytes"]
        lines.append(
            [
                row["peer"],
                report.milliseconds(row["seconds"]),
                report.times(row["ratio"]),
                report.verdict(target(row), row["ratio"]),
                str(row["rounds"]),
                report.page_faults(row),
                f"{row['error']['output']:.1e}",
                f"{max(gradients):.1e}",
                report.megabytes(sizes["weight"]),
                report.megabytes(sizes["saved"]),
                report.megabytes(sizes["saved_beyond_arguments"]),
                report.megabytes(sizes["peak"]),
                report.megabytes(sizes["peak_resident"]),
            ]
        )
    header = [
        "peer",
        "ms [p20, p80]",
        f"x {BASELINE} [p20, p80]",
        "target",
        "rounds",
        "faults",
        "error Y",
        "error grads",
    ]
    header += ["weight MB", "saved MB", "of it new", "peak MB", "resident MB"]
    print(report.table(header, lines))
    for failure in failures:
        print(failure)


def print_host(rows: Sequence[dict[str, Any]]) -> None:
    """The times of two peers over each other, round by round."""
    seconds = {row["peer"]: row["raw_seconds"] for row in rows if not row["failed"]}
    for peer, other, most in HOST_TARGETS:
        if peer in seconds and other in seconds:
            ratios = summary([own / reference for own, reference in zip(seconds[peer], seconds[other], strict=False)])
            verdict = "met" if ratios and ratios["median"] <= most else "missed"
            print(f"{peer} takes {report.times(ratios)} x {other}: <= {most:g} {verdict}")


def choose_peers(requested: Sequence[str] | None, max_autotune: bool) -> list[str]:
    """The peers to run, the baseline first. A missing lors_cuda is an error only where it was asked for by name."""
    names = list(requested or DEFAULT_PEERS)
    if max_autotune and "compiled_max_autotune" not in names:
        names.append("compiled_max_autotune")
    names = [BASELINE, *(name for name in dict.fromkeys(names) if name != BASELINE)]
    if any(name.startswith("lors_cuda") for name in names) and not report.have_lors_cuda():
        if requested:
            raise SystemExit("lors_cuda was asked for by name and cannot be imported")
        names = [name for name in names if not name.startswith("lors_cuda")]
    return names


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/linear.py")
    report.add_common_arguments(parser)
    parser.add_argument("--tokens", nargs="+", type=report.positive)
    parser.add_argument("--rank", type=report.positive, default=16)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help=f"the baseline, {BASELINE}, always runs")
    parser.add_argument(
        "--max-autotune", action="store_true", help="also torch.compile with max-autotune (slow to compile)"
    )
    parser.add_argument("--merge", action="store_true", help="also the merge alone")
    parser.add_argument("--host", action="store_true", help="a layer so small that only the host's time counts")
    arguments = parser.parse_args(argv)
    if arguments.host:
        arguments.shape, arguments.tokens = arguments.shape or (64, 64), arguments.tokens or [8]
        arguments.dtype, arguments.peers = arguments.dtype or ["float32"], arguments.peers or HOST_PEERS
    cuda = arguments.device.type == "cuda"
    shape, tokens = (report.CUDA_TARGET_SHAPE, [512, 2048, 8192]) if cuda else (report.TARGET_SHAPE, [128, 512, 2048])
    arguments.shape = tuple(arguments.shape or ((64, 96) if arguments.quick else shape))
    arguments.tokens = arguments.tokens or ([8, 32] if arguments.quick else tokens)
    arguments.dtype = arguments.dtype or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    if arguments.rank > min(arguments.shape):
        parser.error(f"--rank {arguments.rank} is larger than the smaller side of --shape")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    names = choose_peers(arguments.peers, arguments.max_autotune)
    protocol = report.protocol_from(arguments)
    where = report.environment(arguments.device)
    print(report.describe(where))
    before = report.rows_before(arguments)
    rows: list[dict[str, Any]] = []

    def save() -> None:  # after every case: an hour of measurement must survive an interrupt
        if arguments.output:
            report.write_json(arguments.output, rows, where, dataclasses.asdict(protocol), before)

    on_cpu = arguments.device == CPU  # matmuls in 16 bits are slow on some processors, on no GPU
    for dtype in arguments.dtype:
        for tokens in arguments.tokens:
            problem = make_problem(
                tokens,
                arguments.shape,
                arguments.rank,
                report.DTYPES[dtype],
                density=arguments.density,
                seed=arguments.seed,
                device=arguments.device,
            )
            common = {
                "benchmark": "host" if arguments.host else "linear",
                "device": arguments.device.type,
                "dtype": dtype,
                "tokens": tokens,
                "out_features": arguments.shape[0],
                "in_features": arguments.shape[1],
                "rank": arguments.rank,
                "density": 0.5 if arguments.density is None else arguments.density,
                "pattern": "2:4" if arguments.density is None else "random",
                "gemm_flop": gemm_flop(tokens, arguments.shape),
            }
            random = arguments.density is not None
            wanted = [name for name in names if not PEERS[name].only_16_bit or (dtype != "float32" and on_cpu)]
            wanted = [name for name in wanted if not (PEERS[name].only_sparse24 and random)]
            case = bench_case(problem, wanted, protocol, common)
            print_case(case)
            if arguments.host:
                print_host(case)
            rows += case
            save()
    if arguments.merge:
        ranks = [arguments.rank] if arguments.quick else sorted({arguments.rank, *report.MERGE_TARGETS})
        rows += merge.bench(
            arguments.shape,
            ranks,
            arguments.dtype,
            protocol,
            density=arguments.density,
            seed=arguments.seed,
            warm=arguments.quick,  # a small weight is cold among hundreds of thousands of copies only
            device=arguments.device,
        )
        save()
    note = report.target_note(where)
    if note and any(row["benchmark"] == "merge" or target(row) for row in rows):
        print(f"\n{note}")
    if arguments.output:
        print(f"\n{len(rows)} rows in {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
