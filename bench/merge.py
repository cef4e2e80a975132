#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The merge alone, W~ = W + s · M ∘ (B A), against the official three passes and against copying the weight.

python bench/merge.py --output merge.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import report
from peers import make_problem, official_merge
from protocol import AGAIN, CPU, Protocol, last_level_cache_bytes, measure, poisoned_memory, relative_error

BASELINE = "official"
NOTES = {
    "official": "three passes in eager torch: compare, addmm, multiply",
    "lors_cuda": "lors_cuda.merge",
    "lors_cuda_stochastic": "lors_cuda.merge, rounding='stochastic'; as lors_cuda where nothing is rounded",
    "lors_cuda_24": "lors_cuda.merge from a 2:4 weight to a dense one",
    "lors_cuda_24_values": "SparseWeight.merge, 2:4 to 2:4",
    "lors_cuda_24_int4": "lors_cuda.merge from a 2:4 weight of int4 codes in groups of 128 to a dense one",
    "lors_cuda_bitmap": "lors_cuda.merge from a bitmap weight to a dense one",
    "clone": "weight.clone(): as many bytes read and written as the merge must, allocation included",
    "copy": "the same into memory allocated once: no merge that allocates its result can be faster",
}


@dataclass(frozen=True)
class Merge:
    """One way to merge; `stored` makes what `run` takes from a dense weight and is not timed."""

    run: Callable[[Any, Tensor, Tensor, float], Any]
    stored: Callable[[Tensor], Any] = lambda weight: weight
    written: Callable[[Any, Tensor], int] = lambda stored, weight: weight.nbytes  # bytes of the result


def _merges(weight: Tensor, sparse24: bool) -> dict[str, Merge]:
    target = torch.empty_like(weight)
    merges = {
        "official": Merge(official_merge),
        "clone": Merge(lambda weight, *_: weight.clone()),
        "copy": Merge(lambda weight, *_: target.copy_(weight)),
    }
    if report.have_lors_cuda():
        import lors_cuda

        def layout(name: str) -> Callable[[Tensor], Any]:
            return lambda weight: lors_cuda.SparseWeight.from_dense(weight, name)

        merges["lors_cuda"] = Merge(lors_cuda.merge)
        merges["lors_cuda_stochastic"] = Merge(functools.partial(lors_cuda.merge, rounding="stochastic", seed=1))
        if sparse24:
            merges["lors_cuda_24"] = Merge(lors_cuda.merge, layout("2:4"))
            merges["lors_cuda_24_values"] = Merge(
                lambda stored, *adapter: stored.merge(*adapter), layout("2:4"), lambda stored, _: stored.values.nbytes
            )
            if weight.shape[1] % 128 == 0:
                merges["lors_cuda_24_int4"] = Merge(
                    lors_cuda.merge,
                    lambda weight: lors_cuda.SparseWeight.quantize(weight, None, "int4", 128, layout="2:4"),
                )
        merges["lors_cuda_bitmap"] = Merge(lors_cuda.merge, layout("bitmap"))
    return merges


