#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Every operator against lors_cuda.reference in float64, outputs poisoned with NaN first; results must repeat.

python bench/gpu/check.py --device cuda            the tests' awkward shapes, and some that fill a GPU
python bench/gpu/check.py --device cuda --small    a dozen small calls, for compute-sanitizer

Cases and tolerances are those of tests/python.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report
from cases import SHAPES, Case, make_case
from expectations import check_linear, check_linear_backward, check_merge, check_merge_backward
from protocol import poisoned_memory

lors = torch.ops.lors
SMALL = ((17, 12, 64, 16), (5, 31, 70, 3), (33, 130, 264, 16))
LARGE = ((512, 1024, 2048, 16), (200, 4096, 4096, 16), (64, 512, 768, 256), (3, 14336, 4096, 16))
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def cases(device: torch.device, small: bool, large: bool) -> Iterator[tuple[str, Case]]:
    """Every shape in every dtype; layouts, masks and the adapters' dtypes alternate."""
    shapes = SMALL if small else SHAPES + (LARGE if large else ())
    dtypes = list(DTYPES)[:2] if small else list(DTYPES)
    for seed, (shape, dtype) in enumerate(itertools.product(shapes, dtypes)):
        explicit, float32_adapters = bool(seed // len(dtypes) % 2), bool(seed % 2)
        layout = ("dense", "2:4", "dense", "bitmap")[seed % 4]
        layout = "bitmap" if layout == "2:4" and shape[2] % 4 else layout
        adapters = (torch.float32, torch.float32) if float32_adapters else (None, None)
        case = make_case(
            seed,
            *shape,
            dtype,
            device=device,
            explicit_mask=explicit,
            bias=bool(seed % 2),
            adapter_dtypes=adapters,
            layout=layout,
        )
        words = [f"T={shape[0]} N={shape[1]} K={shape[2]} r={shape[3]}", DTYPES[dtype], layout]
        words += ["mask"] * explicit + ["float32 adapters"] * float32_adapters
        yield " ".join(words), case


def checks(case: Case) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], None]]]:
    """(operator, the call, what its result must satisfy)."""
    yield "merge", case.merge, lambda merged: check_merge(merged, case)
    grad = case.weight.flip(0) + 1
    adapted = (*case.adapted, case.scaling)
    yield (
        "merge_backward",
        lambda: lors.merge_backward(grad, *adapted),
        lambda grads: check_merge_backward(grads, grad, case),
    )
    for gradient in ("lors", "exact"):
        yield f"linear {gradient}", lambda g=gradient: case.linear(g), lambda output: check_linear(output, case)
        yield (
            f"linear_backward {gradient}",
            lambda g=gradient: case.linear_backward(g),
            lambda grads, g=gradient: check_linear_backward(grads, case, g),
        )


def _bits(result: Any) -> list[Tensor]:
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor for tensor in tensors]


def problem_with(call: Callable[[], Any], check: Callable[[Any], None]) -> str | None:
    """What is wrong, or None."""
    try:
        with poisoned_memory():
            result = call()
            again = call()
        check(result)
        for first, second in zip(_bits(result), _bits(again), strict=True):
            if not torch.equal(first, second):
                return "a second call gave other bits"
    except torch.AcceleratorError:
        raise  # the device is lost: every later result would be wrong too
    except Exception as found:
        if isinstance(found, AssertionError):
            return str(found)
        return traceback.format_exception_only(found)[-1].strip()
    return None


def save(output: Path | None, rows: list[dict[str, Any]], where: dict[str, Any], before: Any) -> None:
    """After every case: whatever stops the run, what is known stays."""
    if output:
        report.write_json(output, rows, where, {}, before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/gpu/check.py")
    parser.add_argument("--device", type=report.usable_device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--small", action="store_true", help="a dozen small calls")
    parser.add_argument("--large", action="store_true", help="large shapes too; on a GPU this is the default")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--append", action="store_true", help="keep the rows that --output holds already")
    arguments = parser.parse_args(argv)
    device = arguments.device
    # torch may add up the parts of a long 16-bit matmul in 16 bits, which is not what is checked here.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    where = report.environment(device)
    print(report.describe(where))
    rows: list[dict[str, Any]] = []
    before = report.rows_before(arguments)
    try:
        for name, case in cases(device, arguments.small, arguments.large or device.type == "cuda"):
            for operator, call, check in checks(case):
                problem = problem_with(call, check)
                rows.append({"benchmark": "check", "operator": operator, "case": name, "problem": problem})
                if problem:
                    print(f"{operator}, {name}: {problem}", flush=True)
            save(arguments.output, rows, where, before)
    except torch.AcceleratorError as lost:
        rows.append({"benchmark": "check", "operator": operator, "case": name, "problem": str(lost)})
        print(f"{operator}, {name}: the device is lost: {lost}")
        save(arguments.output, rows, where, before)
    wrong = sum(row["problem"] is not None for row in rows)
    fused = json.dumps((where["gpu"] or {}).get("lors_cuda_fused"))
    print(f"{len(rows)} checks on {device.type}, {wrong} failed (LORS_CUDA_FUSED {fused})")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
