# SPDX-License-Identifier: Apache-2.0
# Importing the fixture into a test file gives each of its tests an accelerate without settings of another one.
"""accelerate, and so the Trainer, keeps its settings (mixed precision, accumulation) in class attributes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_accelerate() -> Iterator[None]:
    state = pytest.importorskip("accelerate").state
    kinds = (state.AcceleratorState, state.GradientState, state.PartialState)
    for kind in kinds:
        kind._shared_state.clear()
    yield
    for kind in kinds:
        kind._shared_state.clear()
