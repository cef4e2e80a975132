# SPDX-License-Identifier: Apache-2.0
"""SparseLinear: the frozen layer, and what its stored tensors are to torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_layer import every_layout, linear_of
from torch import nn
from torch.func import functional_call

from cases import make_case
from lors_cuda import LoRSLinear, SparseLinear
from sparse_product_cases import K, N, problem

pytest_plugins = ["sparse_product_fixtures"]

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


# ---- what is known of a mask -----------------------------------------------------------------------------------------


def masked(seed: int, *, transposable: bool) -> SparseLinear:
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    linear.weight.data = problem(seed, torch.bfloat16, transposable=transposable).weight
    return SparseLinear.compress(linear, "2:4")


def seen(layer: SparseLinear) -> tuple[torch.Tensor | None, bool]:
    weight = layer.sparse_weight
    return weight.library_metadata, weight.transposable


def test_a_mask_that_is_written_in_place_is_looked_at_again(served, seed):
    """As DistributedDataParallel's constructor does with what process 0 has."""
    layer, other = masked(seed, transposable=True), masked(seed + 1, transposable=False)
    expected, before = seen(other)[0], seen(layer)
    assert before[1]
    assert not torch.equal(before[0], expected)
    for name, tensor in layer.named_parameters():
        tensor.detach().copy_(other.get_parameter(name))
    metadata, transposable = seen(layer)
    assert not transposable
    assert torch.equal(metadata, expected)
    assert seen(layer)[0] is metadata, "once"
    layer.weight_index.detach().copy_(masked(seed, transposable=True).weight_index)
    for back in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
        assert seen(back)[1]
        assert torch.equal(seen(back)[0], before[0])


def test_a_mask_in_other_memory_is_another_one(served, seed):
    """functional_call, replicas of nn.DataParallel and whatever moves parameters one by one."""
    layer, other = masked(seed, transposable=True), masked(seed + 1, transposable=False)

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self):
            return seen(self.layer)

    given = {f"layer.{name}": tensor for name, tensor in other.named_parameters()}
    assert functional_call(Seen(), given, ()) == (None, False)
    assert seen(layer)[1], "its own is back"
    replica = layer._replicate_for_data_parallel()
    replica.weight_mask = None
    replica.weight_index = layer.weight_index.detach().clone()
    replica.weight_values = layer.weight_values.detach()
    assert seen(replica) == (None, False)
    layer.weight_index.data = other.weight_index.detach().clone()
    assert seen(layer) == (None, False)


def test_what_is_known_of_a_mask_is_there_in_compiled_code(served, seed):
    layer = masked(seed, transposable=True)

    def read(x):
        weight = layer.sparse_weight
        return x + weight.transposable, weight.library_metadata

    compiled = torch.compile(read, fullgraph=True, backend="eager")
    flag, metadata = compiled(torch.zeros(1))
    assert flag.item() == 1
    assert torch.equal(metadata, layer.weight_library_metadata)


def test_a_layer_made_without_gradients_knows_its_mask(served, seed):
    """Tensors made under inference_mode count no writes."""
    with torch.inference_mode():
        layer = masked(seed, transposable=True)
        assert seen(layer)[1]
    assert seen(layer)[0] is not None
