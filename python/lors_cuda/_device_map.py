# SPDX-License-Identifier: Apache-2.0
# accelerate's hooks on modules of a model loaded with device_map: each moves the inputs to its module's device.
# config.py asks whether a linear with one can be replaced, model.py gives the replacement the same hook.
"""Models spread over devices by accelerate."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def placement_hook(module: nn.Module) -> Any:
    """The hook by which accelerate runs `module` on its device; None without one, or if it does something else."""
    hook = vars(module).get("_hf_hook")
    return None if type(hook).__name__ != "AlignDevicesHook" or is_offloaded(module) else hook


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere and brings them for each forward."""
    return bool(getattr(vars(module).get("_hf_hook"), "offload", False))


def original_forward(module: nn.Module) -> Any:
    """The function that computes the module's forward, seen through accelerate's placement; None if it was replaced."""
    own = vars(module).get("forward")
    if own is None:
        return type(module).forward
    if placement_hook(module) is not None and isinstance(own, functools.partial):
        return getattr(vars(module).get("_old_forward"), "__func__", None)
    return None


def hand_over_placement(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the placement hook of the module it replaces, if that has one."""
    hook = placement_hook(old)
    if hook is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # where the hook comes from

    # Not the same object: it may remember tied weights by their addresses, which are not this module's.
    add_hook_to_module(
        new,
        AlignDevicesHook(
            execution_device=hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys
        ),
    )
