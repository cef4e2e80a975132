#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""2:4 products on the sparse tensor cores against the dense way, by shape and tokens; and what their plans cost.

python bench/gpu/sparse.py --device cuda --output sparse.json       the linears of a Llama-3-8B layer, r = 16, bfloat16
python bench/gpu/sparse.py --quick                                  small, on the CPU, where every way is the dense one
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import SHAPES, as_graph, rotating

import report
from lors_cuda import (
    SparseWeight,
    load_product_choices,
    plan_cache_clear,
    plan_cache_info,
    reference,
    save_product_choices,
)
from peers import make_problem
from protocol import Protocol, last_level_cache_bytes, measure, poisoned_memory, relative_error

TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
BASELINE = "dense"
lors = torch.ops.lors


@dataclasses.dataclass
class Operands:
    """One product's operands."""

    input: Tensor  # [T, K]
    grad_output: Tensor  # [T, N]
    weight: SparseWeight
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def copy(self) -> Operands:
        w = self.weight
        values, index = w.values.clone(), None if w.index is None else w.index.clone()
        extra = None if w.library_metadata is None else w.library_metadata.clone()
        weight = SparseWeight(values, None, index, library_metadata=extra, transposable=w.transposable)
        return Operands(self.input.clone(), self.grad_output.clone(), weight, self.lora_A, self.lora_B, self.scaling)


def make_operands(tokens: int, shape: tuple[int, int], arguments: argparse.Namespace, transposable: bool) -> Operands:
    problem = make_problem(
        tokens, shape, arguments.rank, report.DTYPES[arguments.dtype[0]], seed=arguments.seed, device=arguments.device
    )
    weight = problem.weight
    if transposable:
        diagonals = (torch.arange(shape[0])[:, None] + torch.arange(shape[1])) % 2 == 0
        weight = torch.where(diagonals.to(weight.device), torch.full_like(weight, shape[1] ** -0.5), 0.0)
    stored = SparseWeight.from_dense(weight, "2:4")
    tensors = (problem.input.detach(), problem.grad_output)
    adapters = (problem.lora_A.detach(), problem.lora_B.detach())
    return Operands(*tensors, stored, *adapters, problem.scaling)


def forward(products: str, in_place: bool = True) -> Callable[[Operands], Tensor]:
    def run(p: Operands) -> Tensor:
        w, extra = p.weight, p.weight.library_metadata if in_place else None
        adapted = (w.values, None, w.index, p.lora_A, p.lora_B)
        return lors.linear(p.input, *adapted, None, p.scaling, "lors", None, extra, w.transposable, products)

    return run


def input_gradient(products: str) -> Callable[[Operands], Tensor]:
    def run(p: Operands) -> Tensor:
        w, wanted = p.weight, (True, False, False)
        adapted = (w.values, None, w.index, p.lora_A, p.lora_B)
        options = (*wanted, None, w.transposable, products)
        return lors.linear_backward(p.grad_output, None, *adapted, None, p.scaling, "lors", *options)[0]

    return run


def ways(operation: str, operands: Operands) -> dict[str, Callable[[Operands], Tensor]]:
    if operation == "input_gradient":
        return {
            BASELINE: input_gradient("dense"),
            "recompress": input_gradient("sparse"),
            "auto": input_gradient("auto"),
        }
    found = {BASELINE: forward("dense"), "recompress": forward("sparse", in_place=False), "auto": forward("auto")}
    if operands.weight.library_metadata is not None:
        found["in_place"] = forward("sparse")
    return found


