# SPDX-License-Identifier: Apache-2.0
# A pytest plugin that runs PEFT's own tests (from a checkout of it, see docs/howto/peft.md) with LoRSLoraConfig in the
# place of LoraConfig and sparse linears: `make test-peft`. What LoRSLoraConfig refuses by name is skipped with its
# sentence; tests of packages that are not installed are not collected.
"""PEFT's tests against lors_cuda.peft."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types

import pytest
import torch
from torch import nn

import lors_cuda.peft
import peft

REFUSALS = (
    "is refused by LoRSLoraConfig",
    "is refused: it",
    "cannot be adapted: it",
    "another sparsity mask",  # tests that load an adapter onto other random weights than it was made on
)
# Imported by PEFT's test helpers, used by none of the tests that run here.
for package, names in {"datasets": ["Dataset", "load_dataset"], "diffusers": ["StableDiffusionPipeline"]}.items():
    if importlib.util.find_spec(package) is None:
        stand_in = types.ModuleType(package)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(package, None)
        stand_in.__version__ = "0.0.0"
        for name in names:
            setattr(stand_in, name, None)
        sys.modules[package] = stand_in

LAYOUT = os.environ.get("LORS_PEFT_LAYOUT", "auto")


class LoRSLoraConfig(lors_cuda.peft.LoRSLoraConfig):
    """With another default layout: FSDP1 and `get_base_model_state_dict` are for layout="dense" only."""

    def __init__(self, *args, layout: str = LAYOUT, **kwargs) -> None:
        super().__init__(*args, layout=layout, **kwargs)


peft.LoraConfig = LoRSLoraConfig


@pytest.fixture(autouse=True)
def _linears_are_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of the tests have sparse linears; adapters, which are linears too, stay as they are."""
    original = nn.Linear.reset_parameters
    in_adapter = lors_cuda.peft.LoRSLoraLinear.update_layer

    def reset(self: nn.Linear) -> None:
        original(self)
        if not state["adapter"]:
            with torch.no_grad():
                self.weight *= torch.rand_like(self.weight) < 0.5

    def update_layer(self, *args, **kwargs):
        state["adapter"] = True
        try:
            return in_adapter(self, *args, **kwargs)
        finally:
            state["adapter"] = False

    state = {"adapter": False}
    monkeypatch.setattr(nn.Linear, "reset_parameters", reset)
    monkeypatch.setattr(lors_cuda.peft.LoRSLoraLinear, "update_layer", update_layer)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    message = str(call.excinfo.value) if call.excinfo is not None and call.excinfo.errisinstance(ValueError) else ""
    if report.failed and any(words in message for words in REFUSALS):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {message}")
