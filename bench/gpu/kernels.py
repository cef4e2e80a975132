#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Each operator against what torch alone would do, and against a floor measured in the same run.

python bench/gpu/kernels.py --device cuda --output kernels.json     the linears of a Llama-3-8B layer, r = 16, bfloat16
python bench/gpu/kernels.py --quick                                 small, on the CPU: shows that it runs
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report
from lors_cuda import SparseWeight, reference
from lors_cuda.formats import pack_mask
from peers import Problem, make_problem, official_merge
from protocol import Protocol, call_seconds, last_level_cache_bytes, measure, poisoned_memory, relative_error

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # q and o; k and v; gate and up; down
TOKENS = (512, 2048, 8192)
GROUPS = ("merge", "lors", "exact", "forward", "input_gradient")
LAYOUTS = ("dense", "mask", "2:4", "bitmap")
FORWARD24 = "forward24"  # a 2:4 weight on the sparse tensor cores (docs/sparse-products.md); only where it is asked for
PEER = "torch"
lors = torch.ops.lors


@dataclasses.dataclass(frozen=True)
class Group:
    """One operator and its peers. Every function takes a problem; `expected` is the operator's result in float64."""

    ours: Callable[[Any], Any]  # takes a Stored
    peer: Callable[[Problem], Any]
    peer_note: str
    expected: Callable[[Problem], Sequence[Tensor]]
    bytes: int  # each operand read or written once
    flop: int
    extra: dict[str, Callable[[Problem], Any]] = dataclasses.field(default_factory=dict)


class Stored(Problem):
    """Its weight as the operators take it, made before anything is timed: (values, mask, index)."""

    operands: tuple[Tensor, Tensor | None, Tensor | None]
    layout: str

    @classmethod
    def of(cls, problem: Problem, layout: str) -> Stored:
        made = cls(**{field.name: getattr(problem, field.name) for field in dataclasses.fields(Problem)})
        made.layout = layout
        weight = problem.weight.detach()
        if layout == "dense":
            made.operands = weight, None, None
        elif layout == "mask":
            made.operands = weight, pack_mask(weight != 0), None
        else:
            stored = SparseWeight.from_dense(weight, layout)
            made.operands = stored.values, stored.mask_bits, stored.index
        return made

    def copy(self) -> Stored:
        plain = Problem(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Problem)})
        return self.of(plain.copy(), self.layout)

    def weight_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.operands if t is not None)


@contextlib.contextmanager
def sparse_product(value: str) -> Iterator[None]:
    before = os.environ.get("LORS_SPARSE_PRODUCT")
    os.environ["LORS_SPARSE_PRODUCT"] = value
    try:
        yield
    finally:
        del os.environ["LORS_SPARSE_PRODUCT"]
        if before is not None:
            os.environ["LORS_SPARSE_PRODUCT"] = before


def forward(p: Stored) -> Tensor:
    return lors.linear(p.input, *p.operands, p.lora_A, p.lora_B, None, p.scaling, "lors")


def forward24(value: str) -> Callable[[Stored], Tensor]:
    def run(p: Stored) -> Tensor:
        with sparse_product(value):
            return forward(p)

    return run


# --- what torch alone would do ----------------------------------------------------------------------------------------


def _four_matmuls(p: Problem) -> tuple[Tensor, Tensor]:
    """The "lors" gradients as four matmuls; the thin ones are scaled."""
    grad_lora_A = ((p.grad_output @ p.lora_B).T @ p.input).mul_(p.scaling)
    grad_lora_B = (p.grad_output.T @ (p.input @ p.lora_A.T)).mul_(p.scaling)
    return grad_lora_A, grad_lora_B


def _dense_exact(p: Problem) -> tuple[Tensor, Tensor]:
    """The "exact" gradients with the weight's gradient [N, K] in memory."""
    grad = (p.grad_output.T @ p.input).mul_(p.weight != 0)
    return (p.lora_B.T @ grad).mul_(p.scaling), (grad @ p.lora_A.T).mul_(p.scaling)


# --- the groups -------------------------------------------------------------------------------------------------------