def floor_bytes(merge: Merge, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> int:
    """The bytes a perfect merge moves: the stored weight and the adapters read once, the result written once."""
    stored = merge.stored(weight)
    return stored.nbytes + merge.written(stored, weight) + lora_A.nbytes + lora_B.nbytes


def _frozen(stored: Any, weight: Tensor) -> Tensor:
    """What is merged: the weight, or what its codes stand for, unrounded."""
    grid = getattr(stored, "quantization", None)
    if grid is None:
        return weight
    from lors_cuda import reference

    return reference.dequantize(stored.codes(), grid.scales, grid.zero_points, stored.mask())


def check(merge: Merge, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> dict[str, Any]:
    """Relative L2 error against float64, and whether every masked element is +0 bit for bit."""
    stored = merge.stored(weight)
    with poisoned_memory():
        merged = merge.run(stored, lora_A, lora_B, scaling)
    merged = merged if isinstance(merged, Tensor) else merged.to_dense()
    mask = weight != 0
    expected = _frozen(stored, weight).double() + scaling * mask * (lora_B.double() @ lora_A.double())
    masked = merged[~mask]
    zeros = bool((masked == 0).all()) and not bool(masked.signbit().any())
    return {"error": {"output": relative_error(merged, expected)}, "masked_positive_zero": zeros}


@torch.no_grad()
def bench_case(
    shape: tuple[int, int],
    rank: int,
    dtype: str,
    protocol: Protocol,
    density: float | None,
    seed: int,
    warm: bool,
    device: torch.device = CPU,
) -> list[dict[str, Any]]:
    problem = make_problem(1, shape, rank, report.DTYPES[dtype], density=density, seed=seed, device=device)
    weight, lora_A, lora_B = problem.weight, problem.lora_A.detach(), problem.lora_B.detach()
    # In training a layer's weight was last touched a whole model ago: take turns over copies that no cache holds.
    size = weight.numel() * weight.element_size()
    copies = 1 if warm else max(1, -(-3 * last_level_cache_bytes(device) // size))
    weights = [weight] + [weight.clone() for _ in range(copies - 1)]
    rows: dict[str, dict[str, Any]] = {}
    cases: dict[str, Callable[[], object]] = {}
    for name, merge in _merges(weight, density is None).items():
        rows[name] = {
            "benchmark": "merge",
            "device": device.type,
            "peer": name,
            "note": NOTES[name],
            "baseline": BASELINE,
            "failed": None,
            "dtype": dtype,
            "out_features": shape[0],
            "in_features": shape[1],
            "rank": rank,
            "density": 0.5 if density is None else density,
            "pattern": "2:4" if density is None else "random",
            "rotated_weights": copies,
            "floor_bytes": floor_bytes(merge, weight, lora_A, lora_B),
        }
        if name not in ("clone", "copy"):
            rows[name].update(check(merge, weight, lora_A, lora_B, problem.scaling))
        turns = itertools.cycle([merge.stored(weight) for weight in weights])
        cases[name] = lambda f=merge.run, t=turns: f(next(t), lora_A, lora_B, problem.scaling)
    prefix = f"merge {dtype} r={rank} "
    timings = measure(
        cases, protocol, baseline=BASELINE, device=device, progress=lambda text: report.progress(prefix + text)
    )
    report.progress("")
    rows[BASELINE + AGAIN] = {**rows[BASELINE], "peer": BASELINE + AGAIN, "note": "the baseline again: the noise"}
    for name, timing in timings.items():
        rows[name].update(timing.row())
        rows[name]["floor_gb_per_second"] = rows[name]["floor_bytes"] / rows[name]["seconds"]["median"] / 1e9
    for row in rows.values():  # of the rate, not of the time: the layouts move different bytes
        row["fraction_of_copy"] = row["floor_gb_per_second"] / rows["copy"]["floor_gb_per_second"]
    return list(rows.values())


def target(row: dict[str, Any]) -> float | None:
    on_target = (row["out_features"], row["in_features"]) == report.TARGET_SHAPE
    # On a GPU the target is a share of the copy's rate, not of the baseline's: see the column.
    ours = row["peer"] == "lors_cuda" and row["device"] == "cpu"
    return report.MERGE_TARGETS.get(row["rank"]) if ours and on_target else None


def print_case(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    cache = "cold" if first["rotated_weights"] > 1 else "warm"
    print(
        f"\nmerge, {first['dtype']}, {first['out_features']} x {first['in_features']}, r = {first['rank']}, "
        f"density {first['density']:g}, {cache} weights"
    )
    lines = []
    for row in rows:
        error = f"{row['error']['output']:.1e}" if "error" in row else "-"
        zeros = {True: "yes", False: "NO", None: "-"}[row.get("masked_positive_zero")]
        lines.append(
            [
                row["peer"],
                report.milliseconds(row["seconds"]),
                report.times(row["ratio"]),
                report.verdict(target(row), row["ratio"]),
                str(row["rounds"]),
                report.page_faults(row),
                f"{row['floor_gb_per_second']:.1f}",
                f"{row['fraction_of_copy']:.2f}",
                error,
                zeros,
            ]
        )
    header = [
        "peer",
        "ms [p20, p80]",
        f"x {BASELINE} [p20, p80]",
        "target",
        "rounds",
        "faults",
        "floor GB/s",
        "of copy",
        "error",
        "masked +0",
    ]
    print(report.table(header, lines))


def bench(
    shape: tuple[int, int],
    ranks: Sequence[int],
    dtypes: Sequence[str],
    protocol: Protocol,
    *,
    density: float | None = None,
    seed: int = 0,
    warm: bool = False,
    device: torch.device = CPU,
) -> list[dict[str, Any]]:
    """Measure and print every dtype and rank; the JSON rows."""
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        for rank in ranks:
            case = bench_case(shape, rank, dtype, protocol, density, seed, warm, device)
            print_case(case)
            rows += case
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/merge.py")
    report.add_common_arguments(parser)
    parser.add_argument("--rank", nargs="+", type=report.positive, default=list(report.MERGE_TARGETS))
    parser.add_argument("--warm", action="store_true", help="one weight only, which the cache may hold")
    arguments = parser.parse_args(argv)
    cuda = arguments.device.type == "cuda"
    whole = report.CUDA_TARGET_SHAPE if cuda else report.TARGET_SHAPE
    shape = tuple(arguments.shape or ((64, 96) if arguments.quick else whole))
    dtypes = arguments.dtype or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    if max(arguments.rank) > min(shape):
        parser.error(f"--rank {max(arguments.rank)} is larger than the smaller side of --shape")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    protocol = report.protocol_from(arguments)
    where = report.environment(arguments.device)
    print(report.describe(where))
    before = report.rows_before(arguments)
    rows = bench(
        shape,
        arguments.rank,
        dtypes,
        protocol,
        density=arguments.density,
        seed=arguments.seed,
        warm=arguments.warm or arguments.quick,  # as in linear.py
        device=arguments.device,
    )
    note = report.target_note(where)
    if note and any(target(row) for row in rows):
        print(f"\n{note}")
    if arguments.output:
        report.write_json(arguments.output, rows, where, dataclasses.asdict(protocol), before)
        print(f"\n{len(rows)} rows in {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
