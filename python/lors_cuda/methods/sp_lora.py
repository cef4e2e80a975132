# SPDX-License-Identifier: Apache-2.0
# Y = X (W + s M o (B A))^T with the true gradient of that function: what gradient="exact" computes, the merged weight
# made again in backward. SP-LoRA, OpenReview rXNGpyxsLQ, the first version of LoRS.
"""SP-LoRA: masked adapters with exact gradients."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ._method import Method


@dataclasses.dataclass(frozen=True)
class SPLoRA(Method):
    """LoRS with ``gradient="exact"``; needs one [out_features, in_features] matrix at a time in backward."""

    name: ClassVar[str] = "sp-lora"
    gradient: ClassVar[str] = "exact"
