#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The machine as JSON: its GPU, torch, compilers and tools. Needs nothing but Python; what is missing is null.

python bench/gpu/describe.py OUTPUT.json           exit code 1 with the reason if torch cannot use a GPU
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

QUERY = (
    *("name", "driver_version", "vbios_version", "memory.total", "memory.used", "ecc.mode.current", "compute_mode"),
    *("pstate", "utilization.gpu", "temperature.gpu", "power.draw", "power.limit", "persistence_mode"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)
TOOLS = ("nvcc", "g++", "cmake", "ninja", "compute-sanitizer", "cuobjdump")
PACKAGES = ("pytest", "hypothesis", "pytest_timeout", "xdist", "numpy", "triton", "transformers", "safetensors", "peft")


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def gpus() -> list[dict[str, str]] | None:
    text = output_of("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader")
    if text is None:
        return None
    return [dict(zip(QUERY, map(str.strip, line.split(",")), strict=False)) for line in text.splitlines()]


def torch_found() -> dict[str, Any]:
    try:
        import torch
    except ImportError as missing:
        return {"problem": f"torch cannot be imported by {sys.executable}: {missing}"}
    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "problem": None}
    if torch.version.cuda is None:
        found["problem"] = f"torch {torch.__version__} is a CPU build"
    elif not torch.cuda.is_available():
        found["problem"] = f"torch {torch.__version__} finds no CUDA device"
    else:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def architecture(capability: str) -> str:
    """What LORS_CUDA_ARCHS names it: from 9.0 on with the architecture's own instructions."""
    major, minor = map(int, capability.split("."))
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def main() -> int:
    torch = torch_found()
    nvcc = output_of("nvcc", "--version")
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        memory = None
    machine = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": memory,
        "gpus": gpus(),
        "torch": torch,
        "architecture": architecture(torch["capability"]) if torch.get("capability") else None,
        "nvcc": nvcc.splitlines()[-2:] if nvcc else None,
        "g++": (output_of("g++", "--version") or "").partition("\n")[0] or None,
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "packages": {name: importlib.util.find_spec(name) is not None for name in PACKAGES},
    }
    text = json.dumps(machine, indent=1) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    print(text, end="")
    if torch["problem"]:
        print(f"There is no GPU to run on: {torch['problem']}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
