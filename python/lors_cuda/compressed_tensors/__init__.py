# SPDX-License-Identifier: Apache-2.0
"""Model directories in the sparse formats of compressed-tensors; docs/interchange.md specifies them bit by bit."""

from .checkpoint import load_sparse_checkpoint, save_sparse_checkpoint

__all__ = ["load_sparse_checkpoint", "save_sparse_checkpoint"]
