# SPDX-License-Identifier: Apache-2.0
"""What a wheel is called, from CMake's label to the file's name, and what an sdist holds; nothing is compiled."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "tests" / "wheel"))
check_wheel = importlib.import_module("check_wheel")


def configure(folder: Path, *definitions: str) -> subprocess.CompletedProcess[str]:
    """CMake, as `make wheel` asks it for the label."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("there is no cmake")
    command = [cmake, "-S", str(ROOT), "-B", str(folder), "-DLORS_PYTHON=OFF", *definitions]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def labelled_version(folder: Path) -> str:
    return (folder / "generated" / "wheel_version").read_text().strip()


def test_a_build_without_cuda_is_labelled_cpu(tmp_path):
    done = configure(tmp_path, "-DLORS_CUDA=OFF")
    assert done.returncode == 0, done.stderr
    version, _, label = labelled_version(tmp_path).partition("+")
    assert label == "cpu"
    done = configure(tmp_path, "-DLORS_CUDA=OFF", f"-DSKBUILD_PROJECT_VERSION_FULL={version}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("claimed", ["0.1.0+cu13.sm90a", "0.1.0+cpu.sm80", "9.9.9"])
def test_a_version_that_does_not_fit_the_build_is_refused(tmp_path, claimed):
    done = configure(tmp_path, "-DLORS_CUDA=OFF", f"-DSKBUILD_PROJECT_VERSION_FULL={claimed}")
    assert done.returncode != 0
    error = " ".join(done.stderr.split())
    assert f"The wheel would be called {claimed}, but this build is {labelled_version(tmp_path)}:" in error


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_label_names_the_cuda_major_and_each_architecture_once_in_order(tmp_path):
    done = configure(tmp_path, "-DLORS_CUDA=ON", "-DLORS_CUDA_ARCHS=100a;90a;80;90a")
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    major = listed.partition("release ")[2].partition(".")[0]
    assert labelled_version(tmp_path).partition("+")[2] == f"cu{major}.sm80.sm90a.sm100a"


@pytest.mark.parametrize("archs", ["8.0", "80,90a", ""])
def test_an_architecture_nvcc_would_not_know_is_refused(tmp_path, archs):
    done = configure(tmp_path, f"-DLORS_CUDA_ARCHS={archs}")
    assert done.returncode != 0
    assert "e.g. 80;90a" in " ".join(done.stderr.split())


def test_make_knows_what_all_architectures_are():
    made = subprocess.run(
        ["make", "-n", "wheel", "CUDA_ARCHS=all"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert "'-DLORS_CUDA_ARCHS=80;86;89;90a;100a;120a'" in made
    assert "'--config-settings=cmake.define.LORS_CUDA_ARCHS=80;86;89;90a;100a;120a'" in made


# ---- the finished file ----------------------------------------------------------------------------------------------


def made_up_wheel(folder: Path, version: str, *, cuda: bool, metadata: str | None = None, tag: str = "") -> Path:
    """A file with a wheel's names in it."""
    wheel = folder / f"lors_cuda-{version}-{tag or 'py3-none-manylinux_2_28_x86_64'}.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr(f"lors_cuda-{version}.dist-info/METADATA", f"Version: {metadata or version}\n")
        content.writestr("lors_cuda/_ops.so", "")
        if cuda:
            content.writestr("lors_cuda/_ops_cuda.so", "")
    return wheel


@pytest.fixture
def cuobjdump(tmp_path):
    """One that finds code for 80 and 90a in whatever it is given."""
    script = tmp_path / "cuobjdump"
    lines = [f"ELF file {i}: x.{i}.sm_{arch}.cubin" for i, arch in enumerate(("80", "90a", "80"))]
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(("version", "cuda"), [("1.0+cu13.sm80.sm90a", True), ("1.0+cpu", False), ("1.0", True)])
def test_a_wheel_that_is_what_its_name_says(tmp_path, cuobjdump, version, cuda):
    problems, archs = check_wheel.check(made_up_wheel(tmp_path, version, cuda=cuda), cuobjdump)
    assert problems == []
    assert archs == ({"80", "90a"} if cuda else set())


@pytest.mark.parametrize(
    ("wheel", "problem"),
    [
        ({"version": "1.0+cu13.sm90a", "cuda": True}, "it is labelled +cu13.sm90a and holds code for 80, 90a"),
        ({"version": "1.0+cu13.sm80.sm90a", "cuda": False}, "it is labelled +cu13.sm80.sm90a and has no CUDA backend"),
        ({"version": "1.0+cpu", "cuda": True}, "it is labelled +cpu and has a CUDA backend"),
        (
            {"version": "1.0+cpu", "cuda": False, "metadata": "1.0"},
            "its metadata say version 1.0; its name says 1.0+cpu",
        ),
        ({"version": "1.0", "cuda": False, "tag": "py3-none-linux_x86_64"}, "no manylinux tag"),
        ({"version": "1.0", "cuda": False, "tag": "cp311-cp311-manylinux_2_28_x86_64"}, "they must be py3-none"),
    ],
)
def test_a_wheel_that_is_not(tmp_path, cuobjdump, wheel, problem):
    problems, _ = check_wheel.check(made_up_wheel(tmp_path, **wheel), cuobjdump)
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_wheel_that_no_interpreter_could_try_has_not_passed(tmp_path, capsys):
    try_wheel = importlib.import_module("try_wheel")
    assert try_wheel.main([str(tmp_path / "some.whl"), "--python", "9.99", "--torch", "newest"]) == 1
    assert "not tried  Python 9.99: there is no python9.99 on PATH" in capsys.readouterr().out


# ---- the sdist ------------------------------------------------------------------------------------------------------


def test_the_sdist_has_every_tracked_file_and_the_plain_version(tmp_path):
    """Whatever the environment says of labels; a wheel is built from one by `make test-sdist`."""
    pytest.importorskip("scikit_build_core")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    environment = {**os.environ, "LORS_WHEEL_LABEL": "ON"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        top, files = zip(*(name.split("/", 1) for name in content.getnames()), strict=True)
        assert set(top) == {archive.name.removesuffix(".tar.gz")}
        version = (
            content.extractfile(f"{top[0]}/PKG-INFO").read().decode().partition("\nVersion: ")[2].partition("\n")[0]
        )
    assert "+" not in version
    assert archive.name == f"lors_cuda-{version}.tar.gz"
    left_out = (".ci/", ".git", "bench/results/")
    missing = {f for f in listed.stdout.splitlines() if not f.startswith(left_out) and (ROOT / f).exists()} - set(files)
    assert missing == set()


# ---- the workflows --------------------------------------------------------------------------------------------------


def test_workflows_call_what_exists():
    """Every `make` target, script and path that a workflow's steps name."""
    yaml = pytest.importorskip("yaml")
    called = set()
    for workflow in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        for job in yaml.safe_load(workflow.read_text())["jobs"].values():
            for step in job["steps"]:
                called |= set(re.findall(r"\b(?:make|python|bash) [.a-z][\w./-]*", step.get("run", "")))
    assert {"bash .ci/run", "make test-wheel", "make test-sdist", "python tests/wheel/try_wheel.py"} <= called
    for command in called:
        tool, what = command.split()
        if tool == "make":
            subprocess.run(["make", "-n", what], cwd=ROOT, check=True, capture_output=True)
        else:
            assert (ROOT / what).is_file(), command
