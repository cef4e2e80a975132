"""The installed package: what it imports, what it says of itself, and that it finds its binaries."""

from __future__ import annotations

import ast
import graphlib
import os
import pathlib
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import lors_cuda
from lors_cuda import _library
from lors_cuda.cli import main


def test_version_is_the_distributions() -> None:
    assert lors_cuda.__version__ == metadata.version("lors-cuda")


def test_import_needs_torch_alone() -> None:
    """No optional package is imported by `import lors_cuda`, nor needed for a training step."""
    code = """
import sys
for name in ("numpy", "transformers", "safetensors", "tqdm", "matplotlib", "peft"):
    sys.modules[name] = None  # importing it raises ImportError
import torch, lors_cuda
layer = lors_cuda.LoRSLinear.from_linear(torch.nn.Linear(8, 4), r=2)
layer(torch.randn(3, 8)).sum().backward()
assert layer.lora_B.grad is not None
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def _imported(module: str, path: pathlib.Path) -> set[str]:
    """The modules of the package that importing this one imports: not inside functions, not for type checkers."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            found |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
        todo += ast.iter_child_nodes(node)
    return found


def test_imports_have_no_cycle() -> None:
    """A cycle would make the result of an import depend on which module was imported first."""
    root = pathlib.Path(lors_cuda.__file__).parent
    files = {}
    for path in root.rglob("*.py"):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        files[".".join(parts).removesuffix(".__init__")] = path
    assert len(files) > 30
    # An ImportFrom of a name names a module or a member of one. A package's members do not import the package.
    graph = {name: (_imported(name, path) & files.keys()) - {name} for name, path in files.items()}
    for name, imported in graph.items():
        graph[name] = {each for each in imported if not name.startswith(f"{each}.")}
    assert "lors_cuda.weight" in graph["lors_cuda.functional"]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_build_info_names_what_serves_this_machine() -> None:
    info = _library.build_info()
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512", "avx512_bf16")
    assert info["version"] == lors_cuda.__version__
    assert info["cuda_available"] == (info["cuda_reason"] is None)


def why_no_cuda(monkeypatch, **found: object) -> str | None:
    """What the package says of CUDA where it was built, and finds torch, like this; torch.version.cuda is `torch`."""
    monkeypatch.setitem(_library.BUILD, "cuda_version", found["built"])
    monkeypatch.setitem(_library.BUILD, "cuda_archs", "80,90a" if found["built"] else "")
    monkeypatch.setattr(torch.version, "cuda", found["torch"])
    monkeypatch.setattr(_library, "_load", found.get("load", lambda name: True))
    monkeypatch.setattr(_library, "_CUDA_MISSING", _library._load_cuda())
    return _library._cuda_reason(found.get("index"))


def test_cuda_tensors_are_refused_with_the_reason(monkeypatch) -> None:
    """Without CUDA kernels, a CUDA tensor gets a sentence, not a dispatcher's trace."""
    reason = why_no_cuda(monkeypatch, built="", torch=None)
    assert reason == "this build of lors_cuda has no CUDA backend (it was built without nvcc)"
    with pytest.raises(RuntimeError, match=r"built without nvcc.*lors-cuda info"):
        _library.check_device(torch.device("cuda", 0))


def test_a_torch_without_cuda_is_explained(monkeypatch) -> None:
    reason = why_no_cuda(monkeypatch, built="13.0", torch=None, load=lambda name: pytest.fail("it was loaded"))
    assert reason == f"the installed torch {torch.__version__} was built without CUDA"


def test_a_wheel_without_the_cuda_half_names_the_one_to_install(monkeypatch) -> None:
    reason = why_no_cuda(monkeypatch, built="", torch="13.0")
    assert reason == (
        "this build of lors_cuda has no CUDA backend (it was built without nvcc); beside torch "
        f"{torch.__version__} install the wheel labelled +cu13 and your GPU's architecture, e.g. +cu13.sm90a for "
        "compute capability 9.0"
    )


