# SPDX-License-Identifier: Apache-2.0
"""Install an sdist in an empty environment, by the line that the README gives, and run the tests of the package there.

python tests/wheel/try_sdist.py dist/*.tar.gz --torch torch==2.13.0
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from try_wheel import NEEDED, PIP, ROOT, fresh_environment, run, try_in


def install_line(readme: str) -> str:
    """The one command of the section Install."""
    section = readme.partition("\n## Install\n")[2].partition("\n## ")[0]
    (line,) = re.findall(r"^ {4}(\S.*)$", section, re.MULTILINE)
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install an sdist by the README's line and test it.")
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--torch", default="torch", help="the torch that the line finds installed")
    parser.add_argument("--index", help="the package index to take torch from")
    given = parser.parse_args(arguments)
    folder = ROOT / "build" / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(given.sdist) as content:
        content.extractall(folder)
    (source,) = folder.iterdir()
    interpreter = fresh_environment(folder / "venv", sys.executable, given.torch, given.index)
    if interpreter is None:
        return 1
    # Without the CUDA backend, so that it takes a minute.
    activated = {"PATH": f"{interpreter.parent}:{os.environ['PATH']}", "SKBUILD_CMAKE_DEFINE": "LORS_CUDA=OFF"}
    line = install_line((source / "README.md").read_text())
    if run(["bash", "-c", line], cwd=source, env={**os.environ, **activated}):
        return 1
    if run([interpreter, *PIP, *NEEDED]):
        return 1
    passed = try_in(interpreter, ["tests/python/repo/test_package.py"])
    shutil.rmtree(folder / "venv")  # gigabytes, with a CUDA build of torch
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
