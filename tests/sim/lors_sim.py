# SPDX-License-Identifier: Apache-2.0
"""Load a flavour of the simulator, or run a case on it in a process of its own.

A case is a function of a Python file, named "path/to/file.py:function" and called as function(sim, **arguments);
`sim` is the flavour's module. It fails by raising anything. Run as a program, this file is that process:

    python lors_sim.py FLAVOUR FILE:FUNCTION [ARGUMENTS AS JSON]
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FLAVOURS = ("plain", "race", "asan")


def build_directory() -> Path:
    return Path(os.environ.get("LORS_SIM_BUILD", ROOT / "build" / "sim"))


def module_name(flavour: str) -> str:
    # The race detector is a switch of the plain module, not code of its own.
    return "lors_sim_asan" if flavour == "asan" else "lors_sim_plain"


def settings(flavour: str, build: Path | None = None) -> dict[str, Any]:
    """What CMake wrote about the build of a flavour: see CMakeLists.txt."""
    return json.loads(((build or build_directory()) / f"{module_name(flavour)}.json").read_text())


class Simulator:
    """The module of a flavour. Device's defaults are the flavour's."""

    def __init__(self, module: Any, flavour: str) -> None:
        self._module = module
        self.flavour = flavour
        defaults = {"race": True, "preempt": 0.02} if flavour == "race" else {}
        self.Device = functools.partial(module.Device, **defaults)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def module(flavour: str = "plain") -> ModuleType:
    """The flavour's module, for this process. The asan flavour needs its runtime preloaded: use run_case."""
    directory = str(build_directory())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    return importlib.import_module(module_name(flavour))


def load(flavour: str = "plain") -> Simulator:
    return Simulator(module(flavour), flavour)


@dataclass(frozen=True)
class Outcome:
    passed: bool
    text: str  # what the process printed


def run_case(
    flavour: str,
    case: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    build: Path | None = None,
    timeout: float = 300,
) -> Outcome:
    """Run a case in a process of its own. A crash, a sanitizer's report and a timeout are failures like any other."""
    build = build or build_directory()
    environment = {**os.environ, "LORS_SIM_BUILD": str(build), "OPENBLAS_NUM_THREADS": "1"}
    if flavour == "asan":
        environment["LD_PRELOAD"] = settings(flavour)["asan_preload"]
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's own
        environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    command = [sys.executable, __file__, flavour, case, json.dumps(arguments or {})]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as late:
        return Outcome(False, f"no end within {late.timeout} s")
    return Outcome(done.returncode == 0, done.stdout + done.stderr)


def main() -> None:
    flavour, case = sys.argv[1], sys.argv[2]
    arguments = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    path, _, function = case.rpartition(":")
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, function)(load(flavour), **arguments)


if __name__ == "__main__":
    main()
