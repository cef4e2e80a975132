# SPDX-License-Identifier: Apache-2.0
"""Install a wheel into environments of their own and run a good part of the tests there, on the CPU.

    python tests/wheel/try_wheel.py dist/*.whl                                   beside the torch of this environment
    python tests/wheel/try_wheel.py dist/*.whl --python 3.10 3.13 --torch 2.10.0 newest        each Python, each torch

An interpreter that is not there (on PATH, or pyenv's) is named in the table and not tried; none found is a failure.
--torch downloads: a CUDA build of torch is several gigabytes, which --index (torch's own index of CPU builds) spares.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a broken wheel would break: every operator on every layout, the modules, files, and what torch.compile sees.
FILES = ["formats/test_weight", "layer/test_layer", "repo/test_package"]
OPS = ["ops", "functional", "linear_op", "merge", "refusals", "environment", "compile"]
MODEL = ["adapter_directory", "checkpoint", "config", "gradient_init", "gradients", "layouts", "model", "targets"]
FILES += [*(f"ops/test_{name}" for name in OPS), *(f"model/test_{name}" for name in MODEL)]
TESTS = ["tests/wheel/test_installed.py", *(f"tests/python/{name}.py" for name in FILES)]
NEEDED = ["pytest", "pytest-timeout", "hypothesis", "numpy", "packaging", "psutil", "safetensors"]

PIP = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def run(command: Sequence[str | Path], **options: object) -> int:
    print("+", *command, flush=True)
    return subprocess.run([str(c) for c in command], **{"cwd": ROOT, "check": False, **options}).returncode


def find_python(version: str) -> str | None:
    """The interpreter itself; python3.10 on PATH may be a shim that answers only where pyenv is told the version."""
    command = [f"python{version}", "-c", "import sys; print(sys.executable)"]
    options = {"env": {**os.environ, "PYENV_VERSION": version}, "capture_output": True, "text": True, "check": False}
    try:
        done = subprocess.run(command, **options)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def fresh_environment(folder: Path, python: str, torch: str | None, index: str | None) -> Path | None:
    """An environment with a torch alone, or this one's packages; its interpreter, or None if it could not be made."""
    shutil.rmtree(folder, ignore_errors=True)
    if run([python, "-m", "venv", folder]):
        return None
    interpreter = folder / "bin" / "python"
    if torch is None:  # a .pth file does not bring in an editable install beside the packages
        place = subprocess.run(
            [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        Path(place, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return interpreter
    return None if run([interpreter, *PIP, *(["--index-url", index] if index else []), torch]) else interpreter


def described(interpreter: Path) -> str:
    code = "import platform, torch; print('Python', platform.python_version() + ', torch', torch.__version__)"
    return subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def try_in(interpreter: Path, tests: Sequence[str], **variables: str) -> bool:
    """Ask what is installed there what it is, run the tests."""
    options = {"env": {**os.environ, **variables, "OMP_WAIT_POLICY": "passive"}}
    if run([interpreter, "-m", "lors_cuda", "info"], **options):
        return False
    return run([interpreter, "-m", "pytest", "-q", "-r", "fE", *tests], **options) == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install a wheel and run tests against it.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", metavar="X.Y", help="interpreters to try (default: this one)")
    parser.add_argument(
        "--torch", nargs="+", metavar="VERSION", help="torches to install, or `newest` (default: borrow)"
    )
    parser.add_argument("--index", help="the package index to take torch from")
    given = parser.parse_args(arguments)
    wheel = given.wheel.resolve()
    if given.python and not given.torch:
        parser.error("--python needs --torch: another interpreter cannot borrow this one's packages")
    rows, tried, failed = [], 0, 0
    for version in given.python or [None]:
        python = find_python(version) if version else sys.executable
        if python is None:
            rows.append(f"not tried  Python {version}: there is no python{version} on PATH")
            continue
        for torch in given.torch or [None]:
            folder = ROOT / "build" / "wheel-venv" / (f"{version or 'this'}-{torch or 'borrowed'}")
            spec = "torch" if torch == "newest" else torch and f"torch=={torch}"
            interpreter = fresh_environment(folder, python, spec, given.index)
            passed = (
                interpreter is not None
                and not run([interpreter, *PIP, "--no-deps", wheel])
                and (torch is None or not run([interpreter, *PIP, *NEEDED]))
                and try_in(interpreter, TESTS, LORS_WHEEL=str(wheel))
            )
            what = described(interpreter) if interpreter else f"Python {version}, torch {torch}: could not be installed"
            tried, failed = tried + 1, failed + (not passed)
            rows.append(f"{'passed' if passed else 'FAILED':<9}  {what}")
            if torch is not None:
                shutil.rmtree(folder, ignore_errors=True)  # gigabytes
    print(f"\n{wheel.name}", *rows, sep="\n  ")
    return 1 if failed or not tried else 0


if __name__ == "__main__":
    sys.exit(main())