def group_of(name: str, problem: Stored) -> Group:
    (N, K), T, r = problem.weight.shape, problem.input.shape[0], problem.lora_A.shape[0]
    size = problem.weight.element_size()
    adapters, s = r * (N + K), problem.scaling

    def truth(p: Problem, gradient: str) -> tuple[Tensor, ...]:
        return reference.linear_backward(p.grad_output, p.input, p.weight, p.lora_A, p.lora_B, s, gradient=gradient)

    if name == "merge":
        return Group(
            lambda p: lors.merge(*p.operands, p.lora_A, p.lora_B, s),
            lambda p: official_merge(p.weight, p.lora_A, p.lora_B, s),
            "three passes: compare, addmm, multiply",
            lambda p: [reference.merge(p.weight, p.lora_A, p.lora_B, s)],
            problem.weight_bytes() + size * (N * K + adapters),
            2 * N * K * r,
            {"clone": lambda p: p.weight.clone()},
        )
    if name in ("lors", "exact"):
        exact = name == "exact"
        return Group(
            lambda p: lors.linear_backward(
                p.grad_output, p.input, *p.operands, p.lora_A, p.lora_B, None, s, name, False, True, True
            )[1:3],
            _dense_exact if exact else _four_matmuls,
            "dY^T X in memory, masked, two matmuls" if exact else "four matmuls",
            lambda p: truth(p, name)[1:3],
            size * (T * (N + K) + 2 * adapters) + (problem.weight_bytes() if exact else 0),
            2 * T * N * K + 4 * N * K * r if exact else 4 * T * r * (N + K),
        )
    flop = 2 * T * N * K + 2 * N * K * r
    moved = size * (T * (N + K) + adapters) + problem.weight_bytes()
    if name in ("forward", FORWARD24):
        return Group(
            forward24("sparse") if name == FORWARD24 else forward,
            lambda p: p.input @ official_merge(p.weight, p.lora_A, p.lora_B, s).T,
            "merged in three passes, one matmul",
            lambda p: [reference.linear(p.input, p.weight, p.lora_A, p.lora_B, s)],
            moved,
            flop,
            {
                "product": lambda p: p.input @ p.weight.T,
                **({"dense": forward24("dense")} if name == FORWARD24 else {}),
            },
        )
    backward = (None, s, "lors", True, False, False)  # no bias; the input's gradient alone
    return Group(
        lambda p: lors.linear_backward(p.grad_output, None, *p.operands, p.lora_A, p.lora_B, *backward)[:1],
        lambda p: p.grad_output @ official_merge(p.weight, p.lora_A, p.lora_B, s),
        "merged in three passes, one matmul",
        lambda p: truth(p, "lors")[:1],
        moved,
        flop,
        {"product": lambda p: p.grad_output @ p.weight},
    )


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in this run: a large copy, bytes read plus written, and a large matmul."""

    copy_bytes_per_second: float
    matmul_flop_per_second: float


@torch.no_grad()
def measure_ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> Ceilings:
    size, side = (1 << 22, 256) if quick else (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 1024)
    generator = torch.Generator(device).manual_seed(1)

    def median(run: Callable[[], object], repetitions: int) -> float:
        for _ in range(3):
            run()
        return statistics.median(call_seconds(run, repetitions, device) for _ in range(11))

    source = torch.randint(256, (size,), generator=generator, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Ceilings(
        2 * size / median(lambda: target.copy_(source), 10),
        2 * side**3 / median(lambda: torch.mm(a, b, out=out), 4),
    )


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def check(group: Group, problem: Problem) -> float:
    """The largest relative L2 error of our results; memory is NaN before the call, so what is unwritten shows."""
    with poisoned_memory():
        results = _tensors(group.ours(problem))
    pairs = zip(results, group.expected(problem), strict=True)
    return max(relative_error(value, expected) for value, expected in pairs)


def rotating(run: Callable[[Problem], Any], problems: Sequence[Problem]) -> Callable[[], None]:
    """One call on the next problem. One result per problem stays alive, so that results rotate in memory too."""
    rotation, held = itertools.cycle(problems), deque[Any](maxlen=len(problems))

    def call() -> None:
        held.append(run(next(rotation)))

    return call


def as_graph(run: Callable[[Problem], Any], problems: Sequence[Problem]) -> Callable[[], None]:
    """One call per problem as a CUDA graph: its replay takes the kernels' time, not Python's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up on their first calls, which cannot be captured
        for _ in range(3):
            run(problems[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [run(problem) for problem in problems]

    def replay() -> None:
        assert held  # the results' memory belongs to the graph while it lives
        graph.replay()

    return replay


@torch.no_grad()
def bench_group(
    name: str, problem: Stored, protocol: Protocol, ceilings: Ceilings, common: dict[str, Any], eager: bool
) -> list[dict[str, Any]]:
    """The rows of one operator and its peers; when ours fails, one row with the reason."""
    group, device = group_of(name, problem), problem.weight.device
    floor = max(group.bytes / ceilings.copy_bytes_per_second, group.flop / ceilings.matmul_flop_per_second)
    common = {**common, "kernel": name, "bytes": group.bytes, "flop": group.flop, "floor_seconds": floor}
    try:
        error = check(group, problem)
        if error != error:
            raise RuntimeError("a result is not a number, or was not written")
        copies = max(1, -(-3 * last_level_cache_bytes(device) // group.bytes)) if device.type == "cuda" else 1
        problems = [problem, *(problem.copy() for _ in range(copies - 1))]
        runs = {"lors_cuda": group.ours, PEER: group.peer, **group.extra}
        graph = device.type == "cuda" and not eager
        cases = {key: (as_graph if graph else rotating)(run, problems) for key, run in runs.items()}
        timings = measure(cases, protocol, baseline=PEER, device=device)
    except Exception as found:  # the other operators must still be measured
        return [{**common, "peer": "lors_cuda", "failed": f"{type(found).__name__}: {str(found).strip()[:300]}"}]
    rows = []
    for key, timing in timings.items():
        if graph:
            timing.seconds = [seconds / copies for seconds in timing.seconds]
        row = {**common, "peer": key, "failed": None, "graph": graph, "rotated_problems": copies, **timing.row()}
        row["fraction_of_floor"] = floor / row["seconds"]["median"]
        row["error"] = error if key == "lors_cuda" else None
        row["note"] = group.peer_note if key.startswith(PEER) else None
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> list[str]:
    where = f"{row['kernel']} {row['layout']} r={row['rank']} {row['out_features']}x{row['in_features']}"
    tokens = "-" if row["kernel"] == "merge" else str(row["tokens"])
    if row["failed"]:
        return [where, tokens, row["peer"], "failed", "", "", "", ""]
    seconds = {key: value * 1e6 for key, value in row["seconds"].items()}
    return [
        where,
        tokens,
        row["peer"],
        f"{seconds['median']:.1f} [{seconds['p20']:.1f}, {seconds['p80']:.1f}]",
        report.times(row["ratio"]),
        f"{row['floor_seconds'] * 1e6:.1f}",
        f"{row['fraction_of_floor']:.2f}",
        "" if row["error"] is None else f"{row['error']:.1e}",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/gpu/kernels.py")
    report.add_common_arguments(parser)
    parser.add_argument("--tokens", nargs="+", type=report.positive)
    parser.add_argument("--rank", nargs="+", type=report.positive, default=[16])
    parser.add_argument(
        "--layout", nargs="+", choices=LAYOUTS, default=["dense"], help="mask: dense with an explicit one"
    )
    parser.add_argument("--only", nargs="+", choices=(*GROUPS, FORWARD24), default=list(GROUPS))
    parser.add_argument(
        "--calls",
        nargs="+",
        choices=("graph", "eager"),
        default=["graph"],
        help="eager: call from Python instead of replaying a CUDA graph",
    )
    arguments = parser.parse_args(argv)
    arguments.dtype = arguments.dtype or ["bfloat16"]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device, protocol = arguments.device, report.protocol_from(arguments)
    shapes = [tuple(arguments.shape)] if arguments.shape else [(64, 96)] if arguments.quick else SHAPES
    token_counts = arguments.tokens or ([32] if arguments.quick else TOKENS)
    where = report.environment(device)
    print(report.describe(where))
    before, rows = report.rows_before(arguments), []
    for dtype in arguments.dtype:
        ceilings = measure_ceilings(device, report.DTYPES[dtype], arguments.quick)
        copy, matmul = ceilings.copy_bytes_per_second / 1e9, ceilings.matmul_flop_per_second / 1e12
        print(f"{dtype}: a large copy moves {copy:.0f} GB/s, a large matmul runs at {matmul:.2f} TFLOP/s")
        for shape, tokens, rank, layout in itertools.product(shapes, token_counts, arguments.rank, arguments.layout):
            problem = make_problem(
                tokens,
                shape,
                rank,
                report.DTYPES[dtype],
                density=arguments.density,
                seed=arguments.seed,
                device=device,
            )
            common = {
                "benchmark": "kernel",
                "device": device.type,
                "dtype": dtype,
                "tokens": tokens,
                "out_features": shape[0],
                "in_features": shape[1],
                "rank": rank,
                "layout": layout,
                "density": 0.5 if arguments.density is None else arguments.density,
                "cuda_fused": os.environ.get("LORS_CUDA_FUSED"),
                "baseline": PEER,
                **dataclasses.asdict(ceilings),
            }
            for name, calls in itertools.product(arguments.only, arguments.calls):
                if name == "merge" and tokens != token_counts[0]:
                    continue  # it has no tokens
                report.progress(f"{dtype} {shape[0]}x{shape[1]} T={tokens} r={rank} {layout} {name}")
                stored = Stored.of(problem, "2:4" if name == FORWARD24 else layout)
                rows += bench_group(name, stored, protocol, ceilings, common, calls == "eager")
                if arguments.output:
                    report.write_json(arguments.output, rows, where, dataclasses.asdict(protocol), before)
            report.progress("")
    header = ["kernel", "T", "peer", "us [p20, p80]", f"x {PEER}", "floor us", "of floor", "error"]
    print(report.table(header, [line(row) for row in rows]))
    failed = [row for row in rows if row["failed"]]
    for row in failed:
        print(f"{' '.join(line(row)[:2])} failed: {row['failed']}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
