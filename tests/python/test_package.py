"""The installed package: what it imports, what it says of itself, and that it finds its binaries."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
import torch

import lors_cuda
from lors_cuda import _library


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


def test_build_info_names_what_serves_this_machine() -> None:
    info = _library.build_info()
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512")
    assert info["version"] == lors_cuda.__version__
    assert info["cuda_available"] == (info["cuda_reason"] is None)


def why_no_cuda(monkeypatch, **found: object) -> str | None:
    """What the package says of CUDA where it was built, and finds torch, like this; torch.version.cuda is `torch`."""
    monkeypatch.setitem(_library.BUILD, "cuda_version", found["built"])
    monkeypatch.setattr(torch.version, "cuda", found["torch"])
    monkeypatch.setattr(_library, "_load", found.get("load", lambda name: True))
    monkeypatch.setattr(_library, "_CUDA_MISSING", _library._load_cuda_half())
    return _library._cuda_reason(found.get("index"))


def test_cuda_tensors_are_refused_with_the_reason(monkeypatch) -> None:
    """Without CUDA kernels, a CUDA tensor gets a sentence, not a dispatcher's trace."""
    assert why_no_cuda(monkeypatch, built="", torch=None) is not None
    with pytest.raises(RuntimeError, match=r"built without nvcc.*lors-cuda info"):
        _library.check_device(torch.device("cuda", 0))


def test_a_torch_without_cuda_is_explained(monkeypatch) -> None:
    reason = why_no_cuda(monkeypatch, built="13.0", torch=None, load=lambda name: pytest.fail("it was loaded"))
    assert reason == f"the installed torch {torch.__version__} was built without CUDA"


def test_cuda_major_mismatch_is_explained(monkeypatch) -> None:
    reason = why_no_cuda(monkeypatch, built="13.0", torch="12.8", load=lambda name: pytest.fail("it was loaded"))
    assert reason is not None
    assert "CUDA 13.0" in reason
    assert "CUDA 12.8" in reason


def test_a_missing_cuda_half_is_explained(monkeypatch) -> None:
    reason = why_no_cuda(monkeypatch, built="13.0", torch="13.1", load=lambda name: False)
    assert reason == "the CUDA half of lors_cuda (_ops_cuda.so) is missing from the installed package; install it again"


def test_a_cuda_half_that_does_not_load_is_explained(monkeypatch) -> None:
    """And importing the package goes on: the CPU half works."""

    def load(name: str) -> bool:
        raise OSError("Could not load this library") from OSError("undefined symbol: aoti_torch_cuda_mm_out")

    reason = why_no_cuda(monkeypatch, built="13.0", torch="13.0", load=load)
    assert reason is not None
    assert reason.endswith(
        "did not load beside torch " + torch.__version__ + ": undefined symbol: aoti_torch_cuda_mm_out"
    )


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
