# SPDX-License-Identifier: Apache-2.0
# What test_semi_structured.py, test_bitmask.py, test_sparse_checkpoints.py and test_damaged_checkpoints.py start from.
"""Random 2:4 weights, bytes of tensors, and the checkpoints that compressed-tensors wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

WRITTEN = Path(__file__).parent / "compressed_tensors"
DIRECTORIES = sorted(path.name for path in WRITTEN.iterdir() if path.is_dir())


def sparse24(N: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random 2:4 with groups of two, one and no nonzeros, and zeros that are +0."""
    two = (torch.rand(N, K // 4, 4).argsort(-1) < 2).reshape(N, K)
    return (torch.randn(N, K) * (two & (torch.rand(N, K) < 0.7)) + 0.0).to(dtype)


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes: tells +0 from -0, and one NaN from another."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def raw_state(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """The bytes of each tensor."""
    return {name: raw(tensor) for name, tensor in tensors.items()}


@st.composite
def damage(draw):
    """A function of bytes: changes, removes or inserts some, more often in the header than behind it."""
    edit = st.tuples(st.sampled_from(["set", "cut", "insert"]), st.floats(0, 1), st.integers(0, 255))
    edits = draw(st.lists(edit, min_size=1, max_size=4))
    within = draw(st.sampled_from([64, 1500, 10**9]))

    def apply(data: bytes) -> bytes:
        content = bytearray(data)
        for kind, place, value in edits:
            at = min(int(place * min(len(content), within)), max(len(content) - 1, 0))
            if kind == "set" and content:
                content[at] = value
            elif kind == "cut":
                del content[at : at + 1 + value]
            else:
                content[at:at] = bytes([value]) * (1 + value % 9)
        return bytes(content)

    return apply
