# SPDX-License-Identifier: Apache-2.0
"""The CUDA operators without a GPU, as torch.ops.lors_on_cpu: cuda_ops.cpp over a core of plain loops (fake_cuda) and a
cuSPARSELt that computes on the CPU (tests/fake_cusparselt). Built once for a run of pytest."""

from __future__ import annotations

import ctypes
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
# The core's host code is the real one; the kernels are those of fake_cuda.
SOURCES = (HERE / "fake_cuda" / "binding.cpp", *(CORE / "cuda" / name for name in
           ("cusparselt.cpp", "product_choice.cpp", "sparse_product.cpp")))  # fmt: skip


def load() -> Any:
    """torch.ops.lors_on_cpu; skips where there is no C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    _build(compiler)
    return torch.ops.lors_on_cpu


def calls(function: str) -> int:
    """How often the operators have called ``cusparseLt<function>`` so far."""
    return int(_cusparselt().fake_calls(function.encode()))


@functools.cache
def _folder() -> pathlib.Path:
    folder = tempfile.TemporaryDirectory(prefix="lors_fake_cuda_")
    _folder.keep = folder  # type: ignore[attr-defined]  # removed when the process ends
    return pathlib.Path(folder.name)


@functools.cache
def _cusparselt() -> ctypes.CDLL:
    return ctypes.CDLL(str(_folder() / "cusparselt.so"))


@functools.cache
def _build(compiler: str) -> None:
    common = [*compiler.split(), "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi"]
    cusparselt = [
        *common,
        str(HERE.parent / "fake_cusparselt" / "fake_cusparselt.cpp"),
        "-o",
        _folder() / "cusparselt.so",
    ]
    binding = [*common, "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    binding += ["-isystem", str(TORCH / "include"), f"-I{HERE / 'fake_cuda'}", f"-I{CORE}", f"-I{CORE / 'include'}"]
    # binding.cpp renames the namespace by itself, after torch's headers.
    objects = []
    processes = [subprocess.Popen(list(map(str, cusparselt)), stderr=subprocess.PIPE, text=True)]
    for source in SOURCES:
        objects.append(_folder() / f"{source.stem}.o")
        renamed = [] if source.stem == "binding" else ["-Dlors=lors_on_cpu"]
        command = [*binding, *renamed, "-c", str(source), "-o", str(objects[-1])]
        processes.append(
            subprocess.Popen([word for word in command if word != "-shared"], stderr=subprocess.PIPE, text=True)
        )
    for process in processes:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-4000:]
    library = _folder() / "binding.so"
    link = [*common, *map(str, objects), "-o", str(library), "-Wl,--no-as-needed", str(TORCH / "lib" / "libtorch.so")]
    link += ["-ldl", "-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{TORCH / 'lib'}"]
    done = subprocess.run(link, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    torch.ops.load_library(str(library))
    # Read once, now: nothing else in this process shall meet the stand-in, least of all real kernels.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORS_CUSPARSELT", str(_folder() / "cusparselt.so"))
        problem = torch.ops.lors_on_cpu.sparse_product_problem(0)
    assert problem == "", problem
