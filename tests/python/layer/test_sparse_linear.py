# SPDX-License-Identifier: Apache-2.0
"""SparseLinear: the frozen layer, and what its stored tensors are to torch."""

from __future__ import annotations

import pytest
import torch
from test_layer import every_layout, linear_of
from torch import nn

from cases import make_case
from lors_cuda import LoRSLinear, SparseLinear

STORED = {
    "dense": {"weight_values"},
    "2:4": {"weight_values", "weight_index"},
    "bitmap": {"weight_values", "weight_mask", "weight_index"},
}


@every_layout
def test_stored_tensors_are_frozen_parameters(device, seed, layout):
    # DistributedDataParallel sends buffers around in every forward, and fully_shard shards parameters only.
    case = make_case(seed, 3, 31, 72, 2, layout=layout, device=device, bias=True)
    layer = LoRSLinear.from_linear(linear_of(case), r=2, layout=layout)
    assert not list(layer.buffers())
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert {name for name, _ in layer.named_parameters()} == STORED[layout] | {"bias", "lora_A", "lora_B"}


@every_layout
def test_stored_weight_made_to_require_grad_is_refused(device, seed, layout):
    case = make_case(seed, 3, 31, 72, 2, layout=layout, device=device)
    layer = LoRSLinear.from_linear(linear_of(case), r=2, layout=layout)
    layer.weight_values.requires_grad_(True)
    with pytest.raises(ValueError, match="weight requires grad, but LoRS freezes it"):
        layer(case.input)


@every_layout
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_linear_it_was_made_from(device, seed, layout, bias):
    case = make_case(seed, 5, 31, 72, 2, layout=layout, device=device, bias=bias)
    linear = linear_of(case)
    frozen = SparseLinear.compress(linear, layout)
    assert frozen.sparse_weight.layout == layout
    assert torch.equal(frozen(case.input), linear(case.input))
    assert not any(p.requires_grad for p in frozen.parameters())

    back = frozen.to_linear()
    assert torch.equal(back.weight, linear.weight)
    assert back.bias is None if linear.bias is None else torch.equal(back.bias, linear.bias)
    assert back.weight.data_ptr() != linear.weight.data_ptr()

    another = make_case(seed + 1, 5, 31, 72, 2, layout=layout, device=device, bias=bias)
    other = SparseLinear.compress(linear_of(another), layout)
    assert not torch.equal(other.weight, frozen.weight)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other.weight, frozen.weight)


def test_refuses_other_modules():
    with pytest.raises(TypeError, match=r"linear is a Conv1d; it must be a torch\.nn\.Linear"):
        SparseLinear.compress(nn.Conv1d(4, 4, 1))
