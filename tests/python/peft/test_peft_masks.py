# SPDX-License-Identifier: Apache-2.0
"""PEFT models in training scripts: masks survive averages and conversions, scalings set by hand are saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lors_cuda import load_adapter
from peft_models import LAYERS, adapted, compressed, every_base, every_layout, inputs, layers, lors_peft, net

NO_NUMBERS = "Masks are not numbers"


@every_base
def test_averaging_an_unchanged_model_is_the_identity(base):
    model = adapted(compressed(net(), base))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for _ in range(5):
        averaged.update_parameters(model)
        for ours, theirs in zip(averaged.module.state_dict().values(), model.state_dict().values(), strict=True):
            ours.copy_(0.9 * ours + 0.1 * theirs)
    torch.testing.assert_close(averaged(inputs()), model(inputs()))
    merged, expected = averaged.module.merge_and_unload(), model.merge_and_unload()
    for name in LAYERS:
        zeros = expected.get_submodule(name).weight == 0
        assert torch.equal(merged.get_submodule(name).weight == 0, zeros)


@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
def test_averaged_buffers_are_refused(layout):
    model = adapted(layout=layout)
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        averaged.update_parameters(model)
    for use in (lambda: averaged(inputs()), averaged.module.merge_adapter, averaged.module.merge_and_unload):
        with pytest.raises(ValueError, match=NO_NUMBERS):
            use()


@every_layout
@pytest.mark.parametrize("merged", [False, True])
def test_a_conversion_keeps_what_rounds_to_zero(layout, merged):
    base = net(dtype=torch.float32)
    row, column = base[0].weight.nonzero()[0].tolist()
    with torch.no_grad():
        base[0].weight[row, column] = 1e-9
    model = adapted(base, layout=layout)
    mask = layers(model)["0"].sparse_weight.mask()
    if merged:
        model.merge_adapter()
    model.half()
    if merged:
        model.unmerge_adapter()
    assert layers(model)["0"].sparse_weight.dtype == torch.float16
    assert torch.equal(layers(model)["0"].sparse_weight.mask(), mask)
    model(inputs(dtype=torch.float16))
    other = adapted(net(dtype=torch.float16), layout=layout)
    other.load_state_dict(model.state_dict())
    assert torch.equal(layers(other)["0"].sparse_weight.mask(), mask)


def test_states_with_dense_weights_of_nn_linear_load():
    model, other = adapted(layout="dense"), adapted(net(seed=3), layout="dense")
    state = {
        name.replace("base_layer.weight_values", "base_layer.weight"): tensor
        for name, tensor in model.state_dict().items()
        if "mask_digest" not in name
    }
    assert any(name.endswith("base_layer.weight") for name in state)
    other.load_state_dict(state)
    assert torch.equal(other(inputs()), model(inputs()))


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"alpha_pattern": {"0": 5}, "rank_pattern": {"2": 2}}])
def test_scalings_set_by_hand_are_saved(tmp_path, fields):
    model = copy.deepcopy(adapted(**fields))  # a copy saves its own
    layers(model)["0"].scaling["default"] *= 0.5
    layers(model)["2"].set_scale("default", 3.0)
    model.save_pretrained(tmp_path)
    loaded = lors_peft.from_pretrained(net(), tmp_path)
    for name in LAYERS:
        assert layers(loaded)[name].scaling["default"] == pytest.approx(layers(model)[name].scaling["default"])
    torch.testing.assert_close(loaded(inputs()), model(inputs()))
    torch.testing.assert_close(load_adapter(net(), tmp_path)(inputs()), model(inputs()))
    layers(model)["0"].scaling["default"] *= 2
    layers(model)["2"].set_scale("default", 1.0)
    model.save_pretrained(tmp_path)
    again = lors_peft.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(again(inputs()), adapted(**fields)(inputs()))
