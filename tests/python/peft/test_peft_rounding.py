# SPDX-License-Identifier: Apache-2.0
"""Rounding by chance through PEFT's door: one rounded weight per layer, merged as adapted, files, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from lors_cuda.methods import FlatLoRA, Method
from peft_models import adapted, config_of, every_base, net, peft

BF16 = torch.bfloat16
STOCHASTIC = {"rounding": "stochastic", "rounding_seed": 9}


def model_of(base="2:4", adapters=("default",), **fields):
    layout = {"layout": base} if base != "linear" else {}
    return adapted(net(dtype=BF16), adapters, **{**STOCHASTIC, **layout, **fields})


def data(seed=0):
    return torch.randn(24, net()[0].in_features, generator=torch.Generator().manual_seed(seed)).to(BF16)


@every_base
def test_merged_is_adapted_bit_for_bit(base):
    model, x = model_of(base), data()
    output = model(x)
    assert not torch.equal(output, model_of(base, rounding="nearest")(x))
    assert not torch.equal(output, model_of(base, rounding_seed=10)(x))
    layer = model.base_model.model[0]
    zeros = ~layer.sparse_weight.mask()
    model.merge_adapter()
    assert torch.equal(model(x), output)
    model.unmerge_adapter()
    assert torch.equal(model(x), output)
    unloaded = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(unloaded(x), output)
    assert not unloaded[0].weight[zeros].any()


def test_two_adapters_make_one_weight_that_is_rounded_once():
    model, x = model_of(adapters=("one", "two")), data()
    model.base_model.set_adapter(["one", "two"])
    output = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), output)
    with pytest.raises(ValueError, match=r"others rounding='stochastic', rounding_seed=9.*; they are merged into"):
        model.add_adapter("three", config_of(**{**STOCHASTIC, "rounding_seed": 1}))


def test_files_hold_it(tmp_path):
    model, x = model_of(), data()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(dtype=BF16), tmp_path).eval()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("method", [Method(), FlatLoRA(sigma=0.3)])
def test_a_run_draws_anew_at_each_step(method):
    model, x = model_of().train(), data()
    run = method.start(model)
    optimizer = run.optimizer(lr=0.0)

    def grads():
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        return [output, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    first = grads()
    assert all(torch.equal(one, two) for one, two in zip(first, grads(), strict=True))
    optimizer.step()
    assert not torch.equal(grads()[0], first[0])
    run.finish()


@pytest.mark.parametrize("fields", [{}, {"rounding": "nearest"}])
def test_dropout_keeps_the_adapter_apart_and_is_refused(fields):
    model = model_of(lora_dropout=0.5, **fields)
    model(data())  # in evaluation there is none
    model.train()
    if fields:
        model(data())
        FlatLoRA(sigma=0.3).start(model)
    with pytest.raises(ValueError, match="Set lora_dropout=0"):
        model(data())


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="rounding is 'up'; it must be 'nearest' or 'stochastic'"):
        config_of(rounding="up")
    with pytest.raises(ValueError, match="rounding_seed is -3"):
        config_of(rounding_seed=-3)
