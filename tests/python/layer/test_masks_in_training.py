# SPDX-License-Identifier: Apache-2.0
"""Masks are not numbers: nothing that training scripts do to parameters or states changes one, or it is refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lors_cuda import LoRSLinear, SparseLinear

NO_NUMBERS = "Masks are not numbers"
N, K = 12, 40

every_layout = pytest.mark.parametrize("layout", ["dense", "explicit", "2:4", "bitmap"])


def layer_of(layout: str, seed: int = 0) -> LoRSLinear:
    """A layer of which two in four are kept; "explicit": dense with a mask of its own."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    weight.view(N, -1, 4).scatter_(-1, torch.rand(N, K // 4, 4, generator=generator).argsort(-1)[..., :2], 0.0)
    torch.manual_seed(seed)
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight.copy_(weight)
    mask = weight != 0 if layout == "explicit" else None
    layer = LoRSLinear.from_linear(linear, r=2, layout="dense" if mask is not None else layout, mask=mask)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(N, 2, generator=generator))
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def keeps(layer: LoRSLinear, expected: LoRSLinear) -> None:
    assert torch.equal(layer.sparse_weight.mask(), expected.sparse_weight.mask())
    torch.testing.assert_close(layer(inputs()), expected(inputs()))
    assert torch.equal(layer.merge().weight == 0, expected.merge().weight == 0)


# ---- parameters ----


@every_layout
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9), get_ema_multi_avg_fn(0.9999)])
def test_averaging_an_unchanged_model_is_the_identity(layout, average):
    layer = layer_of(layout)
    averaged = AveragedModel(layer, multi_avg_fn=average)
    for _ in range(5):
        averaged.update_parameters(layer)
    keeps(averaged.module, layer)
    keeps(pickle.loads(pickle.dumps(averaged.module)), layer)


@pytest.mark.parametrize("layout", ["explicit", "2:4", "bitmap"])
def test_averaged_buffers_are_refused(layout):
    layer = layer_of(layout)
    averaged = AveragedModel(layer, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        averaged.update_parameters(layer)
    for use in (lambda: averaged(inputs()), averaged.module.merge, averaged.state_dict, averaged.module.to_linear):
        for _ in range(2):
            with pytest.raises(ValueError, match=NO_NUMBERS):
                use()
    layer(inputs())


def test_averaged_buffers_of_an_implicit_mask_change_nothing():
    layer = layer_of("dense")
    averaged = AveragedModel(layer, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        averaged.update_parameters(layer)
    keeps(averaged.module, layer)


@every_layout
def test_vectors_and_second_order_optimizers(layout):
    layer, expected = layer_of(layout), layer_of(layout)
    vector_to_parameters(parameters_to_vector(layer.parameters()).clone(), layer.parameters())
    keeps(layer, expected)
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(inputs()).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    optimizer.step(closure)
    assert closure().item() < first
    assert torch.equal(layer.sparse_weight.mask(), expected.sparse_weight.mask())
    torch.optim.AdamW(layer.parameters(), weight_decay=0.5).step()
    assert torch.equal(layer.sparse_weight.to_dense(), expected.sparse_weight.to_dense())


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["a kept weight becomes zero", "a zero is filled"])
@pytest.mark.parametrize("counted", [True, False])
def test_an_implicit_mask_that_values_change_is_refused(value, counted):
    layer = layer_of("dense")
    row, column = ((layer.weight != 0) == (value == 0)).nonzero()[0].tolist()
    written = layer.weight_values if counted else layer.weight_values.data
    with torch.no_grad():
        written[row, column] = value
    if counted:
        with pytest.raises(ValueError, match=NO_NUMBERS):
            layer(inputs())
    with pytest.raises(ValueError, match=NO_NUMBERS):
        layer.merge()


def test_values_off_an_explicit_mask_are_refused():
    layer = layer_of("explicit")
    row, column = (layer.weight == 0).nonzero()[0].tolist()
    with torch.no_grad():
        layer.weight_values[row, column] = 1.0
    with pytest.raises(ValueError, match=f"row {row}, column {column}: the value, 1.0, is off the mask"):
        layer(inputs())


@every_layout
def test_values_may_be_averaged_in_place(layout):
    layer = layer_of(layout)
    with torch.no_grad():
        layer.weight_values.mul_(0.5)
    layer(inputs())
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.merge().weight, layer.merge().weight)


def test_a_copy_is_compared_however_often_it_was_written_to():
    layer = layer_of("2:4")
    copied = copy.deepcopy(layer)
    for _ in range(layer.weight_index._version + 1):
        copied.weight_index.bitwise_not_()
        if not torch.equal(copied.weight_index, layer.weight_index):
            with pytest.raises(ValueError, match=NO_NUMBERS):
                copied(inputs())


# ---- states ----


@every_layout
def test_a_state_written_to_in_place_does_not_reach_the_mask(layout):
    """As moving averages over `state_dict().values()` do it."""
    layer, averaged = layer_of(layout), copy.deepcopy(layer_of(layout))
    for _ in range(5):
        for ours, theirs in zip(averaged.state_dict().values(), layer.state_dict().values(), strict=True):
            ours.copy_(0.9 * ours + 0.1 * theirs)
    keeps(averaged, layer)


