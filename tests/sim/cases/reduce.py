# SPDX-License-Identifier: Apache-2.0
"""The sum of partial results, for the mutants: calls with a bias, with a scale and with several parts for a thread."""

from __future__ import annotations

from typing import Any

import fused_linear
import masked_contract

PLANTED = [
    ("reduce.cuh", "if (p.add && i < left) sum[i] +=", "if (p.add && i < left) sum[i] ="),
    ("reduce.cu", "column % 8 ? eight[4 + i] : eight[i]", "eight[i]"),
    ("reduce.cu", "other < slices - 1", "other < slices - 2"),
    ("reduce.cuh", "sum[i] *= p.scale;", ""),
    ("reduce.cu", "expert == p.experts.count ? 0 : p.count", "expert > p.experts.count ? 0 : p.count"),
]


def check(sim: Any) -> None:
    fused_linear.check(sim)
    fused_linear.check_experts(sim, 72)  # by the fast path, which leaves rows of no expert to the sum
    masked_contract.check(sim)
