# SPDX-License-Identifier: Apache-2.0
"""Fine-tune sparse language models with LoRS: masked low-rank adapters that keep every zero (arXiv 2501.08582)."""

from ._library import BUILD
from .functional import lors_linear, merge
from .linear import LoRSLinear
from .sparse import SparseWeight

__version__ = BUILD["version"]

__all__ = [
    "LoRSLinear",
    "SparseWeight",
    "lors_linear",
    "merge",
]
