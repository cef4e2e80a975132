# SPDX-License-Identifier: Apache-2.0
"""The CUDA operators without a GPU, as torch.ops.lors_on_cpu: cuda_ops.cpp over a core of plain loops (fake_cuda).
Built once for a run of pytest."""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

import pytest
import torch

HERE = pathlib.Path(__file__).parent
CORE = HERE.parents[1] / "csrc" / "core"
TORCH = pathlib.Path(torch.__file__).parent


def load() -> Any:
    """torch.ops.lors_on_cpu; skips where there is no C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    _build(compiler)
    return torch.ops.lors_on_cpu


@functools.cache
def _build(compiler: str) -> None:
    command = [*compiler.split(), "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    command += ["-isystem", str(TORCH / "include"), f"-I{HERE / 'fake_cuda'}", f"-I{CORE}", f"-I{CORE / 'include'}"]
    with tempfile.TemporaryDirectory(prefix="lors_fake_cuda_") as folder:
        library = pathlib.Path(folder) / "binding.so"
        command += [str(HERE / "fake_cuda" / "binding.cpp"), "-o", str(library)]
        command += ["-Wl,--no-as-needed", str(TORCH / "lib" / "libtorch.so")]
        command += ["-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{TORCH / 'lib'}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        torch.ops.load_library(str(library))
