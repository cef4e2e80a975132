# SPDX-License-Identifier: Apache-2.0
"""LoRS as a PEFT method: ``peft.get_peft_model(model, LoRSLoraConfig(...))`` gives PEFT models with masked adapters.

Importing this module registers the method with the peft package; ``import lors_cuda`` alone does not import peft.
"""

from __future__ import annotations

import re

#: The first version of PEFT that works. A newer one is tried: what it adds is refused or ignored by name.
MINIMUM_PEFT = "0.21"


def require_peft() -> None:
    """Refuse a PEFT that is missing or too old.

    Raises:
        ImportError: the sentence says what is installed and what to install.
    """
    try:
        import peft
    except ImportError as error:
        if error.name != "peft":
            raise
        raise ImportError(
            "lors_cuda.peft needs the peft package, which is not installed: pip install 'lors-cuda[peft]'"
        ) from None
    if _number(peft.__version__) < _number(MINIMUM_PEFT):
        raise ImportError(
            f"lors_cuda.peft works with peft >= {MINIMUM_PEFT}, and {peft.__version__} is installed: "
            "pip install 'lors-cuda[peft]'"
        )


def _number(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


require_peft()  # before the modules below, which build on PEFT's own

from .config import LoRSLoraConfig  # noqa: E402
from .gradients import estimate_gradients, init_from_gradients  # noqa: E402
from .layer import LoRSLoraLinear  # noqa: E402
from .loading import from_pretrained  # noqa: E402
from .model import LoRSLoraModel  # noqa: E402

__all__ = [
    "MINIMUM_PEFT",
    "LoRSLoraConfig",
    "LoRSLoraLinear",
    "LoRSLoraModel",
    "estimate_gradients",
    "from_pretrained",
    "init_from_gradients",
]
