# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels move, counted by the simulator, as the table of docs/cuda.md.

    python tests/sim/counts.py            print it
    python tests/sim/counts.py --write    put it into docs/cuda.md

One large aligned call of each family, bfloat16, r = 16. Sectors are 32 bytes, counted per warp request: a sector that
two requests touch counts twice. The floor: every operand read as often as its column says, every result written once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]

from conftest import simulator  # noqa: E402
from formats import compress, pack_bitmap, sparse_weight  # noqa: E402
from numerics import empty, random, upload  # noqa: E402
from quantized import quantized  # noqa: E402

sim = simulator()
DOCS = HERE.parents[1] / "docs" / "cuda.md"
BEGIN, END = "<!-- counts: begin -->", "<!-- counts: end -->"
N, K, R, DTYPE = 2048, 2048, 16, "bfloat16"
ADAPTED = {
    "out_features": N,
    "in_features": K,
    "r": R,
    "lora_A_dtype": DTYPE,
    "lora_B_dtype": DTYPE,
    "scaling": 0.5,
}


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[Any], None]
    floor: dict[str, int]  # bytes of each operand that the floor moves


def adapters(device: Any) -> dict[str, Any]:
    return {
        "lora_A": upload(device, "lora_A", random(1, R, K, dtype=DTYPE)),
        "lora_B": upload(device, "lora_B", random(2, N, R, dtype=DTYPE)),
    }


def weight(device: Any, mask: Any = None) -> dict[str, Any]:
    return {
        "weight": upload(device, "weight", random(3, N, K, dtype=DTYPE, density=0.5)),
        "weight_dtype": DTYPE,
        "mask": mask,
    }


