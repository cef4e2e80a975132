# SPDX-License-Identifier: Apache-2.0
"""Fine-tune sparse language models with LoRS: masked low-rank adapters that keep every zero (arXiv 2501.08582).

Needs torch alone; saving adapters also needs safetensors, model directories the ``hf`` extra, and the command line the
``cli`` extra.
"""

from ._library import BUILD, release_scratch
from ._prefetch import prefetch
from .checkpoint import load_adapter, save_adapter
from .config import LoRSConfig
from .functional import grouped_linear, lors_linear, merge
from .gradient_init import estimate_gradients, init_from_gradients
from .interchange import load_sparse_checkpoint, save_sparse_checkpoint
from .linear import LoRSLinear, SparseLinear
from .model import disable_adapter, get_lors_model, merge_and_unload, merge_cache, named_lors_layers
from .quantization import QuantizationGrid
from .weight import SparseWeight

__version__ = BUILD["version"]

__all__ = [
    "LoRSConfig",
    "LoRSLinear",
    "QuantizationGrid",
    "SparseLinear",
    "SparseWeight",
    "disable_adapter",
    "estimate_gradients",
    "get_lors_model",
    "grouped_linear",
    "init_from_gradients",
    "load_adapter",
    "load_sparse_checkpoint",
    "lors_linear",
    "merge",
    "merge_and_unload",
    "merge_cache",
    "named_lors_layers",
    "prefetch",
    "release_scratch",
    "save_adapter",
    "save_sparse_checkpoint",
]
