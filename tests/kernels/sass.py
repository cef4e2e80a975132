# SPDX-License-Identifier: Apache-2.0
"""The hot loop of a compiled kernel: its machine instructions, counted.

A loop is the code from the target of a backward branch to that branch; an instruction of a nested loop counts once. The
hot loop is the smallest one that both multiplies on tensor cores and moves data to or from global memory; failing that,
the smallest that multiplies; failing that, the smallest that moves data. A kernel without loops is all of its code.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FUNCTION = re.compile(r"^\.text\.(\w+):", re.MULTILINE)
_LINE = re.compile(
    r"^(?P<label>\.L\w+):|^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[\w.]+)(?P<rest>[^;]*);", re.MULTILINE
)
_MULTIPLIES = ("HMMA", "HGMMA", "IMMA")
_MOVES = ("LDG", "STG", "LDGSTS", "UBLKCP", "UTMALDG")


@dataclass(frozen=True)
class HotLoop:
    """Of one kernel on one architecture."""

    instructions: int
    single_converts: int  # F2F: one value per instruction, at a sixteenth of the rate of a packed convert
    counts: Counter[str]  # by the name without its suffixes


def tool(name: str) -> str:
    """The program of the CUDA toolkit, or of the Python packages nvidia-cuda-*."""
    packaged = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", name)
    found = str(packaged) if packaged.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} was not found; run: pip install nvidia-cuda-{name}")
    return found


def disassembled(object_file: Path, arch: str, directory: Path) -> str:
    """What nvdisasm says of the code for `arch` in an object file of nvcc."""
    directory.mkdir()
    extract = [tool("cuobjdump"), "--extract-elf", f"sm_{arch}", str(object_file.resolve())]
    subprocess.run(extract, cwd=directory, check=True, capture_output=True)
    text = ""
    for cubin in sorted(directory.glob("*.cubin")):
        text += subprocess.run([tool("nvdisasm"), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    return text


def hot_loops(text: str) -> dict[str, HotLoop]:
    """By the mangled name of the kernel, from nvdisasm's text."""
    pieces = _FUNCTION.split(text)[1:]
    return {name: _hot_loop(body) for name, body in zip(pieces[::2], pieces[1::2], strict=True)}


def _hot_loop(body: str) -> HotLoop:
    names, labels, branches = [], {}, []
    for match in _LINE.finditer("".join(_code(body))):
        if match["label"]:
            labels[match["label"]] = len(names)
            continue
        names.append(match["name"])
        if match["name"].split(".")[0] == "BRA" and (target := re.search(r"\.L\w+", match["rest"])):
            branches.append((len(names), target[0]))
    loops = [(labels[target], end) for end, target in branches if target in labels and labels[target] < end - 1]

    def smallest(*kinds: tuple[str, ...]) -> tuple[int, int] | None:
        def has(loop: tuple[int, int], kind: tuple[str, ...]) -> bool:
            return any(name.split(".")[0] in kind for name in names[slice(*loop)])

        of = [loop for loop in loops if all(has(loop, kind) for kind in kinds)]
        return min(of, key=lambda loop: loop[1] - loop[0], default=None)

    first, end = smallest(_MULTIPLIES, _MOVES) or smallest(_MULTIPLIES) or smallest(_MOVES) or (0, len(names))
    counts = Counter(name.split(".")[0] for name in names[first:end])
    return HotLoop(end - first, counts["F2F"], counts)


def _code(body: str) -> Iterator[str]:
    """The lines up to the next section, without the padding behind the kernel's end."""
    for line in body.splitlines(keepends=True):
        if line.startswith("//---") or "\t.section" in line:
            return
        yield line
