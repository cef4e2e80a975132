# SPDX-License-Identifier: Apache-2.0
"""Sparse weights to and from the formats of others: torch's semi-structured tensors, compressed-tensors' checkpoints.

docs/interchange.md describes them bit by bit. Importing this package needs torch alone.
"""

from .checkpoint import load_sparse_checkpoint, save_sparse_checkpoint
from .semi_structured import from_torch_semi_structured, to_torch_semi_structured

__all__ = [
    "from_torch_semi_structured",
    "load_sparse_checkpoint",
    "save_sparse_checkpoint",
    "to_torch_semi_structured",
]
