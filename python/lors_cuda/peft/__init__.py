# SPDX-License-Identifier: Apache-2.0
"""LoRS as a PEFT method: ``peft.get_peft_model(model, LoRSLoraConfig(...))`` gives PEFT models with masked adapters.

Importing this module registers the method with the peft package; `import lors_cuda` alone does not import peft.
"""

from __future__ import annotations

from ._versions import require_peft

require_peft()

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from peft.utils.peft_types import PeftType

from .config import PEFT_METHOD, LoRSLoraConfig
from .gradients import estimate_gradients, init_from_gradients
from .layer import LoRSLoraLinear
from .loading import from_pretrained
from .model import LoRSLoraModel

# What `peft.utils.register_peft_method` does, which takes the names of PEFT's own enumeration only.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_METHOD] = LoRSLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_METHOD] = LoRSLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_METHOD] = LoRSLoraModel.prefix
# Hotswapping compares these fields of two adapters; "lors" holds the fingerprints of the masks.
CONFIG_KEYS_TO_CHECK[PEFT_METHOD] = [*CONFIG_KEYS_TO_CHECK[PeftType.LORA], "lors"]

__all__ = [
    "LoRSLoraConfig",
    "LoRSLoraLinear",
    "LoRSLoraModel",
    "estimate_gradients",
    "from_pretrained",
    "init_from_gradients",
]
