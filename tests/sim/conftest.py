# SPDX-License-Identifier: Apache-2.0
"""The simulator's modules, from LORS_SIM_BUILD (default: build/sim), and the one tolerance of all tests."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
BUILD = Path(os.environ.get("LORS_SIM_BUILD", HERE.parents[1] / "build" / "sim"))
sys.path[:0] = [str(BUILD), str(HERE), str(HERE.parent / "python")]


@pytest.fixture(scope="session")
def sim() -> ModuleType:
    """The plain module. That it has been built is the caller's business: `make test-sim`."""
    return importlib.import_module("lors_sim_plain")