def test_cuda_major_mismatch_is_explained(monkeypatch, capsys) -> None:
    reason = why_no_cuda(monkeypatch, built="13.0", torch="12.8", load=lambda name: pytest.fail("it was loaded"))
    assert reason == (
        f"this build of lors_cuda is for CUDA 13.0 (+cu13.sm80.sm90a) and the installed torch {torch.__version__} for "
        "CUDA 12.8: install the wheel labelled +cu12.sm80.sm90a, or build it beside that toolkit (make wheel), or "
        "install a torch for CUDA 13"
    )
    with pytest.raises(RuntimeError, match=r"tensors on cuda:0, but this build of lors_cuda is for CUDA 13\.0"):
        _library.check_device(torch.device("cuda", 0))
    assert main(["info"]) == 0
    assert f"not available: {reason}" in capsys.readouterr().out


def test_a_missing_cuda_half_is_explained(monkeypatch) -> None:
    reason = why_no_cuda(monkeypatch, built="13.0", torch="13.1", load=lambda name: False)
    assert reason == "the CUDA backend of lors_cuda (_ops_cuda.so) is missing from the package; install it again"


def test_a_cuda_half_that_does_not_load_is_explained(monkeypatch) -> None:
    """And importing the package goes on: the CPU backend works."""

    def load(name: str) -> bool:
        raise OSError("Could not load this library") from OSError("undefined symbol: aoti_torch_cuda_mm_out")

    reason = why_no_cuda(monkeypatch, built="13.0", torch="13.0", load=load)
    assert reason is not None
    assert reason.endswith(
        "did not load with torch " + torch.__version__ + ": undefined symbol: aoti_torch_cuda_mm_out"
    )


@pytest.fixture(scope="module")
def device_problems(tmp_path_factory) -> list[str]:
    """What device.cu, built for 80 and 90a with CUDA 13, says of each of fake_cuda/device.cpp's devices."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    here = pathlib.Path(__file__).parents[1] / "fake_cuda"
    core = here.parents[2] / "csrc" / "core"
    program = tmp_path_factory.mktemp("device") / "device"
    command = [*compiler.split(), "-std=c++20", f"-I{here}", f"-I{core}", f"-I{core / 'include'}"]
    done = subprocess.run([*command, str(here / "device.cpp"), "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


def test_an_architecture_without_code_names_the_wheel_to_install(device_problems, monkeypatch, capsys) -> None:
    served, turing, blackwell, spark, ampere, absent = device_problems
    assert served == ""
    built = "this build of lors_cuda holds code for 80,90a only"
    assert turing == f"CUDA device 1 has architecture sm_75, and {built}; lors_cuda needs sm_80 or newer."
    for sentence, sm, arch in ((blackwell, "100", "100a"), (spark, "121", "121a"), (ampere, "80", "80")):
        assert f"has architecture sm_{sm}, and {built}; install the wheel labelled +cu13.sm{arch}, or" in sentence
        assert sentence.endswith(f"make wheel CUDA_ARCHS={arch}.")
    assert absent == "CUDA device 5 cannot be used: invalid device ordinal."

    reason = blackwell.removesuffix(".")
    monkeypatch.setattr(_library, "_cuda_device_problem", lambda index: reason)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert why_no_cuda(monkeypatch, built="13.0", torch="13.0") == reason
    with pytest.raises(RuntimeError, match=r"tensors on cuda:2, but CUDA device 2 has .* labelled \+cu13\.sm100a, or"):
        _library.check_device(torch.device("cuda", 2))
    assert main(["info"]) == 0
    assert f"not available: {reason}" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_explained(monkeypatch) -> None:
    reason = why_no_cuda(monkeypatch, built="13.0", torch="13.0")
    assert reason == "torch finds no CUDA device (torch.cuda.is_available() is False)"


def test_each_device_is_asked_for_itself(monkeypatch) -> None:
    """One machine may hold a device this build has code for beside one it has none for."""
    problem = "CUDA device 1 has architecture sm_75, and this build of lors_cuda holds code for 80 only"
    monkeypatch.setattr(_library, "_cuda_device_problem", {0: None, 1: problem}.get)
    assert why_no_cuda(monkeypatch, built="13.0", torch="13.0", index=0) is None
    _library.check_device(torch.device("cuda", 0))
    with pytest.raises(
        RuntimeError, match=r"tensors on cuda:1, but CUDA device 1 has architecture sm_75.*Move the model"
    ):
        _library.check_device(torch.device("cuda", 1))

    @torch.compile(fullgraph=True, backend="eager")
    def forward(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        _library.check_device(device)
        return 2 * x

    assert forward(torch.ones(1), torch.device("cuda", 0)).item() == 2
