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
    forward = sim.Device(sample_blocks=1)
    MERGES[layout](forward)
    assert len(forward.launches()) == (2 if layout == "bitmap" else 1)
    for multiprocessors, most in ((1, 4), (132, 5 if layout == "bitmap" else 4)):  # with more, partial sums
        backward = sim.Device(sample_blocks=1, multiprocessors=multiprocessors)
        MERGES[layout](backward)
        counts.gradients(sim.adapter_grad_lors, 2048)(backward)
        sums = multiprocessors == 132
        assert len(backward.launches()) == len(forward.launches()) + 2 + sums <= most
