# SPDX-License-Identifier: Apache-2.0
"""The device every numeric test runs on, one seed per case, and hypothesis without clocks or chance."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import settings

import lors_cuda
from cases import skip_unserved
from lors_cuda._library import build_info

settings.register_profile("lors", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("lors")


def _skip_without_cuda() -> None:
    reason = build_info()["cuda_reason"]
    if reason is not None:
        pytest.skip(f"cuda: {reason}")


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; a case that no kernel serves is skipped with the reason, never left out."""
    if request.param == "cuda":
        _skip_without_cuda()
    return torch.device(request.param)


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """torch's current CUDA device, for what only a GPU can show."""
    _skip_without_cuda()
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _dtype_is_served(request: pytest.FixtureRequest) -> None:
    """Skips what is parametrized with float64 on a device without it."""
    if "device" in request.fixturenames and any(p is torch.float64 for p in request.node.callspec.params.values()):
        skip_unserved(request.getfixturevalue("device"), torch.float64)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fixed seed of the case's own, the same on every device."""
    name = request.node.name.replace("[cuda-", "[").replace("[cpu-", "[").replace("[cuda]", "").replace("[cpu]", "")
    return zlib.crc32(name.encode())


@pytest.fixture
def saved(tmp_path):
    """A trained model and the adapter directory it was saved in."""
    from models import trained

    model = trained()
    lors_cuda.save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"
