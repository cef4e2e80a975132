# SPDX-License-Identifier: Apache-2.0
"""LoRSLoraLinear: what it computes, fused and beside the base layer, and what merging does to the stored weight."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from test_layer import linear_of
from torch import nn

from cases import make_case
from expectations import check_linear
from lors_cuda import SparseLinear, reference
from peft_models import (
    LAYERS,
    adapted,
    check_output,
    compressed,
    config_of,
    every_base,
    every_layout,
    fill,
    inputs,
    layers,
    merged_reference,
    net,
    output_reference,
    peft,
)
from tolerance import assert_zero_off_mask


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_masked_product(device, seed, layout, dtype, bias):
    case = make_case(seed, 17, 31, 72, 5, dtype, layout=layout, device=device, bias=bias)
    model = peft.get_peft_model(
        nn.Sequential(linear_of(case)), config_of(r=5, lora_alpha=5 * case.scaling, target_modules=["0"], layout=layout)
    )
    layer = layers(model)["0"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(case.lora_A)
        layer.lora_B["default"].weight.copy_(case.lora_B)
    held = case.replace(
        lora_A=layer.lora_A["default"].weight.detach(), lora_B=layer.lora_B["default"].weight.detach(),
        scaling=layer.scaling["default"],
    )  # fmt: skip
    assert held.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert isinstance(layer.base_layer, nn.Linear if layout == "dense" else SparseLinear)
    assert layer.sparse_weight.layout == layout
    check_linear(model(case.input), held)


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@every_layout
def test_gradients_are_those_of_the_method(layout, gradient, dropout):
    model = adapted(layout=layout, gradient=gradient, lora_dropout=dropout, target_modules=["0"]).train()
    layer, x = layers(model)["0"], inputs()
    weight, dropped = net()[0].weight.detach(), x
    if dropout:
        torch.manual_seed(3)
        dropped = nn.functional.dropout(x, dropout)
        torch.manual_seed(3)
    lora_A, lora_B = (which["default"].weight for which in (layer.lora_A, layer.lora_B))
    output = layer(x)
    expected = x @ weight.T + reference.linear(
        dropped, torch.zeros_like(weight), lora_A.detach(), lora_B.detach(), 2.0, mask=weight != 0
    )
    torch.testing.assert_close(output.detach(), expected)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    output.backward(grad)
    _, grad_A, grad_B, _ = reference.linear_backward(
        grad, dropped, weight, lora_A.detach(), lora_B.detach(), 2.0, gradient=gradient
    )
    torch.testing.assert_close(lora_A.grad, grad_A)
    torch.testing.assert_close(lora_B.grad, grad_B)


def test_dropout_keeps_no_second_weight():
    # Autograd must keep the mask and one zero, not a zero for each stored value.
    layer = layers(adapted(layout="2:4", lora_dropout=0.5))["0"]
    zeros = layer.zero_weight()
    assert zeros.values.untyped_storage().nbytes() == zeros.dtype.itemsize
    assert torch.equal(zeros.packed_mask(), layer.sparse_weight.packed_mask())
    assert not zeros.to_dense().any()


def test_dropout_has_no_effect_in_evaluation():
    check_output(adapted(lora_dropout=0.5))


@every_base
def test_several_active_adapters_are_one_sum(base):
    model = adapted(compressed(net(), base), adapters=("default", "second"))
    model.base_model.set_adapter(["default", "second"])
    check_output(model, ("default", "second"))
    model.set_adapter("second")
    check_output(model, ("second",))
    with model.disable_adapter():
        torch.testing.assert_close(model(inputs()), net()(inputs()))


def test_adapters_of_two_kinds_of_gradients_get_their_own():
    model = adapted(gradient="lors", target_modules=["0"])
    model.add_adapter("second", config_of(gradient="exact", target_modules=["0"]))
    fill(model)
    model.base_model.set_adapter(["default", "second"])
    layer, x, weight = layers(model)["0"], inputs(), net()[0].weight.detach()
    output = layer(x)
    torch.testing.assert_close(output.detach(), x @ merged_reference(model, ("default", "second"))["0"].T)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    output.backward(grad)
    for name, gradient in (("default", "lors"), ("second", "exact")):
        lora_A, lora_B = (which[name].weight for which in (layer.lora_A, layer.lora_B))
        _, grad_A, grad_B, _ = reference.linear_backward(
            grad, x, weight, lora_A.detach(), lora_B.detach(), 2.0, gradient=gradient
        )
        torch.testing.assert_close((lora_A.grad, lora_B.grad), (grad_A, grad_B))


@every_base
def test_batches_of_mixed_adapters(base):
    model = adapted(compressed(net(), base), adapters=("default", "second"))
    x, names = inputs(4), ["second", "__base__", "default", "second"]
    output = model(x, adapter_names=names)
    for row, name in enumerate(names):
        adapters = () if name == "__base__" else (name,)
        torch.testing.assert_close(output[row].detach(), output_reference(model, x, adapters)[row])


@every_base
def test_unmerging_restores_every_bit(base):
    # PEFT subtracts what it added, which rounds.
    model = adapted(compressed(net(dtype=torch.bfloat16), base), adapters=("default", "second"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = {name: layer.stored_values.data_ptr() for name, layer in layers(model).items()}
    model.merge_adapter()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == len(LAYERS)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    fill(model, seed=9)  # PEFT could not even subtract the same product any more
    model.unmerge_adapter()
    after = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert pointers == {name: layer.stored_values.data_ptr() for name, layer in layers(model).items()}
    assert all(layer.unmerged_values is None and not layer.merged for layer in layers(model).values())


@every_base
def test_merged_in_any_order_is_one_rounding(base):
    one, two = (adapted(compressed(net(), base), adapters=("default", "second")) for _ in range(2))
    one.merge_adapter(["default", "second"])
    two.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        two.merge_adapter(["second"])
    for layer, other in zip(layers(one).values(), layers(two).values(), strict=True):
        assert torch.equal(layer.stored_values, other.stored_values)
    check_output(one, ("default", "second"))
    with one.disable_adapter():  # unmerges, as in PEFT
        torch.testing.assert_close(one(inputs()), net()(inputs()))


@every_base
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_gives_linears_with_exact_zeros(base, safe):
    model = adapted(compressed(net(), base))
    expected = merged_reference(model)
    result = model.merge_and_unload(safe_merge=safe)
    for name in LAYERS:
        linear = result.get_submodule(name)
        assert type(linear) is nn.Linear
        torch.testing.assert_close(linear.weight.detach(), expected[name])
        assert_zero_off_mask(linear.weight, net().get_submodule(name).weight != 0)
        assert not (torch.signbit(linear.weight) & (linear.weight == 0)).any()
        assert not linear.weight.requires_grad
    assert not hasattr(result, "peft_config")


@every_base
def test_a_value_that_rounds_to_minus_zero_becomes_zero(base):
    linear = nn.Linear(4, 1, bias=False, dtype=torch.float16)
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    linear.weight.data.copy_(torch.tensor([[-smallest, 1.0, 0.0, 0.0]]))
    model = compressed(nn.Sequential(linear), base)
    layout = "dense" if base == "linear" else "auto"
    model = peft.get_peft_model(model, config_of(r=1, lora_alpha=1, target_modules=["0"], layout=layout))
    layer = layers(model)["0"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[0.75 * smallest, 0.0, 1.0, 1.0]]))
        layer.lora_B["default"].weight.fill_(1.0)
    weight = model.merge_and_unload()[0].weight
    assert torch.equal(weight, torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float16))
    assert not torch.signbit(weight).any()


@every_base
def test_unload_gives_the_base_back(base):
    result = adapted(compressed(net(), base)).unload()
    kind = nn.Linear if base == "linear" else SparseLinear
    for name in LAYERS:
        assert type(result.get_submodule(name)) is kind
        assert torch.equal(result.get_submodule(name).weight, net().get_submodule(name).weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("unload", [False, True])
def test_nothing_is_merged_if_one_adapter_is_not_finite(value, unload):
    model = adapted()
    layers(model)["2"].lora_B["default"].weight.data[1, 1] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="adapter 'default' of '2' holds NaN or infinity, so nothing was merged"):
        model.merge_and_unload() if unload else model.merge_adapter()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before if "2.lora_B" not in name)


@every_base
def test_a_weight_that_is_not_finite_is_not_unloaded_as_merged(base):
    model = adapted(compressed(net(), base))
    layers(model)["2"].stored_values.data.view(-1)[3] = float("inf")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"Layer '2': weight\[\d, \d\] is inf.* Nothing was merged"):
            merge()
    assert set(layers(model)) == set(LAYERS)


@every_base
@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_that_overflows_is_refused_and_changes_nothing(base, safe):
    model = adapted(compressed(net(dtype=torch.float16), base))
    layers(model)["2"].lora_B["default"].weight.data[1] = 60000.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"Layer '2': merged\[1, \d+\] would be .* torch.float16"):
            merge(safe_merge=safe)
    with pytest.raises(ValueError, match=r"merged\[1, \d+\] would be .* torch.float16"):
        layers(model)["2"].merge(safe_merge=safe)
    assert not layers(model)["2"].merged
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_that_overflows_beside_one_merged_before_is_refused():
    model = adapted(net(dtype=torch.float16), adapters=("default", "second"))
    model.merge_adapter(["default"])
    layers(model)["0"].lora_B["second"].weight.data[:] = 60000.0
    with pytest.raises(ValueError, match="Layer '0': merged"):
        model.merge_adapter(["second"])
    assert all(layer.merged_adapters == ["default"] for layer in layers(model).values())


def test_names_of_no_adapter_are_not_merged():
    model = adapted(adapters=("default", "second"))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"no adapter 'typo', so nothing was merged.*'default', 'second'"):
            merge(adapter_names=["second", "typo"])
        with pytest.raises(TypeError, match="must be a list of names, but is the string 'default'"):
            merge(adapter_names="default")
    assert not layers(model)["0"].merged
    check_output(model)


@every_base
def test_delta_weight_is_masked(base):
    model = adapted(compressed(net(), base))
    for name, layer in layers(model).items():
        weight = net().get_submodule(name).weight.detach()
        delta = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(delta, merged_reference(model)[name] - weight)
        assert_zero_off_mask(delta, weight != 0)
        model.merge_adapter()  # the mask is the base's, also where a merged value would be zero
        assert torch.equal(layer.get_delta_weight("default"), delta)
        model.unmerge_adapter()


@every_base
def test_a_merged_value_of_zero_stays_kept(base):
    model = adapted(compressed(net(), base), r=1, lora_alpha=1)
    layer, weight = layers(model)["0"], net()[0].weight.detach()
    row, column = (weight != 0).nonzero()[0].tolist()
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()[0, column] = weight[row, column]
        layer.lora_B["default"].weight.zero_()[row] = -1.0
    model.merge_adapter()
    assert layer.base_layer.weight[row, column] == 0
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)


@every_base
def test_deepcopy_pickle_and_conversion(base):
    model = adapted(compressed(net(), base))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    for other in copies:
        assert torch.equal(other(inputs()), model(inputs()))
        other.merge_adapter()
        check_output(other)
        again = copy.deepcopy(other)
        again.unmerge_adapter()
        check_output(again)
    assert not layers(model)["0"].merged
    merged = copies[0].to(torch.float32)  # while merged: the kept values are converted along
    merged.unmerge_adapter()
    assert layers(merged)["0"].stored_values.dtype == torch.float32
    assert torch.equal(layers(merged)["0"].base_layer.weight, net(dtype=torch.float32)[0].weight)


@every_layout
def test_state_dict_round_trips(layout):
    model, other = adapted(layout=layout), adapted(net(), layout=layout)
    fill(other, seed=4)
    assert not torch.equal(other(inputs()), model(inputs()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs()), model(inputs()))


def test_trained_biases():
    model = adapted(bias="lora_only").train()
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == {
        "base_model.model.2.base_layer.bias"
    }
    model(inputs()).sum().backward()
    torch.testing.assert_close(layers(model)["2"].base_layer.bias.grad, torch.full((12,), 5.0, dtype=torch.float64))


def test_wrong_input_is_named():
    model = adapted()
    with pytest.raises(ValueError, match=r"input has shape \(5, 7\)"):
        model(torch.zeros(5, 7, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repr(model)


@every_layout
@pytest.mark.parametrize("gradient", ["lors", "exact"])
def test_forward_mode_gives_the_derivative_of_the_forward(layout, gradient):
    """Of the input, through one adapter, two, none, a merged one, and beside the base under dropout."""
    model, x = adapted(adapters=("default", "other"), layout=layout, gradient=gradient), inputs()
    tangent = inputs(seed=9)

    def check(names: tuple[str, ...]) -> None:
        weights, bias = merged_reference(model, names), net()[2].bias.detach()
        formula = lambda x: torch.relu(x @ weights["0"].T) @ weights["2"].T + bias  # noqa: E731
        expected = torch.func.jvp(formula, (x,), (tangent,))
        for ours, theirs in zip(torch.func.jvp(model, (x,), (tangent,)), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs)

    for names in (("default",), ("default", "other")):
        model.base_model.set_adapter(list(names))
        check(names)
    with model.disable_adapter():
        check(())
    model.base_model.set_adapter("default")
    model.merge_adapter()
    check(("default",))
    model.unmerge_adapter()
    dropping = adapted(layout=layout, gradient=gradient, lora_dropout=0.5, target_modules=["0"]).train()

    def dropped(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return dropping(x)

    _, derivative = torch.func.jvp(dropped, (x,), (tangent,))
    step = 1e-6
    difference = (dropped(x + step * tangent) - dropped(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative.detach(), difference.detach(), rtol=1e-4, atol=1e-6)
