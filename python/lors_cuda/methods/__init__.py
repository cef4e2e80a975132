# SPDX-License-Identifier: Apache-2.0
"""Adapter methods around LoRS on sparse models: ranks, parametrisations, optimizers and what happens around a step.

``method = lors_cuda.methods.SoRA(); run = method.start(model); optimizer = run.optimizer(lr=2e-3)``; then train as
ever, and ``run.finish()`` before the adapter is saved or merged. The table is in docs/howto/methods.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .._checks import alternatives
from ._method import Combined, Method
from ._pair import Pair
from ._run import Run
from .flat_lora import FlatLoRA
from .gelora import GeLoRA, intrinsic_dimensions
from .geolora import GeoLoRA
from .lora_mini import LoRAMini
from .lora_rite import LoRARITE
from .mora import MoRA
from .rm_lora import RMLoRA
from .sherl import SHERL
from .sora import SoRA
from .sp_lora import SPLoRA
from .xgblora import XGBLoRA

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Method,
        SPLoRA,
        GeLoRA,
        SoRA,
        RMLoRA,
        LoRAMini,
        MoRA,
        LoRARITE,
        XGBLoRA,
        GeoLoRA,
        FlatLoRA,
        SHERL,
    )
}


def get_method(name: str, **options: Any) -> Method:
    """The method of a name, as the command line calls it; "gelora+rm-lora" combines several.

    Args:
        name: one of ``METHODS``, or several with "+" between them.
        options: fields of the methods; each goes to the one that has it.

    Raises:
        ValueError: an unknown name, an option that none or several of them have or with a wrong value, or methods that
            fill the same place.
    """
    names = name.split("+")
    for each in names:
        if each not in METHODS:
            raise ValueError(f"There is no method '{each}'; there are {alternatives(tuple(METHODS))}.")
    classes = [METHODS[each] for each in names]
    given: list[dict[str, Any]] = [{} for _ in classes]
    for option, value in options.items():
        takes = [i for i, kind in enumerate(classes) if option in {field.name for field in dataclasses.fields(kind)}]
        if len(takes) != 1:
            known = [field.name for kind in classes for field in dataclasses.fields(kind)]
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"The method '{name}' has no single option '{option}'; {has}.")
        given[takes[0]][option] = value
    methods = [kind(**fields) for kind, fields in zip(classes, given, strict=True)]
    return methods[0] if len(methods) == 1 else Combined(methods)


__all__ = [
    "METHODS",
    "SHERL",
    "Combined",
    "FlatLoRA",
    "GeLoRA",
    "GeoLoRA",
    "LoRAMini",
    "LoRARITE",
    "Method",
    "MoRA",
    "Pair",
    "RMLoRA",
    "Run",
    "SPLoRA",
    "SoRA",
    "XGBLoRA",
    "get_method",
    "intrinsic_dimensions",
]
