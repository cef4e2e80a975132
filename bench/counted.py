# SPDX-License-Identifier: Apache-2.0
"""The memory of training Llama-3-8B and 70B, counted from shapes: `bench/model.py --memory`. Nothing is run.

For each linear of the decoder layers, W [N, K], adapters of rank r, T tokens, bfloat16 weights and activations:

    weights      dense 2 N K;  2:4  N K + N ceil(K/8);  bitmap  N K + 4 N ceil(K/32) + 8 (N + 1), half of it kept
                 int4 codes are a quarter of these values, int8 and e4m3 half, and scales 2 N K/128 or 2 N beside them
    adapters     a r (N + K), a bytes each: 4 (PEFT and this library), 2 (the peers that need the weight's dtype)
    gradients    as the adapters;  AdamW  twice the adapters
    saved        what the linears keep for backward: 2 T K of each input, once where linears share it, SQFT also W~
                 and the mask, 3 N K;  PEFT a float32 copy of the input and X A^T for each linear, 4 T (K + r)

Beside the linears only the weights of embedding, head and norms are counted. What all methods have alike (attention,
activations between the linears, the logits) is left out, and so are temporaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

import llama
import report

TOKENS = 2048
_READERS_OF_ONE_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
PARTS = ("weights", "adapters", "gradients", "optimizer", "saved")


@dataclass(frozen=True)
class Kind:
    """What a method holds."""

    note: str
    layout: str = "dense"
    adapter_bytes: int = 4
    saved_per_weight: int = 0
    float32_inputs: bool = False
    code_bits: int = 16
    group: int = 0  # columns that share a scale; 0: the row's


KINDS = {
    "peft_lora": Kind("PEFT's LoRA on frozen dense weights", float32_inputs=True),
    "official": Kind("the authors' formulas", adapter_bytes=2),
    "sqft": Kind("masked LoRA under autograd", adapter_bytes=2, saved_per_weight=3),
    "sqft_checkpointed": Kind("the same, each linear checkpointed", adapter_bytes=2),
    "lors_cuda_24": Kind("this library, 2:4 storage", "2:4"),
    "lors_cuda_bitmap": Kind("this library, bitmap storage", "bitmap"),
    "lors_cuda_24_int8": Kind("this library, 2:4 storage, int8 or e4m3, a scale per row", "2:4", code_bits=8),
    "lors_cuda_24_int4": Kind("this library, 2:4 storage, int4, groups of 128", "2:4", code_bits=4, group=128),
    "lors_cuda_bitmap_int4": Kind(
        "this library, bitmap storage, int4, groups of 128", "bitmap", code_bits=4, group=128
    ),
}


def weight_bytes(N: int, K: int, kind: Kind) -> int:
    if kind.layout == "dense":
        return 2 * N * K
    values = N * K * kind.code_bits // 16
    scales = 0 if kind.code_bits == 16 else 2 * N * (K // kind.group if kind.group and K % kind.group == 0 else 1)
    index = N * -(-K // 8) if kind.layout == "2:4" else 4 * N * -(-K // 32) + 8 * (N + 1)
    return values + scales + index


def saved_bytes(linears: Mapping[str, tuple[int, int]], kind: Kind, rank: int, tokens: int) -> int:
    """What the linears of one decoder layer keep for backward; `linears` has their (N, K) by name."""
    if kind.float32_inputs:  # a frozen linear itself keeps nothing
        return sum(4 * tokens * (K + rank) for _, K in linears.values())
    total = sum(kind.saved_per_weight * N * K for N, K in linears.values())
    for readers in _READERS_OF_ONE_INPUT:
        inputs = {linears[name][1] for name in readers & linears.keys()}
        total += sum(2 * tokens * K for K in inputs)
    return total


def count(model: nn.Module, kind: Kind, rank: int, tokens: int) -> dict[str, int]:
    """Bytes by part, of a model that may be on the meta device."""
    linears = list(llama.layer_linears(model))
    shapes = [(linear.out_features, linear.in_features) for _, _, linear in linears]
    layers = model.get_submodule("model.layers")
    first = {name: (linear.out_features, linear.in_features) for name, linear in named_linears(layers[0])}
    adapters = kind.adapter_bytes * sum(rank * (N + K) for N, K in shapes)
    rest = sum(p.numel() for p in model.parameters()) - sum(N * K for N, K in shapes)
    return {
        "weights": 2 * rest + sum(weight_bytes(N, K, kind) for N, K in shapes),
        "adapters": adapters,
        "gradients": adapters,
        "optimizer": 2 * adapters,
        "saved": len(layers) * saved_bytes(first, kind, rank, tokens),
    }


def named_linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name.rpartition(".")[2], m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]


def rows(rank: int) -> list[dict[str, Any]]:
    found = []
    for name, shape in llama.COUNTED_SHAPES.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(shape.config())
        for peer, kind in KINDS.items():
            parts = count(model, kind, rank, TOKENS)
            common = {"benchmark": "memory", "how": "counted", "model": name, "shape": asdict(shape), "peer": peer}
            common |= {"note": kind.note, "dtype": "bfloat16", "tokens": TOKENS, "rank": rank, "pattern": "2:4"}
            found.append({**common, "failed": None, "bytes": {**parts, "total": sum(parts.values())}})
    return found


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        official = next(row for row in own if row["peer"] == "official")["bytes"]["total"]
        print(f"\n{name}, bfloat16, r = {own[0]['rank']}, {own[0]['tokens']} tokens: GB, counted, not measured")
        lines = [
            [row["peer"]]
            + [f"{row['bytes'][part] / 1e9:.2f}" for part in (*PARTS, "total")]
            + [f"{row['bytes']['total'] / official:.2f}"]
            for row in own
        ]
        header = ["method", "weights", "adapters", "gradients", "AdamW", "saved by linears", "total", "of official"]
        print(report.table(header, lines))
