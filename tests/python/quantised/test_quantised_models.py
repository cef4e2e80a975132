# SPDX-License-Identifier: Apache-2.0
"""Whole models over quantised weights: conversion, saving, merging, refusals; also through PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lors_cuda import (
    LoRSConfig,
    LoRSLinear,
    SparseLinear,
    get_lors_model,
    load_adapter,
    merge_and_unload,
    named_lors_layers,
    save_adapter,
)
from lors_cuda.methods import FlatLoRA, Method
from lors_cuda.sparsity import measure_sparsity
from models import fill_adapters, prune_two_of_four, quantised, snapshot, tiny_llama, tokens

BF16 = torch.bfloat16
KINDS = ["int4", "int8", "e4m3"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def base(kind="int4", dtype=torch.float32, **fields):
    return quantised(tiny_llama(dtype=dtype), kind, 32, **fields)


def adapted(kind="int4", dtype=torch.float32, size=0.3, **fields):
    model = get_lors_model(base(kind, dtype), LoRSConfig(**{"r": 4, "lora_alpha": 8, "requantize": True, **fields}))
    fill_adapters(model, size=size)
    return model


def net(kind="int4"):
    torch.manual_seed(0)
    return quantised(prune_two_of_four(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))), kind, 32)


@every_kind
def test_trained_saved_loaded_and_merged_it_is_one_model(tmp_path, kind):
    model = adapted(kind, BF16, size=0.1, dither_seed=5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prints = {name: layer.sparse_weight.fingerprint() for name, layer in named_lors_layers(model)}
    ids, losses = tokens(), []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    logits = model(ids).logits
    save_adapter(model, tmp_path)
    loaded = load_adapter(base(kind, BF16), tmp_path)
    assert torch.equal(loaded(ids).logits, logits)
    fields = {"requantize": True, "remainder": None, "dither_seed": 5}
    assert all(getattr(loaded.lors_config, name) == value for name, value in fields.items())
    for name, layer in named_lors_layers(model):
        exported = layer.merged_sparse_weight()
        assert exported.fingerprint() == prints[name]
        assert exported.quantization.kind == kind
        assert torch.equal(layer.merge().weight, exported.to_dense())
        seeds = {each.dither_seed for _, each in named_lors_layers(model)}
    assert len(seeds) == len(prints)
    merged = merge_and_unload(loaded)
    assert torch.equal(merged(ids).logits, logits)
    assert all(type(m) is nn.Linear for m in merged.modules() if isinstance(m, (nn.Linear, SparseLinear)))


@every_kind
def test_a_plain_merge_is_of_the_dequantised_weight(kind):
    model = adapted(kind, requantize=False, size=0.05)
    layers = {name: layer.merged_sparse_weight() for name, layer in named_lors_layers(model)}
    assert all(weight.quantization is None for weight in layers.values())
    logits = model(tokens()).logits
    merged = merge_and_unload(model)
    for name, weight in layers.items():
        assert torch.equal(merged.get_submodule(name).weight, weight.to_dense())
    torch.testing.assert_close(merged(tokens()).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dither_seed": 6}, "was trained with requantize=True, remainder=None, dither_seed=5"),
        ({"remainder": "none"}, "is requantised otherwise in the model"),
        ({"requantize": False}, "is requantised otherwise in the model"),
    ],
)
def test_an_adapter_of_another_requantising_is_refused(tmp_path, fields, message):
    save_adapter(adapted(dither_seed=5), tmp_path)
    load_adapter(adapted(dither_seed=5), tmp_path)
    other = adapted(**{"dither_seed": 5, **fields})
    before = snapshot(other)
    with pytest.raises(ValueError, match=message):
        load_adapter(other, tmp_path)
    assert str(snapshot(other)) == str(before)


def test_layers_made_by_hand_are_not_saved_as_others(tmp_path):
    model = net()
    model[0] = LoRSLinear.from_linear(model[0], r=2, requantize=True, dither_seed=3)
    with pytest.raises(ValueError, match="'0' requantise otherwise than the configuration says"):
        save_adapter(model, tmp_path)
    model[0].set_requantization(False, None, 0)
    save_adapter(model, tmp_path)


def test_plain_sparse_linears_are_converted_too():
    model = nn.Sequential(SparseLinear.compress(prune_two_of_four(nn.Sequential(nn.Linear(8, 8)))[0]))
    stored = model[0]
    get_lors_model(model, LoRSConfig(r=2))
    assert isinstance(model[0], LoRSLinear)
    assert model[0].weight_values.data_ptr() == stored.weight_values.data_ptr()


def refused(model, config, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_lors_model(model, config)
    assert str(snapshot(model)) == str(before)


def test_what_cannot_be_requantised_is_refused_and_nothing_is_changed():
    mixed = net()
    mixed[2] = nn.Linear(32, 16)
    refused(mixed, LoRSConfig(r=2, requantize=True), "'2': requantize=True needs a quantised weight")
    refused(net("e4m3"), LoRSConfig(r=2, requantize=True, remainder="dither"), "'0', '2': There is a dither of an e4m3")
    refused(net(), LoRSConfig(r=2, requantize=True, remainder="stored"), "'0', '2': remainder is 'stored'")
    refused(net(), LoRSConfig(r=2, layout="bitmap"), "it is stored in layout '2:4' and layout='bitmap' was asked for")
    refused(net(), LoRSConfig(r=40), "the rank must be")
    with pytest.raises(ValueError, match="requantize=True rounds to nearest codes: leave rounding='stochastic' out"):
        LoRSConfig(requantize=True, rounding="stochastic")
    with pytest.raises(ValueError, match="Leave remainder='stored' out, or set requantize=True"):
        LoRSConfig(remainder="stored")


def test_an_error_halfway_gives_the_stored_layers_back(monkeypatch):
    model = net()
    stored = [model[0], model[2]]
    made = LoRSLinear.from_linear

    def fails_at_the_second(linear, **fields):
        if linear is stored[1]:
            raise MemoryError
        return made(linear, **fields)

    monkeypatch.setattr(LoRSLinear, "from_linear", fails_at_the_second)
    with pytest.raises(MemoryError):
        get_lors_model(model, LoRSConfig(r=2))
    assert [model[0], model[2]] == stored


def test_methods():
    model = get_lors_model(net(), LoRSConfig(r=2, requantize=True))
    with pytest.raises(ValueError, match="'flat-lora' adds noise to the merged weight, and the layers requantise it"):
        FlatLoRA().start(model)
    run = Method().start(model)
    model(torch.randn(3, 64)).sum().backward()
    run.finish()
    plain = get_lors_model(net(), LoRSConfig(r=2))
    FlatLoRA().start(plain)
    x = torch.randn(3, 64)
    plain[0].lora_B.data += 1
    assert not torch.equal(plain(x), plain.eval()(x))


def test_sparsity_counts_the_zeros_that_codes_stand_for():
    model = net("int8")
    measured = measure_sparsity(model)
    zeros = sum(int((layer.sparse_weight.to_dense() == 0).sum()) for layer in (model[0], model[2]))
    assert sum(one.zeros for one in measured) == zeros


class CodesOfAnother(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("weight_scale", torch.ones(8, 1))


class PackedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.ones(1, 8, dtype=torch.int32))


@pytest.mark.parametrize("kind", [CodesOfAnother, PackedLinear])
def test_modules_that_another_library_quantised_are_told_where_to_go(kind):
    model = nn.Sequential(nn.Linear(8, 8), kind())
    message = rf"is a {kind.__name__} whose weight another library has quantised.*quantized='keep'"
    with pytest.raises(ValueError, match=message):
        get_lors_model(model, LoRSConfig(r=2, target_modules=["1"]))


# ---- PEFT -----------------------------------------------------------------------------------------------------------


def peft_model(kind="int4", dtype=BF16, **fields):
    peft = pytest.importorskip("peft")
    import lors_cuda.peft as lors_peft

    config = lors_peft.LoRSLoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **fields)
    model = peft.get_peft_model(base(kind, dtype), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    return model.eval()


@every_kind
def test_peft_saves_loads_merges_and_unmerges(tmp_path, kind):
    model, ids = peft_model(kind, requantize=True, dither_seed=3), tokens()
    peft = pytest.importorskip("peft")
    logits = model(ids).logits
    assert not torch.equal(logits, peft_model(kind)(ids).logits)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(kind, BF16), tmp_path).eval()
    assert torch.equal(again(ids).logits, logits)
    with model.disable_adapter():
        frozen = model(ids).logits
    assert torch.equal(frozen, base(kind, BF16)(ids).logits)
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert torch.equal(model(ids).logits, logits)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    exported = {
        name: module.merged_sparse_weight() for name, module in model.named_modules() if hasattr(module, "base_layer")
    }
    unloaded = model.merge_and_unload()
    assert torch.equal(unloaded(ids).logits, logits)
    for name, weight in exported.items():
        linear = unloaded.get_submodule(name.removeprefix("base_model.model."))
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, weight.to_dense())


def test_peft_refusals():
    model = peft_model(requantize=False)
    with pytest.raises(ValueError, match="the merged weight has none of their grid"):
        model.merge_adapter()
    logits = model(tokens()).logits
    assert torch.equal(model.merge_and_unload()(tokens()).logits, logits)
    model = peft_model(requantize=True, lora_dropout=0.5).train()
    with pytest.raises(ValueError, match="requantised, and here no weight is merged: dropout"):
        model(tokens())
    peft_model(lora_dropout=0.5).train()(tokens())
    with pytest.raises(ValueError, match="requantize=True rounds to nearest codes: leave rounding='stochastic' out"):
        peft_model(requantize=True, rounding="stochastic")


def test_save_adapter_and_peft_read_each_other(tmp_path):
    import lors_cuda.peft as lors_peft

    model = adapted(dtype=BF16, dither_seed=4)
    save_adapter(model, tmp_path)
    loaded = lors_peft.from_pretrained(base(dtype=BF16), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    loaded.save_pretrained(tmp_path / "peft")
    again = load_adapter(base(dtype=BF16), tmp_path / "peft")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_peft_estimates_gradients_of_what_is_stored_as_of_what_it_stands_for():
    pytest.importorskip("peft")
    import lors_cuda.peft as lors_peft

    config = lors_peft.LoRSLoraConfig(r=2, target_modules=["0", "2"])
    stored, plain = net(), net()
    for name in ("0", "2"):
        setattr(plain, name, plain.get_submodule(name).to_linear())
    batches = [torch.randn(5, 64, generator=torch.Generator().manual_seed(0))]
    ours, wanted = (
        lors_peft.estimate_gradients(
            model, batches, config, steps=1, loss_fn=lambda model, batch: model(batch).square().sum()
        )
        for model in (stored, plain)
    )
    for name in ("0", "2"):
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-4, atol=1e-4)
