# SPDX-License-Identifier: Apache-2.0
"""Compile every CUDA kernel and hold it to its budget: registers, instructions of the hot loop, no local memory at all.

    python tests/kernels/compile_kernels.py --archs "80;90a"            compile, print, check
    python tests/kernels/compile_kernels.py --archs "80;90a" --update   rewrite the two tables with what was found

registers.csv names every kernel and the most registers it may use on any architecture; instructions.csv the most
machine instructions that its hot loop (sass.py) may have on sm_90a. A kernel that is missing, uses more, spills, has a
stack frame, or converts single values in its hot loop (F2F) fails the run. Needs nvcc, no GPU.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from sass import HotLoop, disassembled, hot_loops

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "core" / "cuda"
TABLE = Path(__file__).with_name("registers.csv")
LOOPS = Path(__file__).with_name("instructions.csv")
LOOP_ARCH = "90a"  # whose machine code is counted


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture. Bytes, except `registers`."""

    name: str
    arch: str
    registers: int
    static_shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def parse(log: str) -> list[Kernel]:
    """The kernels in the output of `ptxas -v`."""
    kernels = []
    entry = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'")
    frame = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
    used = re.compile(r"Used (\d+) registers")
    name = arch = None
    stack: tuple[int, int, int] | None = None
    for line in log.splitlines():
        if match := entry.search(line):
            name, arch, stack = match["name"], match["arch"], None
        elif name and (match := frame.search(line)):
            stack = (int(match[1]), int(match[2]), int(match[3]))
        elif name and arch and stack and (match := used.search(line)):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels.append(Kernel(name, arch, int(match[1]), int(shared[1]) if shared else 0, *stack))
            name = None
    return kernels


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Mangled to readable names, without the parameter list and our namespaces."""
    ordered = sorted(set(names))
    result = subprocess.run(["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True)
    readable = {}
    for mangled, text in zip(ordered, result.stdout.splitlines(), strict=True):
        text = re.sub(r"\([^()]*\)$", "", text.removeprefix("void "))
        text = text.replace("(anonymous namespace)::", "").replace("lors::cuda::", "").replace("lors::", "")
        readable[mangled] = text.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
    return readable


def compile_source(
    nvcc: str, source: Path, archs: Sequence[str], directory: Path
) -> tuple[str, float, dict[str, HotLoop]]:
    """Output of nvcc for one source file, its seconds, and the hot loops; SystemExit with nvcc's words if it fails."""
    command = [nvcc, "-std=c++20", "-Xptxas=-v,-warn-spills,-Werror", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command += [f'-DLORS_CUDA_ARCHS_TEXT="{",".join(archs)}"', "-I", str(SOURCES.parent / "include")]
    compiled = directory / f"{source.stem}.o"
    command += ["-c", str(source), "-o", str(compiled)]
    start = perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stdout + result.stderr).splitlines()
        words = "\n".join(line for line in lines if not line.startswith(("ptxas info", "    ")))
        raise SystemExit(f"{source.relative_to(ROOT)} does not compile:\n{words}")
    seconds = perf_counter() - start
    loops = hot_loops(disassembled(compiled, LOOP_ARCH, directory / source.stem)) if LOOP_ARCH in archs else {}
    return result.stdout + result.stderr, seconds, loops


def read_table(path: Path) -> dict[str, int]:
    """Of one of the two: its second column, by kernel."""
    with path.open(newline="") as file:
        return {row["kernel"]: int(row[path.stem]) for row in csv.DictReader(file)}


