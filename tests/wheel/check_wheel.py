# SPDX-License-Identifier: Apache-2.0
"""Hold a finished wheel to what its name says, and report its size. `make wheel` ends with it.

    python tests/wheel/check_wheel.py dist/lors_cuda-0.1.0+cu13.sm90a-py3-none-manylinux_2_34_x86_64.whl

The label is derived when CMake configures (cmake/LorsVersion.cmake); here it is compared with the code in the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

from packaging.utils import parse_wheel_filename

CUDA_PART = "lors_cuda/_ops_cuda.so"


def find_cuobjdump() -> str:
    """The CUDA toolkit's, or the one of the package nvidia-cuda-cuobjdump."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for found in Path(place).glob("cu*/bin/cuobjdump"):
            return str(found)
    found_on_path = shutil.which("cuobjdump")
    if found_on_path is None:
        raise FileNotFoundError("cuobjdump was not found; run: pip install nvidia-cuda-cuobjdump")
    return found_on_path


def architectures(library: Path, cuobjdump: str) -> set[str]:
    """The architectures a library holds machine code for, e.g. {"80", "90a"}."""
    listed = subprocess.run([cuobjdump, "--list-elf", library], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"\.sm_(\w+)\.cubin", listed))


def check(wheel: Path, cuobjdump: str | None = None) -> tuple[list[str], set[str]]:
    """What is wrong with a wheel, as sentences, and the architectures it has code for."""
    problems = []
    _, version, _, tags = parse_wheel_filename(wheel.name)
    if {(tag.interpreter, tag.abi) for tag in tags} != {("py3", "none")}:
        problems.append(f"its tags are {', '.join(map(str, tags))}; they must be py3-none: one wheel for every Python")
    if not all(tag.platform.startswith("manylinux_") for tag in tags):
        problems.append("its platform tag is no manylinux tag; auditwheel gives it one")
    archs: set[str] = set()
    with zipfile.ZipFile(wheel) as content, tempfile.TemporaryDirectory() as folder:
        names = content.namelist()
        info = f"lors_cuda-{version}.dist-info"
        metadata = Parser().parsestr(content.read(f"{info}/METADATA").decode())
        if metadata["Version"] != str(version):
            problems.append(f"its metadata say version {metadata['Version']}; its name says {version}")
        strange = [n for n in names if n.split("/")[0] not in ("lors_cuda", info)]
        if strange:
            problems.append(f"it holds {', '.join(strange)}; all it should hold is below lors_cuda")
        if "lors_cuda/_ops.so" not in names:
            problems.append("lors_cuda/_ops.so is missing")
        if CUDA_PART in names:
            archs = architectures(Path(content.extract(CUDA_PART, folder)), cuobjdump or find_cuobjdump())
            if not archs:
                problems.append(f"{CUDA_PART} holds no machine code for any architecture")
    if version.local is not None:
        label = version.local.split(".")
        named = {part.removeprefix("sm") for part in label[1:]}
        if (label[0] == "cpu") == (CUDA_PART in names):
            has = "a" if CUDA_PART in names else "no"
            problems.append(f"it is labelled +{version.local} and has {has} CUDA backend")
        elif named != archs:
            problems.append(
                f"it is labelled +{version.local} and holds code for {', '.join(sorted(archs)) or 'no architecture'}"
            )
    return problems, archs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hold a wheel to what its name says, and report its size.")
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args(arguments).wheel
    problems, archs = check(wheel)
    with zipfile.ZipFile(wheel) as content:
        unpacked = sum(entry.file_size for entry in content.infolist())
    print(wheel)
    print(f"  {wheel.stat().st_size / 1e6:.1f} MB, {unpacked / 1e6:.1f} MB unpacked; ", end="")
    print(f"code for {', '.join(sorted(archs))}" if archs else "no CUDA backend")
    for problem in problems:
        print(f"  {wheel.name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
