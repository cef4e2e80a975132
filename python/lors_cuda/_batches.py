# SPDX-License-Identifier: Apache-2.0
# What every loop over batches needs: the batch on the model's device, no key-value cache, a progress bar.
# Used by pruning, evaluation, gradient_init and the command line; changes no model for good.
"""Helpers to run a model over batches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextlib.contextmanager
def running(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set every module's training flag and switch a transformers model's key-value cache off; undo both afterwards.

    The cache is of no use where whole sequences are run, and costs memory; a block that is run a second time with
    the first run's cache would even see every token twice.
    """
    flags = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        model.train(training)
        if use_cache is not None:
            config.use_cache = False
        yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache
        for module, flag in flags:
            module.training = flag


def progress_bar(items: Iterable[Item], *, total: int, description: str, unit: str, shown: bool) -> Iterable[Item]:
    """Wrap ``items`` in tqdm's bar on stderr, where tqdm is installed and a person looks at a terminal."""
    if not (shown and sys.stdout.isatty() and sys.stderr.isatty()):
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(items, total=total, desc=description, unit=unit, leave=False)
    return bar


class Progress:
    """A bar like :func:`progress_bar`'s for a loop that is somebody else's."""

    def __init__(self, total: int, *, description: str, unit: str, shown: bool) -> None:
        bar = progress_bar(range(total), total=total, description=description, unit=unit, shown=shown)
        self._bar: Any = bar if hasattr(bar, "update") else None

    def advance(self, text: str) -> None:
        """One more is done; ``text`` is shown at the end."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
