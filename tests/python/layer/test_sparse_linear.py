# SPDX-License-Identifier: Apache-2.0
"""SparseLinear: the frozen layer, and what its stored tensors are to torch."""

from __future__ import annotations

import pickle

import pytest
import torch
from test_layer import every_layout, linear_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases import make_case
from expectations import check_linear
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
    check_linear(frozen(case.input), case.replace(lora_B=0 * case.lora_B))
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


# ---- forward is lors::linear without an adapter ----------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """The calls of our operators, and the ranks that they were given."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []
        self.ranks: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lors":
            self.calls.append(func.name())
            names = [argument.name for argument in func._schema.arguments]
            self.ranks.add(args[names.index("lora_A")].shape[0])
        return func(*args, **(kwargs or {}))


def frozen_and_disabled(case, layout, mask=None) -> list[nn.Module]:
    adapted = LoRSLinear.from_linear(linear_of(case), r=2, layout=layout, mask=mask, init_lora_weights=False)
    adapted.adapter_enabled = False
    return [SparseLinear.compress(linear_of(case), layout, mask), adapted]


@every_layout
@pytest.mark.parametrize("explicit", [False, True])
def test_one_operator_and_nothing_for_the_adapters(device, seed, layout, explicit):
    case = make_case(seed, 5, 31, 72, 2, layout=layout, device=device, bias=True, explicit_mask=explicit)
    dense = torch.where(case.kept, case.weight, 0.0)
    for layer in frozen_and_disabled(case, layout, case.mask):
        x = case.input.clone().requires_grad_()
        with Recorded() as recorded:
            y = layer(x)
            y.backward(case.grad_output)
        assert recorded.calls == ["lors::linear", "lors::linear_backward"]
        assert recorded.ranks == {0}
        torch.testing.assert_close(y, torch.nn.functional.linear(case.input, dense, case.bias))
        torch.testing.assert_close(x.grad, case.grad_output @ dense)
        assert all(p.grad is None for p in layer.parameters())


@every_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(device, seed, layout, dtype):
    case = make_case(seed, 40, 31, 72, 2, dtype, layout=layout, device=device)
    for layer in frozen_and_disabled(case, layout):
        expected = case.input.double() @ case.weight.double().T
        torch.testing.assert_close(
            layer(case.input).double(), expected, rtol=0, atol=0.02 * expected.abs().max().item()
        )
        wide = layer.float()
        with torch.autocast(device.type, dtype):
            assert wide(case.input.float()).dtype == dtype


@every_layout
def test_a_bias_that_is_trained_gets_its_gradient(device, seed, layout):
    case = make_case(seed, 5, 31, 72, 2, layout=layout, device=device, bias=True)
    for layer in frozen_and_disabled(case, layout):
        layer.bias.requires_grad_(True)
        layer(case.input).backward(case.grad_output)
        torch.testing.assert_close(layer.bias.grad, case.grad_output.sum(0))


@every_layout
def test_compiled_and_exported(device, seed, layout):
    case = make_case(seed, 5, 31, 72, 2, layout=layout, device=device)
    for layer in frozen_and_disabled(case, layout):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        plain, traced = (case.input.clone().requires_grad_() for _ in range(2))
        assert torch.equal(compiled(traced), layer(plain))
        compiled(traced).backward(case.grad_output)
        layer(plain).backward(case.grad_output)
        assert torch.equal(traced.grad, plain.grad)
        tokens = torch.export.Dim("tokens", min=2)
        program = torch.export.export(layer, (case.input,), dynamic_shapes=({0: tokens},))
        more = torch.cat([case.input, case.input])
        assert torch.equal(program.module()(more), layer(more))


def test_pickles_with_what_layers_once_knew_of_a_mask_load(seed):
    case = make_case(seed, 5, 31, 72, 2, layout="2:4")
    layer = LoRSLinear.from_linear(linear_of(case), r=2, layout="2:4")
    expected, weight = layer(case.input), layer.sparse_weight
    layer.__dict__.update(weight_library_metadata=None, weight_transposable=True, _mask_known=None, products="auto")
    weight.__dict__.update(library_metadata=None, transposable=True)
    layer, weight = pickle.loads(pickle.dumps((layer, weight)))
    assert torch.equal(layer(case.input), expected)
    assert torch.equal(weight.to("cpu").to_dense(), layer.weight)
