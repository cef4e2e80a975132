# SPDX-License-Identifier: Apache-2.0
"""How many kernels of ours a forward and a backward launch (docs/cuda.md); torch's matmuls and sums are not ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import counts

MERGES: dict[str, Callable[[Any], None]] = {
    "dense": counts.merge,
    "2:4": counts.merge_compressed(sparse24=True),
    "bitmap": counts.merge_compressed(sparse24=False),
}


@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("layout", MERGES)
def test_forward_and_backward(sim: Any, monkeypatch: pytest.MonkeyPatch, layout: str, r: int) -> None:
    for name, size, field in (("N", 256, "out_features"), ("K", 256, "in_features"), ("R", r, "r")):
        monkeypatch.setattr(counts, name, size)
        monkeypatch.setitem(counts.ADAPTED, field, size)
    merge = sim.Device()
    MERGES[layout](merge)
    forward = len(merge.launches())
    assert forward == (2 if layout == "bitmap" else 1)
    for multiprocessors, sums in ((1, False), (132, True)):  # with more of them, partial sums
        gradients = sim.Device(sample_blocks=1, multiprocessors=multiprocessors)
        counts.gradients(sim.adapter_grad_lors, 2048)(gradients)
        assert len(gradients.launches()) == 2 + sums
        assert forward + len(gradients.launches()) <= (5 if layout == "bitmap" and sums else 4)
