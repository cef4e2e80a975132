# SPDX-License-Identifier: Apache-2.0
# Importing the fixture into a test file gives each of its tests an accelerate without settings of an earlier one.
"""accelerate, and so the Trainer, keeps its settings (mixed precision, accumulation) in class attributes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_accelerate() -> Iterator[None]:
    state = pytest.importorskip("accelerate").state
    yield
    for kind in (state.AcceleratorState, state.GradientState, state.PartialState):
        kind._shared_state.clear()