def average_by_sum(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def average_by_numpy(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.mean([state[name].numpy() for state in states], axis=0, dtype=np.float64))
        for name in states[0]
    }


def average_and_cast(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.to(states[0][name].dtype) for name, tensor in average_by_sum(states).items()}


def average_floating(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    averaged = average_by_sum(states)
    return {name: averaged[name] if tensor.is_floating_point() else tensor for name, tensor in states[0].items()}


AVERAGES = [average_by_sum, average_by_numpy, average_and_cast, average_floating]


@every_layout
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("count", [2, 3])
def test_averages_of_one_mask_are_that_mask_or_refused(layout, average, count):
    layer, expected = layer_of(layout, seed=3), layer_of(layout)
    state = average([expected.state_dict()] * count)
    if layout != "dense" and average != average_floating:
        with pytest.raises(RuntimeError, match=NO_NUMBERS):
            layer.load_state_dict(state)
    else:
        layer.load_state_dict(state)
        keeps(layer, expected)


@every_layout
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_of_two_masks_are_refused(layout, average):
    one, other = layer_of(layout), layer_of(layout, seed=3)
    before = copy.deepcopy(one)
    with pytest.raises(RuntimeError, match=f"{NO_NUMBERS}|corrupted"):
        one.load_state_dict(average([one.state_dict(), other.state_dict()]))
    keeps(one, before)


def test_a_mask_averaged_to_another_valid_one_is_refused():
    layer = layer_of("2:4")
    state = layer.state_dict()
    state["weight_index"] = state["weight_index"].roll(1, 0)  # valid
    with pytest.raises(RuntimeError, match=NO_NUMBERS):
        layer.load_state_dict(state)
    del state["mask_digest"]  # a state of an earlier version cannot tell
    layer.load_state_dict(state)
    layer(inputs())
    assert layer.sparse_weight.has_digest(layer.mask_digest)


@every_layout
def test_a_state_cast_to_a_smaller_type(layout):
    layer = layer_of(layout)
    state = {name: t.half() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    other = layer_of(layout, seed=3)
    other.load_state_dict(state)
    assert torch.equal(other.sparse_weight.mask(), layer.sparse_weight.mask())
    if layout == "dense":
        state["weight_values"].view(-1)[state["weight_values"].view(-1).nonzero()[0]] = 0.0  # it has rounded to zero
        with pytest.raises(RuntimeError, match=NO_NUMBERS):
            other.load_state_dict(state)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_smaller_type_keeps_what_rounds_to_zero(layout, dtype, assign):
    tiny = {torch.float16: 1e-9, torch.bfloat16: 1e-42}[dtype]
    linear = nn.Linear(K, N, bias=False)
    with torch.no_grad():
        linear.weight.view(N, -1, 4)[..., ::2] = 0.0
        linear.weight[2, 1] = tiny
    mask = linear.weight != 0
    given = {"mask": mask, "layout": "dense"} if layout == "explicit" else {"layout": layout}
    source = SparseLinear.compress(linear, **given)
    target = (
        SparseLinear.compress(nn.Linear(K, N, bias=False), "dense")
        if "dense" in given["layout"]
        else (copy.deepcopy(source))
    )
    target = target.to(dtype)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target.weight_values.dtype == (torch.float32 if assign else dtype)
    assert torch.equal(target.sparse_weight.mask(), mask)
    assert torch.equal(target.to(dtype).sparse_weight.mask(), mask)
    target(inputs(dtype))


def test_masks_without_values_must_be_the_layers_own():
    layer, other = layer_of("2:4"), layer_of("2:4", seed=3)
    adapters = {name: tensor for name, tensor in layer.state_dict().items() if name != "weight_values"}
    layer.load_state_dict(adapters, strict=False)
    with pytest.raises(RuntimeError, match=NO_NUMBERS):
        other.load_state_dict(adapters, strict=False)


# ---- what else goes through the layer ----


@every_layout
def test_functional_call_and_pickles_of_integer_parameters(layout):
    layer = layer_of(layout)
    expected = layer(inputs())
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    clones = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    assert torch.equal(torch.func.functional_call(layer, clones, inputs()), expected)
    # As it was pickled when the integer tensors were frozen parameters.
    former = copy.deepcopy(layer)
    del former._buffers["mask_digest"]
    for name in ("weight_mask", "weight_index"):
        tensor = former._buffers.pop(name)
        former._parameters[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
    read = pickle.loads(pickle.dumps(former))
    assert torch.equal(read(inputs()), expected)
    assert read.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_scaling_set_by_hand_is_what_is_stored(use_rslora):
    linear = nn.Linear(K, N)
    layer = LoRSLinear.from_linear(linear, r=4, lora_alpha=6, use_rslora=use_rslora, init_lora_weights=False)
    layer.scaling *= 0.5
    assert layer.lora_alpha == pytest.approx(3)
    assert layer.scaling == pytest.approx(3 / (2 if use_rslora else 4))
    former = copy.deepcopy(layer)
    former.__dict__["scaling"] = 0.3  # as it was pickled when it was an attribute of its own
    assert pickle.loads(pickle.dumps(former)).scaling == pytest.approx(0.3)
    with pytest.raises(ValueError, match="lora_alpha must be finite"):
        layer.scaling = float("inf")
