# SPDX-License-Identifier: Apache-2.0
"""Break a kernel on purpose and see whether a case notices.

    python tests/sim/mutants.py merge                 every mutant of a family, against cases/merge.py
    python tests/sim/mutants.py merge --list          only say what they are

The barriers and waits of a family are found in its sources, so a new one is covered without being written down.
Other mistakes worth testing are listed in the case file, as PLANTED.
A mutant costs one compilation of the family's .cu and one link; everything else is taken from the build.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import lors_sim

SOURCES = lors_sim.ROOT / "csrc" / "core" / "cuda"
CASES = Path(__file__).resolve().parent / "cases"


@dataclass(frozen=True)
class Mutant:
    family: str
    file: str  # in csrc/core/cuda
    name: str  # stable under edits elsewhere in the file, unlike a line number
    before: str = field(repr=False)  # the file's text
    after: str = field(repr=False)


@dataclass(frozen=True)
class Result:
    caught: bool
    how: str


def sources(family: str) -> list[str]:
    """The files of csrc/core/cuda that a family's .cu includes, itself first, but for ptx.h and launch.h."""
    given = lors_sim.settings("plain")
    command = [given["compiler"], *given["flags"], "-MM", "-xc++", str(SOURCES / f"{family}.cu")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    paths = [Path(word).resolve() for word in text.replace("\\\n", " ").split()[1:]]
    names = [path.name for path in paths if path.parent == SOURCES]
    return [name for name in names if name not in ("ptx.h", "launch.h")]


def without_comments(text: str) -> str:
    """The same length, so that places stay the same."""
    return re.sub(r"//[^\n]*", lambda match: " " * len(match[0]), text)


def removals(family: str) -> list[Mutant]:
    """One mutant per barrier and wait of the family: removed, or made too weak in the case of cp_async_wait."""
    found = []
    for file in sources(family):
        text = (SOURCES / file).read_text()
        for kind, pattern, weaker in (
            ("__syncthreads", r"__syncthreads\(\);", "(void)0;"),
            ("__syncwarp", r"__syncwarp\([^;]*\);", "(void)0;"),
            ("mbarrier_wait", r"mbarrier_wait\([^;]*\);", "cluster_rank();"),
            ("fence_mbarrier_init", r"fence_mbarrier_init\(\);", "cluster_rank();"),
            ("cluster barrier", r"cluster_arrive\(\);\s*ptx::cluster_wait\(\);", "cluster_rank();"),
            ("cp_async_wait", r"cp_async_wait<([^;]*)>\(\);", r"cp_async_wait<(\1) + 1>();"),
        ):
            for i, match in enumerate(re.finditer(pattern, without_comments(text))):
                mutated = text[: match.start()] + match.expand(weaker) + text[match.end() :]
                found.append(Mutant(family, file, f"{file}: {kind} {i + 1}", text, mutated))
    return found


def replacement(family: str, file: str, old: str, new: str) -> Mutant:
    """`old`, which must occur once in the file, becomes `new`."""
    text = (SOURCES / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{old!r} occurs {text.count(old)} times in {file}; it has to occur once")
    return Mutant(family, file, f"{file}: {old} -> {new}", text, text.replace(old, new))


def planted(family: str) -> list[Mutant]:
    """The mistakes that the family's case file lists: PLANTED = [(file, old text, new text), ...]."""
    spec = importlib.util.spec_from_file_location(f"case_{family}", CASES / f"{family}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(CASES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(CASES))
    return [replacement(family, *change) for change in getattr(module, "PLANTED", [])]


def all_of(family: str) -> list[Mutant]:
    return removals(family) + planted(family)


def build(mutant: Mutant, flavour: str, directory: Path) -> None:
    """The flavour's module with the mutated family, in `directory`."""
    given = lors_sim.settings(flavour)
    copy = directory / "cuda"
    shutil.copytree(SOURCES, copy)
    if (copy / mutant.file).read_text() != mutant.before:
        raise RuntimeError(f"{mutant.file} has changed since its mutants were listed")
    (copy / mutant.file).write_text(mutant.after)
    fresh = directory / f"{mutant.family}.o"
    # Unoptimised: the compiler is what takes the time.
    compile_command = [
        given["compiler"],
        *given["flags"],
        "-O0",
        "-w",
        "-xc++",
        "-c",
        str(copy / f"{mutant.family}.cu"),
    ]
    subprocess.run([*compile_command, "-o", str(fresh)], check=True, capture_output=True, text=True)
    old = [path for path in given["objects"] if path.endswith(f"/cuda/{mutant.family}.cu.o")]
    if len(old) != 1:
        raise ValueError(f"the build has no family {mutant.family}")
    # First: of a kernel that several families include, the linker takes the first definition.
    objects = [str(fresh), *(path for path in given["objects"] if path != old[0])]
    links = [flag for flag in given["links"] if flag]
    command = [given["compiler"], "-shared", *links, *objects, "-o", str(directory / given["module"])]
    subprocess.run(command, check=True, capture_output=True, text=True)


def run(mutant: Mutant, case: str, flavour: str = "race", timeout: float = 300) -> Result:
    """Whether the case (see lors_sim.run_case) fails on the mutant. A mutant that does not compile raises."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        try:
            build(mutant, flavour, directory)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{mutant.name} does not compile:\n{error.stderr}") from error
        outcome = lors_sim.run_case(flavour, case, build=directory, timeout=timeout)
    lines = [line for line in outcome.text.strip().splitlines() if line.strip()]
    return Result(not outcome.passed, lines[-1] if lines else "")


def families() -> list[str]:
    """Those that have cases."""
    return sorted(path.stem for path in CASES.glob("*.py") if (SOURCES / f"{path.stem}.cu").exists())


def case_of(family: str) -> str:
    return f"{CASES / family}.py:check"


def require_right(family: str, flavour: str = "race") -> None:
    """The case has to pass on the sources as they are; else it would `catch` anything."""
    outcome = lors_sim.run_case(flavour, case_of(family))
    if not outcome.passed:
        raise RuntimeError(f"{case_of(family)} fails without a mutant:\n{outcome.text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family")
    parser.add_argument("--flavour", default="race", choices=lors_sim.FLAVOURS)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if not arguments.list:
        require_right(arguments.family, arguments.flavour)
    missed = 0
    for mutant in all_of(arguments.family):
        if arguments.list:
            print(mutant.name)
            continue
        result = run(mutant, case_of(arguments.family), arguments.flavour)
        print(
            f"{'caught' if result.caught else 'MISSED'}  {mutant.name}  {result.how if result.caught else ''}",
            flush=True,
        )
        missed += not result.caught
    return min(missed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
