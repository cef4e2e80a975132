# SPDX-License-Identifier: Apache-2.0
# A pytest plugin of test_sparse_products.py and test_product_choices.py.
"""The CUDA operators over a cuSPARSELt that computes on the CPU."""

from __future__ import annotations

import pytest
import torch

import cases
import fake_binding
from lors_cuda import sparse_product


@pytest.fixture(scope="session")
def fake():
    return fake_binding.load()


@pytest.fixture
def ops(fake, monkeypatch):
    """The fake operators, with nothing chosen yet; afterwards nothing is held."""
    monkeypatch.setattr(cases, "lors", fake)
    monkeypatch.delenv("LORS_SPARSE_PRODUCT", raising=False)
    fake.fake_set(False, 1.0)
    fake.sparse_product_clear(0)
    yield fake
    fake.fake_set(False, 1.0)
    assert fake.fake_state().split()[:2] == ["0", "0"]


@pytest.fixture
def served(ops, monkeypatch):
    """As if every device were a CUDA device that the fake library serves."""
    monkeypatch.setattr(sparse_product, "lors", ops)
    monkeypatch.setattr(sparse_product, "sparse_product_reason", lambda device=None: None)
    monkeypatch.setattr(sparse_product, "_has_device", lambda device: True)
    monkeypatch.setattr(sparse_product, "_index", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "fake device")
    return ops