def update_table(path: Path, found: dict[str, int]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", path.stem])
        writer.writerows(sorted(found.items()))
    print(f"{path.relative_to(ROOT)} rewritten")


def problems(kernels: Sequence[Kernel], names: dict[str, str], budgets: dict[str, int]) -> list[str]:
    """What breaks a rule, a sentence each."""
    found = []
    for kernel in kernels:
        name = names[kernel.name]
        where = f"{name} on sm_{kernel.arch}"
        if kernel.stack or kernel.spill_stores or kernel.spill_loads:
            found.append(
                f"{where} uses local memory: a stack frame of {kernel.stack} bytes, {kernel.spill_stores} bytes of "
                f"spill stores, {kernel.spill_loads} of loads; index register arrays by constants, or use fewer values."
            )
        if kernel.static_shared:
            found.append(
                f"{where} has {kernel.static_shared} bytes of static shared memory; use ptx::dynamic_shared()."
            )
        if name not in budgets:
            found.append(f"{name} is not in {TABLE.name}; look at what it uses, then run this with --update.")
        elif kernel.registers > budgets[name]:
            found.append(f"{where} uses {kernel.registers} registers, its budget is {budgets[name]} ({TABLE.name}).")
    return found + strangers(budgets, names.values(), TABLE)


def loop_problems(loops: dict[str, HotLoop], budgets: dict[str, int]) -> list[str]:
    """The same of the hot loops, by readable name."""
    found = []
    for name, loop in sorted(loops.items()):
        where = f"{name} on sm_{LOOP_ARCH}"
        if loop.single_converts:
            found.append(
                f"{where} converts {loop.single_converts} single values in its hot loop (F2F); use rounded_pair, which "
                "converts two in one instruction."
            )
        if name not in budgets:
            found.append(f"{name} is not in {LOOPS.name}; look at its hot loop, then run this with --update.")
        elif loop.instructions > budgets[name]:
            found.append(
                f"{where} has {loop.instructions} instructions in its hot loop, its budget is {budgets[name]} "
                f"({LOOPS.name})."
            )
        elif 2 * loop.instructions < budgets[name]:
            found.append(
                f"{where} has {loop.instructions} instructions in its hot loop, less than half of its budget of "
                f"{budgets[name]}: a budget that holds nothing, or another loop; look, then run this with --update."
            )
    return found + strangers(budgets, loops, LOOPS)


def strangers(budgets: dict[str, int], names: Iterable[str], table: Path) -> list[str]:
    return [
        f"{name} is in {table.name}, but there is no such kernel; run this with --update."
        for name in sorted(set(budgets) - set(names))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default="80;90a", help="separated by semicolons (default: %(default)s)")
    parser.add_argument("--update", action="store_true", help="rewrite the tables instead of checking them")
    parser.add_argument("--jobs", type=int, default=2, help="files compiled at a time (default: %(default)s)")
    arguments = parser.parse_args(argv)
    archs = [arch for arch in arguments.archs.replace(",", ";").split(";") if arch]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit(
            "nvcc was not found; install the CUDA toolkit (13.0 was tried) and put its bin folder on PATH."
        )
    # In the order of the build, which begins with the longest.
    sources = [ROOT / path for path in re.findall(r"csrc/core/cuda/\w+\.cu\b", (ROOT / "CMakeLists.txt").read_text())]
    start = perf_counter()
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(arguments.jobs) as pool:
        compiled = list(pool.map(lambda source: compile_source(nvcc, source, archs, Path(directory)), sources))
    kernels = [kernel for log, _, _ in compiled for kernel in parse(log)]
    names = demangled(kernel.name for kernel in kernels)
    loops = {names[name]: loop for _, _, of in compiled for name, loop in of.items()}

    width = max(len(name) for name in names.values())
    titles = "  ".join(f"sm_{arch:<5}" for arch in archs)
    print(f"{'kernel':<{width}}  {titles}  registers; instructions of the hot loop on sm_{LOOP_ARCH}")
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault(names[kernel.name], {})[kernel.arch] = kernel
    for name in sorted(rows):
        registers = "  ".join(f"{rows[name][arch].registers:>8}" for arch in archs)
        print(f"{name:<{width}}  {registers}  {loops[name].instructions if name in loops else '':>8}")
    print(
        "no spills, stack frames or static shared memory"
        if not any(k.stack for k in kernels)
        else "LOCAL MEMORY IN USE"
    )
    for source, (_, seconds, _) in zip(sources, compiled, strict=True):
        print(f"{source.name:<24} {seconds:6.1f} s")
    print(f"{len(kernels)} kernels of {len(sources)} files in {perf_counter() - start:.0f} s")

    if arguments.update:
        old = read_table(TABLE) if TABLE.exists() else {}  # other architectures keep what they need
        used = {name: max(k.registers for k in by_arch.values()) for name, by_arch in rows.items()}
        update_table(TABLE, {name: max(n, old.get(name, 0)) for name, n in used.items()})
        if loops:
            update_table(LOOPS, {name: loop.instructions for name, loop in loops.items()})
        return 0
    failed = problems(kernels, names, read_table(TABLE))
    if loops:
        failed += loop_problems(loops, read_table(LOOPS))
    for sentence in failed:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
