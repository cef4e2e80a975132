# SPDX-License-Identifier: Apache-2.0
"""Adapter directories: round trips, PEFT's format, and adapters that do not fit the model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from adapter_directories import FILES, Q_PROJ, assert_same_files, edit_config
from lors_cuda.checkpoint import load_adapter, save_adapter
from lors_cuda.config import LoRSConfig
from lors_cuda.linear import LoRSLinear
from lors_cuda.model import get_lors_model, named_lors_layers
from models import assert_unchanged, fill_adapters, logits, refused, snapshot, tiny_llama, tiny_net, trained

pytest.importorskip("safetensors")
from safetensors.torch import load_file

# ---- round trips ----


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient": "exact", "layout": "dense"},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.1\..*"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.*": 3.5}},
        {"modules_to_save": ["lm_head", "norm"]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, fields, dtype):
    model = trained(dtype, **fields)
    save_adapter(model, tmp_path / "new" / "adapter")
    fresh = tiny_llama(dtype=dtype)
    assert not torch.allclose(logits(fresh), logits(model))
    assert load_adapter(fresh, tmp_path / "new" / "adapter") is fresh
    assert torch.equal(logits(fresh), logits(model))
    again = get_lors_model(tiny_llama(dtype=dtype), LoRSConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    load_adapter(again, str(tmp_path / "new" / "adapter"))
    assert torch.equal(logits(again), logits(model))
    for other in (fresh, again):
        required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert {name: parameter.requires_grad for name, parameter in other.named_parameters()} == required
        for (name, layer), (_, expected) in zip(named_lors_layers(other), named_lors_layers(model), strict=True):
            assert (layer.r, layer.scaling, layer.gradient) == (expected.r, expected.scaling, expected.gradient), name
            assert layer.lora_A.dtype == expected.lora_A.dtype == torch.float32


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path):
    _, directory = saved
    save_adapter(load_adapter(tiny_llama(), directory), tmp_path / "second")
    assert_same_files(tmp_path / "second", directory)


def test_the_adapters_dtype_survives(tmp_path):
    model = trained()
    for _, layer in named_lors_layers(model):
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.bfloat16(), layer.lora_B.data.bfloat16()
    save_adapter(model, tmp_path)
    fresh = load_adapter(tiny_llama(), tmp_path)
    assert all(layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16 for _, layer in named_lors_layers(fresh))
    wider = load_adapter(get_lors_model(tiny_llama(), LoRSConfig(r=4, lora_alpha=8)), tmp_path)
    assert torch.equal(wider.get_submodule(Q_PROJ).lora_A, fresh.get_submodule(Q_PROJ).lora_A.float())


def test_layers_made_one_by_one_are_saved_with_their_own_ranks(tmp_path):
    def net(convert: bool) -> nn.Module:
        torch.manual_seed(0)
        linears = [nn.Linear(8, 8) for _ in range(4)]
        if convert:
            for index, r in ((0, 2), (1, 3), (3, 2)):
                linears[index] = LoRSLinear.from_linear(linears[index], r=r, lora_alpha=5 + index)
        # "1" is a suffix of "0.1", which is not adapted: a list of names would select it too.
        return nn.ModuleDict({"1": linears[0], "0": nn.ModuleDict({"0": linears[1], "1": linears[2], "3": linears[3]})})

    model = net(True)
    fill_adapters(model)
    save_adapter(model, tmp_path)
    other = load_adapter(net(False), tmp_path)
    layers = {name: (layer.r, layer.lora_alpha) for name, layer in named_lors_layers(other)}
    assert layers == {"1": (2, 5), "0.0": (3, 6), "0.3": (2, 8)}
    for (_, ours), (_, theirs) in zip(named_lors_layers(other), named_lors_layers(model), strict=True):
        assert torch.equal(ours.lora_B, theirs.lora_B)


def test_a_shared_layer_is_saved_once(tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        shared = nn.Linear(8, 8)
        return nn.Sequential(shared, nn.ReLU(), shared)

    model = get_lors_model(net(), LoRSConfig(r=2))
    fill_adapters(model)
    save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / FILES[1])) == 2
    other = load_adapter(net(), tmp_path)
    assert other[0] is other[2]
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))


def test_tied_modules_to_save_are_both_saved(tmp_path):
    def tied() -> nn.Module:
        model = tiny_llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    model = get_lors_model(tied(), LoRSConfig(r=4, modules_to_save=["lm_head", "embed_tokens"]))
    with torch.no_grad():
        model.lm_head.weight += 0.1
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(tied(), tmp_path)), logits(model))


def test_a_compiled_model_is_saved_under_its_own_names(saved, tmp_path):
    model, directory = saved
    save_adapter(torch.compile(model), tmp_path / "compiled")
    assert_same_files(tmp_path / "compiled", directory)
    fresh = tiny_llama()
    load_adapter(torch.compile(fresh), directory)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_a_distributed_model_is_saved_under_its_own_names(saved, tmp_path):
    model, directory = saved
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        save_adapter(nn.parallel.DistributedDataParallel(model), tmp_path / "distributed")
    finally:
        torch.distributed.destroy_process_group()
    assert_same_files(tmp_path / "distributed", directory)


# ---- PEFT ----


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_the_files_are_those_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    fields = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}
    model = trained(**fields)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules="all-linear", **fields))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / which / FILES[1]) for which in ("ours", "theirs"))
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in expected.items()
    }
    ours, expected = (json.loads((tmp_path / which / FILES[0]).read_text()) for which in ("ours", "theirs"))
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "use_rslora"):
        assert ours[field] == expected[field], field
    assert sorted(ours["target_modules"]) == sorted(name for name, _ in named_lors_layers(model))
    # But not its type: PEFT alone would apply the adapter without the mask (test_peft_loading.py has what it says).
    assert ours["peft_type"] != expected["peft_type"] == "LORA"


def test_an_adapter_of_peft_is_loaded_on_request_and_masked(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny_llama(), config)
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    before = snapshot(model)
    refused(ValueError, lambda: load_adapter(model, tmp_path), "not saved by lors_cuda", "strict_mask=False")
    assert_unchanged(model, before)
    load_adapter(model, tmp_path, strict_mask=False)
    layer, expected = model.get_submodule(Q_PROJ), theirs.base_model.model.get_submodule(Q_PROJ)
    assert torch.equal(layer.lora_B, expected.lora_B["default"].weight)
    delta = layer.merge().weight - layer.weight
    torch.testing.assert_close(delta, expected.get_delta_weight("default") * (layer.weight != 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
    ],
)
def test_what_only_peft_can_compute_is_refused(saved, changes):
    _, directory = saved
    edit_config(directory, **changes)
    (name,) = changes
    refused(
        ValueError, lambda: load_adapter(tiny_llama(), directory), f"{name}={changes[name]!r}", "adapter_config.json"
    )


# ---- an adapter that does not fit: refused with the place named, the model untouched ----


def other_mask() -> nn.Module:
    model = tiny_llama()
    with torch.no_grad():
        weight = model.get_submodule(Q_PROJ).weight
        weight[3, :4] = torch.tensor([0.0, 0.5, 0.5, 0.0]) if weight[3, 0] != 0 else torch.tensor([0.5, 0.5, 0.0, 0.0])
    return model


@pytest.mark.parametrize("convert_first", [False, True])
def test_another_mask_is_refused_by_name_and_can_be_overridden(saved, convert_first):
    trained_model, directory = saved
    model = other_mask()
    assert torch.equal((model.get_submodule(Q_PROJ).weight == 0).sum(), torch.tensor(32 * 32 // 2))
    if convert_first:
        get_lors_model(model, LoRSConfig(r=4, lora_alpha=8))
    before = snapshot(model)
    message = refused(
        ValueError, lambda: load_adapter(model, directory), "another sparsity mask", f"'{Q_PROJ}'", "strict_mask=False"
    )
    assert message.count("self_attn") == 1, "only the layer that differs is named"
    assert_unchanged(model, before)
    load_adapter(model, directory, strict_mask=False)
    assert torch.equal(model.get_submodule(Q_PROJ).lora_B, trained_model.get_submodule(Q_PROJ).lora_B)


@pytest.mark.parametrize("convert_first", [False, True])
def test_another_model_is_refused(saved, convert_first):
    _, directory = saved
    for model, fragment in ((tiny_net(), "another model"), (tiny_llama(layers=1), "model.layers.1")):
        if convert_first:
            get_lors_model(model, LoRSConfig(r=4, lora_alpha=8))
            fragment = "is not adapted in the model"
        before = snapshot(model)
        refused(ValueError, lambda model=model: load_adapter(model, directory), "was not loaded", fragment)
        assert_unchanged(model, before)


def test_a_module_that_is_no_linear_in_the_model_is_refused(saved):
    _, directory = saved
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj = nn.Identity()
    refused(ValueError, lambda: load_adapter(model, directory), f"'{Q_PROJ}' cannot be adapted: it is an Identity")


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"r": 2}, f"lora_A of '{Q_PROJ}' has shape [4, 32], but the model needs [2, 32]"),
        ({"lora_alpha": 16}, "lora_alpha=8, use_rslora=False in the adapter, but r=4, lora_alpha=16"),
        ({"use_rslora": True}, "use_rslora=True in the model"),
        ({"target_modules": ["q_proj"]}, "tensors for 'model.layers.0.mlp.down_proj', which is not adapted"),
        ({"modules_to_save": ["lm_head"]}, "no tensor for 'lm_head.weight'"),
    ],
)
def test_a_model_converted_otherwise_is_refused(saved, fields, fragment):
    _, directory = saved
    model = get_lors_model(tiny_llama(), LoRSConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    before = snapshot(model)
    refused(ValueError, lambda: load_adapter(model, directory), fragment)
    assert_unchanged(model, before)


def test_more_targets_in_the_model_than_tensors_are_refused(tmp_path):
    save_adapter(trained(target_modules=["q_proj"]), tmp_path)
    model = get_lors_model(tiny_llama(), LoRSConfig(r=4, lora_alpha=8))
    refused(ValueError, lambda: load_adapter(model, tmp_path), "no tensors for 'model.layers.0.self_attn.k_proj'")


def test_modules_to_save_of_another_shape_are_refused(tmp_path):
    save_adapter(trained(modules_to_save=["lm_head"]), tmp_path)
    model = tiny_llama()
    model.lm_head = nn.Linear(32, 65, bias=False)
    before = snapshot(model)
    refused(ValueError, lambda: load_adapter(model, tmp_path), "'lm_head.weight' has shape [64, 32]", "[65, 32]")
    assert_unchanged(model, before)


def test_a_dtype_that_cannot_hold_the_adapter_is_refused(saved):
    _, directory = saved
    model = get_lors_model(tiny_llama(), LoRSConfig(r=4, lora_alpha=8))
    model.get_submodule(Q_PROJ).to(torch.bfloat16)
    refused(ValueError, lambda: load_adapter(model, directory), f"lora_A of '{Q_PROJ}' is torch.float32", "bfloat16")


def test_adapters_that_never_learned_are_named(tmp_path, recwarn):
    model = trained()
    save_adapter(model, tmp_path)
    assert not [each for each in recwarn if "still zero" in str(each.message)]
    model.get_submodule(Q_PROJ).lora_B.data.zero_()
    with pytest.warns(UserWarning, match=f"1 of 14 adapters are still zero: '{Q_PROJ}'"):
        save_adapter(model, tmp_path)
    for _, layer in named_lors_layers(model):
        layer.lora_B.data.zero_()  # as at the start, where there is nothing to say
    recwarn.clear()
    save_adapter(model, tmp_path)
    assert not [each for each in recwarn if "still zero" in str(each.message)]
