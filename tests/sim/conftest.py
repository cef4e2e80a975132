# SPDX-License-Identifier: Apache-2.0
"""The simulator's modules, from LORS_SIM_BUILD (default: build/sim), and the one tolerance of all tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]

import lors_sim  # noqa: E402


def simulator() -> ModuleType:
    """The plain module; `make test-sim` builds it."""
    return lors_sim.module("plain")


@pytest.fixture(scope="session")
def sim() -> ModuleType:
    return simulator()


@pytest.fixture(scope="session")
def race_sim() -> lors_sim.Simulator:
    """The same with the race detector on, and threads preempted at random accesses."""
    return lors_sim.load("race")
