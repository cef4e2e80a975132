# SPDX-License-Identifier: Apache-2.0
"""Adapters that an earlier version wrote load, silently, in every door, and compute what they did."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from former_adapters import base, inputs
from lors_cuda import load_adapter

KEPT = Path(__file__).parent / "adapters_0.1.0"


@pytest.mark.parametrize("kind", ["save_adapter", "save_pretrained"])
@pytest.mark.parametrize("door", ["core", "peft"])
def test_an_adapter_of_an_earlier_version_computes_what_it_did(kind, door):
    fields = json.loads((KEPT / kind / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORS: import lors_cuda.peft before loading this adapter"
    assert set(fields["lors"]) <= {"format_version", "gradient", "layout", "mask_fingerprints"}
    model = base()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if door == "core":
            model = load_adapter(model, KEPT / kind)
        else:
            pytest.importorskip("peft")
            from lors_cuda.peft import from_pretrained

            model = from_pretrained(model, KEPT / kind)
    expected = load_file(KEPT / "outputs.safetensors")[kind]
    assert not torch.allclose(base()(inputs()), expected)
    torch.testing.assert_close(model(inputs()).detach(), expected)


def test_its_mask_is_still_compared():
    other = base()
    other[2].weight.data = other[2].weight.data.roll(1, dims=1)
    with pytest.raises(ValueError, match="another sparsity mask: '2' differ"):
        load_adapter(other, KEPT / "save_adapter")
