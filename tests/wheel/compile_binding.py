# SPDX-License-Identifier: Apache-2.0
"""Compile the binding (csrc/torch, its CUDA half included) against the headers of several torches.

    python tests/wheel/compile_binding.py --torch 2.10.0 2.11.0 newest

Two things are checked. It compiles beside each without a warning, as whoever builds from source may have any of them.
And every function of torch that it needs is declared by the oldest, so that one binary loads beside all of them. Needs
neither a GPU nor nvcc. The headers come from the wheels for macOS, a sixth of those for Linux in size, with the same
files in torch/headeronly, csrc/stable and csrc/inductor (compared for 2.10.0 and 2.11.0 on 2026-11-27).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "torch").glob("*.cpp"))
HEADERS = tuple(f"torch/include/torch/{part}/" for part in ("headeronly", "csrc/stable", "csrc/inductor"))
CUDA = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "include")  # of requirements-dev.txt
DOWNLOAD = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=312"]
DOWNLOAD += ["--platform=macosx_11_0_arm64", "--platform=macosx_14_0_arm64"]
# The definitions and warnings of CMakeLists.txt.
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
FLAGS += ["-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]


def headers_of(version: str, kept: Path) -> Path:
    """The folder with torch's include folder; downloaded unless it is there. What is newest changes: never kept."""
    if version != "newest" and (kept / version).is_dir():
        return kept / version
    with tempfile.TemporaryDirectory() as folder:
        wanted = "torch" if version == "newest" else f"torch=={version}"
        subprocess.run([sys.executable, "-m", "pip", "download", *DOWNLOAD, "--dest", folder, wanted], check=True)
        (wheel,) = Path(folder).glob("torch-*.whl")
        target = kept / wheel.name.split("-")[1]
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [name for name in archive.namelist() if name.startswith(HEADERS)])
    return target


def compiled(source: Path, headers: Path, output: Path, generated: Path) -> str:
    """Why `source` does not compile; empty if it does."""
    include = [f"-I{ROOT / 'csrc' / 'core' / 'include'}", f"-I{ROOT / 'csrc' / 'core'}", f"-I{generated}"]
    include += ["-isystem", str(headers / "torch" / "include"), "-isystem", str(CUDA)]
    command = [*os.environ.get("CXX", "c++").split(), *FLAGS, *include, "-c", str(source), "-o", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def needed_of_torch(objects: Sequence[Path]) -> set[str]:
    """Torch's functions that the objects call, weak references left out: those are asked for before they are called."""
    listed = subprocess.run(["nm", "-u", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[1] for line in listed.splitlines() if line.split()[:1] == ["U"]}
    return {s for s in symbols if re.match(r"(aoti_)?torch_|_ZNK?(St)?\d+(torch|c10|at)\d", s)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile csrc/torch against the headers of several torches.")
    parser.add_argument("--torch", nargs="+", required=True, metavar="X.Y.Z", help="oldest first; `newest`: pip's")
    given = parser.parse_args(arguments)
    folders = [headers_of(version, ROOT / "build" / "torch-headers") for version in given.torch]
    declared = "".join(path.read_text(errors="replace") for path in sorted(folders[0].rglob("*.h")))
    failed = False
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(os.cpu_count()) as pool:
        template = (ROOT / "csrc" / "torch" / "build_info.h.in").read_text()
        Path(work, "build_info.h").write_text(re.sub(r"@\w+@", "0", template))
        for headers in folders:
            objects = [Path(work, source.stem + ".o") for source in SOURCES]
            errors = list(pool.map(lambda s, o, h=headers: compiled(s, h, o, Path(work)), SOURCES, objects))
            needed = set() if any(errors) else needed_of_torch(objects)
            missing = sorted(name for name in needed if not re.search(rf"\b{name}\b", declared))
            bad = bool(missing) or any(errors)
            print(f"torch {headers.name}: {'FAILED' if bad else f'{len(SOURCES)} files compiled'}")
            print("".join(errors), end="")
            if missing:
                print(f"torch {folders[0].name} does not declare what this binary needs: {', '.join(missing)}.")
            failed = failed or bad
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
