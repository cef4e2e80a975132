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


def test_cuda_tensors_are_refused_with_the_reason(monkeypatch) -> None:
    """Until the CUDA kernels exist, a CUDA tensor gets a sentence, not a dispatcher's trace."""
    monkeypatch.setitem(_library.BUILD, "cuda_version", "")
    _library._cuda_reason.cache_clear()
    with pytest.raises(RuntimeError, match=r"built without nvcc.*lors-cuda info"):
        _library.check_device(torch.device("cuda", 0))
    _library._cuda_reason.cache_clear()


def test_cuda_major_mismatch_is_explained(monkeypatch) -> None:
    monkeypatch.setitem(_library.BUILD, "cuda_version", "13.0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    _library._cuda_reason.cache_clear()
    reason = _library._cuda_reason()
    _library._cuda_reason.cache_clear()
    assert reason is not None
    assert "CUDA 13.0" in reason
    assert "CUDA 12.8" in reason