@torch.no_grad()
def bench(operation: str, operands: Operands, protocol: Protocol, common: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one product; a way that fails has the reason in its row and does not stop the others."""
    device, weight = operands.weight.device, operands.weight
    common = {**common, "operation": operation, "baseline": BASELINE}
    expected = truth(operation, operands)
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    cases: dict[str, Callable[[Operands], Tensor]] = {}
    for name, run in ways(operation, operands).items():
        try:
            with poisoned_memory():
                run(operands)  # whatever is measured or searched first is not what the check reads
                errors[name] = relative_error(run(operands), expected)
            cases[name] = run
        except RuntimeError as error:
            failed[name] = str(error).strip()[:300]
    moved = operands.input.nbytes + operands.grad_output.nbytes + weight.nbytes
    copies = max(1, -(-3 * last_level_cache_bytes(device) // moved)) if device.type == "cuda" else 1
    problems = [operands, *(operands.copy() for _ in range(copies - 1))]
    graph = device.type == "cuda"
    runs = {name: (as_graph if graph else rotating)(run, problems) for name, run in cases.items()}
    rows = [{**common, "peer": name, "failed": reason} for name, reason in failed.items()]
    for name, timing in measure(runs, protocol, baseline=BASELINE, device=device).items():
        if graph:
            timing.seconds = [seconds / copies for seconds in timing.seconds]
        rows.append({**common, "peer": name, "failed": None, "error": errors.get(name), **timing.row()})
    return rows


def truth(operation: str, p: Operands) -> Tensor:
    dense = p.weight.to_dense()
    if operation == "forward":
        return reference.linear(p.input, dense, p.lora_A, p.lora_B, p.scaling)
    return reference.linear_backward(p.grad_output, p.input, dense, p.lora_A, p.lora_B, p.scaling)[0]


@torch.no_grad()
def plan_cost(operands: Operands, common: dict[str, Any]) -> dict[str, Any]:
    """Seconds by the clock of one forward: first met (search, both ways measured), its choice loaded, warm."""
    device, run = operands.weight.device, forward("auto")

    def seconds() -> float:
        start = perf_counter()
        run(operands)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - start

    run(operands)  # the library itself, its kernels and the allocator are not what is counted
    plan_cache_clear()
    first = seconds()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "choices.json"
        save_product_choices(path)
        plan_cache_clear()
        load_product_choices(path)
    loaded = seconds()
    warm = min(seconds() for _ in range(5))
    cost = {"first_seconds": first, "loaded_seconds": loaded, "warm_seconds": warm}
    return {**common, "benchmark": "sparse_plan", "operation": "forward", "failed": None, **cost}


def heat_map(rows: Sequence[dict[str, Any]], operation: str, peer: str) -> str:
    """x dense of one way: shapes down, tokens across."""
    cells = {
        (row["out_features"], row["in_features"], row["tokens"]): "failed"
        if row["failed"]
        else report.times(row["ratio"])
        for row in rows
        if row["benchmark"] == "sparse" and (row["operation"], row["peer"]) == (operation, peer)
    }
    tokens = sorted({key[2] for key in cells})
    shapes = sorted({key[:2] for key in cells})
    lines = [[f"{N} x {K}", *(cells.get((N, K, T), "-") for T in tokens)] for N, K in shapes]
    return report.table([f"{operation}, {peer}", *(f"T = {T}" for T in tokens)], lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/gpu/sparse.py")
    report.add_common_arguments(parser)
    parser.add_argument("--tokens", nargs="+", type=report.positive)
    parser.add_argument("--rank", type=report.positive, default=16)
    arguments = parser.parse_args(argv)
    arguments.dtype = arguments.dtype or ["bfloat16"]
    if len(arguments.dtype) > 1 or arguments.density is not None:
        parser.error("one --dtype at a time, and no --density: the weight is 2:4.")
    device, protocol = arguments.device, report.protocol_from(arguments)
    shapes = [tuple(arguments.shape)] if arguments.shape else [(64, 96)] if arguments.quick else SHAPES
    token_counts = arguments.tokens or ([32] if arguments.quick else TOKENS)
    where = report.environment(device)
    info = plan_cache_info()
    print(report.describe(where))
    print(
        f"cuSPARSELt {info.library_version}" if info.reason is None else f"Every way is the dense one: {info.reason}."
    )
    before, rows = report.rows_before(arguments), []
    for shape in shapes:
        for tokens in token_counts:
            common = {
                "benchmark": "sparse",
                "device": device.type,
                "dtype": arguments.dtype[0],
                "tokens": tokens,
                "out_features": shape[0],
                "in_features": shape[1],
                "rank": arguments.rank,
                "cusparselt": info.library_version,
                "sparse_products_reason": info.reason,
            }
            for operation in ("forward", "input_gradient"):
                report.progress(f"{shape[0]}x{shape[1]} T={tokens} {operation}")
                operands = make_operands(tokens, shape, arguments, transposable=operation == "input_gradient")
                rows += bench(operation, operands, protocol, common)
                if operation == "forward":
                    rows.append(plan_cost(operands, common))
            report.progress("")
            if arguments.output:
                report.write_json(arguments.output, rows, where, dataclasses.asdict(protocol), before)
    for operation, peer in (
        ("forward", "in_place"),
        ("forward", "recompress"),
        ("forward", "auto"),
        ("input_gradient", "recompress"),
        ("input_gradient", "auto"),
    ):
        if any((row.get("operation"), row.get("peer")) == (operation, peer) for row in rows):
            print(f"\n{heat_map(rows, operation, peer)}")
    costs = [row for row in rows if row["benchmark"] == "sparse_plan"]
    print("\nOne forward, ms by the clock: first met / choice loaded / warm")
    for row in costs:
        cells = (f"{1e3 * row[key]:.2f}" for key in ("first_seconds", "loaded_seconds", "warm_seconds"))
        print(f"  {row['out_features']} x {row['in_features']}, T = {row['tokens']}: {' / '.join(cells)}")
    failed = [row for row in rows if row["failed"]]
    for row in failed:
        print(f"{row['operation']} {row['peer']} T={row['tokens']} failed: {row['failed']}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
