# SPDX-License-Identifier: Apache-2.0
"""LoRS as a PEFT method: ``peft.get_peft_model(model, LoRSLoraConfig(...))`` gives PEFT models with masked adapters.

Importing this module registers the method with the peft package; ``import lors_cuda`` alone does not import peft.
"""

from ._versions import SUPPORTED_PEFT  # first: refuses another PEFT with a sentence
from .config import LoRSLoraConfig
from .gradients import estimate_gradients, init_from_gradients
from .layer import LoRSLoraLinear
from .loading import from_pretrained
from .model import LoRSLoraModel

__all__ = [
    "SUPPORTED_PEFT",
    "LoRSLoraConfig",
    "LoRSLoraLinear",
    "LoRSLoraModel",
    "estimate_gradients",
    "from_pretrained",
    "init_from_gradients",
]