def merge(device: Any, explicit: bool = False) -> None:
    merged = empty(device, "merged", (N, K), DTYPE)
    result = {"merged": merged, "merged_dtype": DTYPE, "round_to": DTYPE}
    mask = device.upload("mask", np.zeros((N, K // 32), dtype=np.uint32)) if explicit else None
    sim.merge(device, **ADAPTED, **adapters(device), **weight(device, mask), **result)


KEPT = sparse_weight(3, N, K, DTYPE, explicit=False, sparse24=False)[1].sum().item()  # of the bitmap's weights


KEPT_CODES = sparse_weight(3, N, K, "float32", explicit=True, sparse24=False)[1].sum().item()  # of the quantised one's


def compressed(device: Any, sparse24: bool) -> dict[str, Any]:
    given, kept = sparse_weight(3, N, K, DTYPE, explicit=False, sparse24=sparse24)
    if sparse24:
        values, metadata = compress(given, kept)
        return {"values": upload(device, "values", values), "metadata": device.upload("metadata", metadata)}
    values, bits, offsets = pack_bitmap(given, kept)
    stored = {"mask": device.upload("mask", bits), "row_offsets": device.upload("row_offsets", offsets)}
    return {"values": upload(device, "values", values), **stored}


def merge_compressed(sparse24: bool, to_sparse24: bool = False) -> Callable[[Any], None]:
    def call(device: Any) -> None:
        stored = compressed(device, sparse24)
        merged = empty(device, "merged", (N, K // 2 if to_sparse24 else K), DTYPE)
        result = {"merged": merged, "merged_dtype": DTYPE, "round_to": DTYPE, "to_sparse24": to_sparse24}
        values = {"weight": stored.pop("values"), "weight_dtype": DTYPE}
        sim.merge(device, **ADAPTED, **adapters(device), **values, **stored, **result)

    return call


def merge_quantized(layout: str, group: int) -> Callable[[Any], None]:
    """int4 with scales in bfloat16, requantised with a dither."""

    def call(device: Any) -> None:
        stored = quantized(3, layout, "int4", (N, K), group).uploaded(device)
        merged = empty(device, "merged", (N, K), DTYPE)
        result = {"merged": merged, "merged_dtype": DTYPE, "round_to": DTYPE}
        stored |= {"requantize_steps": 1, "dither_seed": 1}
        sim.merge(device, **(ADAPTED | adapters(device) | stored | result))

    return call


def quantized_floor(layout: str, group: int) -> dict[str, int]:
    codes = {"dense": N * K // 2, "2:4": N * K // 4, "bitmap": KEPT_CODES // 2}[layout]
    index = {"metadata" if layout == "2:4" else "mask": N * K // 8}
    rows = {"row_offsets": 8 * N} if layout == "bitmap" else {}
    return {"values": codes, **index, **rows, "scales": 2 * N * K // group, "merged": 2 * N * K}


def fused_linear(tokens: int, input_gradient: bool, sparse24: bool | None = None) -> Callable[[Any], None]:
    """`sparse24`: from 2:4, or from a bitmap; None: dense."""

    def call(device: Any) -> None:
        inputs, outputs = (N, K) if input_gradient else (K, N)
        stored = weight(device) if sparse24 is None else compressed(device, sparse24)
        if sparse24 is not None:
            stored |= {"weight": stored.pop("values"), "weight_dtype": DTYPE}
        sim.fused_linear(
            device,
            **ADAPTED,
            **adapters(device),
            **stored,
            tokens=tokens,
            input_gradient=input_gradient,
            activation=upload(device, "activation", random(4, tokens, inputs, dtype=DTYPE)),
            activation_dtype=DTYPE,
            round_to=DTYPE,
            output=empty(device, "output", (tokens, outputs), DTYPE),
            output_dtype=DTYPE,
        )

    return call


def masked_contract(device: Any) -> None:
    sim.masked_contract(
        device,
        **{key: value for key, value in ADAPTED.items() if key != "out_features"},
        **adapters(device),
        **weight(device),
        rows=N,
        grad_weight=upload(device, "grad_weight", random(7, N, K, dtype="float32")),
        grad_weight_dtype="float32",
        lora_A_sum=upload(device, "lora_A_sum", random(8, K, R, dtype="float32")),
        lora_B_grad=empty(device, "lora_B_grad", (N, R), DTYPE),
    )


def gradients(
    function: Callable[..., None], tokens: int, **more: Callable[[Any], dict[str, Any]]
) -> Callable[[Any], None]:
    def call(device: Any) -> None:
        extra = {key: value for make in more.values() for key, value in make(device).items()}
        function(
            device,
            **ADAPTED,
            **adapters(device),
            **extra,
            tokens=tokens,
            grad_output=upload(device, "grad_output", random(5, tokens, N, dtype=DTYPE)),
            grad_output_dtype=DTYPE,
            input=upload(device, "input", random(6, tokens, K, dtype=DTYPE)),
            input_dtype=DTYPE,
            lora_A_grad=empty(device, "lora_A_grad", (R, K), DTYPE),
            lora_B_grad=empty(device, "lora_B_grad", (N, R), DTYPE),
        )

    return call


def cases() -> list[Case]:
    adapter_bytes = {"lora_A": 2 * R * K, "lora_B": 2 * N * R}
    results = {"lora_A_grad": 2 * R * K, "lora_B_grad": 2 * N * R}
    T = 512
    return [
        Case("merge", merge, {"weight": 2 * N * K, "merged": 2 * N * K, **adapter_bytes}),
        Case(
            "merge, explicit mask",
            lambda device: merge(device, explicit=True),
            {"weight": 2 * N * K, "mask": N * K // 8, "merged": 2 * N * K, **adapter_bytes},
        ),
        Case(
            "merge, 2:4 to dense",
            merge_compressed(True),
            {"values": N * K, "metadata": N * K // 8, "merged": 2 * N * K, **adapter_bytes},
        ),
        Case(
            "merge, 2:4 to 2:4 values",
            merge_compressed(True, to_sparse24=True),
            {"values": N * K, "metadata": N * K // 8, "merged": N * K, **adapter_bytes},
        ),
        Case(
            "merge, bitmap to dense",
            merge_compressed(False),
            {"values": 2 * KEPT, "mask": N * K // 8, "row_offsets": 8 * N, "merged": 2 * N * K, **adapter_bytes},
        ),
        *(
            Case(
                f"merge, {layout} int4, groups of {group}, to dense",
                merge_quantized(layout, group),
                quantized_floor(layout, group) | adapter_bytes,
            )
            for layout, group in (("2:4", 128), ("2:4", K), ("dense", 128), ("bitmap", 128))
        ),
        Case(
            f"fused_linear, Y, T = {16}",
            fused_linear(16, False),
            {"weight": 2 * N * K, "activation": 2 * 16 * K, "output": 2 * 16 * N, **adapter_bytes},
        ),
        Case(
            f"fused_linear, dX, T = {16}",
            fused_linear(16, True),
            {"weight": 2 * N * K, "activation": 2 * 16 * N, "output": 2 * 16 * K, **adapter_bytes},
        ),
        *(
            Case(
                f"fused_linear, {'dX' if gradient else 'Y'}, T = 16, {'2:4' if sparse24 else 'bitmap'}",
                fused_linear(16, gradient, sparse24),
                {
                    **({"values": N * K} if sparse24 else {"values": 2 * KEPT, "row_offsets": 8 * N}),
                    "metadata" if sparse24 else "mask": N * K // 8,
                    **{"activation": 2 * 16 * K, "output": 2 * 16 * N, **adapter_bytes},
                },
            )
            for sparse24 in (True, False)
            for gradient in (False, True)
        ),
        Case(
            f"adapter_grad_lors, T = {T} (dY and X twice)",
            gradients(sim.adapter_grad_lors, T),
            {"grad_output": 4 * T * N, "input": 4 * T * K, **adapter_bytes, **results},
        ),
        Case(
            "masked_contract",
            masked_contract,
            {
                "grad_weight": 4 * N * K,
                "weight": 2 * N * K,
                **adapter_bytes,
                "lora_A_sum": 8 * R * K,
                "lora_B_grad": 2 * N * R,
            },
        ),
    ]


def row(case: Case) -> list[str]:
    device = sim.Device(multiprocessors=8)
    case.call(device)
    buffers: dict[str, int] = {}
    totals = {"wide": 0, "accesses": 0, "conflicts": 0, "mma": 0}
    for counted in device.stats().values():
        for name, of in counted["buffers"].items():
            kind = "scratch" if name.startswith("scratch") else name
            buffers[kind] = buffers.get(kind, 0) + of["sectors_read"] + of["sectors_written"]
        for widths in (counted["loads_by_width"], counted["stores_by_width"]):
            totals["wide"] += widths[16]
            totals["accesses"] += sum(widths.values())
        totals["wide"] += counted["copy_bytes"] // 16
        totals["accesses"] += counted["copy_bytes"] // 16
        totals["conflicts"] += sum(count for kind, count in counted.items() if kind.endswith("_conflicts"))
        totals["mma"] += counted["mma"]
    scratch = buffers.pop("scratch", 0)
    floor = sum(case.floor.values()) // 32
    big = max(case.floor, key=lambda name: case.floor[name])
    return [
        case.name,
        f"{floor:,}",
        f"{sum(buffers.values()) / floor:.3f}",
        f"{buffers[big] / (case.floor[big] // 32):.3f} ({big})",
        f"{scratch / floor:.3f}",
        f"{100 * totals['wide'] / totals['accesses']:.1f} %",
        str(totals["conflicts"]),
        f"{totals['mma']:,}",
    ]


def table() -> str:
    header = [
        "call",
        "floor, sectors",
        "operands and results / floor",
        "largest operand / its floor",
        "scratch / floor",
        "16-byte accesses",
        "bank conflicts",
        "mma",
    ]
    rows = [header, ["---"] * len(header), *(row(case) for case in cases())]
    shape = f"N x K = {N} x {K}, r = {R}, {DTYPE}, a device of 8 multiprocessors."
    return shape + "\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the table in docs/cuda.md")
    arguments = parser.parse_args()
    text = table()
    print(text)
    if arguments.write:
        page = DOCS.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
