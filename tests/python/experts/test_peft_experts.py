# SPDX-License-Identifier: Apache-2.0
"""LoRS adapters of experts in PEFT: PEFT's calls, its names in files, its numbers before masking."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_models import EXPERT_MODELS, experts_model, loss_of, token_batch
from torch import nn

from lors_cuda import LoRSConfig, get_lors_model, load_adapter, merge_cache, save_adapter
from lors_cuda.experts import expert_stacks, stack_of
from models import assert_unchanged, refused, snapshot

peft = pytest.importorskip("peft")

from lors_cuda.peft import (  # noqa: E402
    LoRSLoraConfig,
    estimate_gradients,
    from_pretrained,
    init_from_gradients,
)
from lors_cuda.peft.experts import LoRSLoraExpertWeight  # noqa: E402

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CONFIG = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}


def fill(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def masked(name: str = "mixtral", dtype: torch.dtype = torch.float32, **fields) -> nn.Module:
    config = LoRSLoraConfig(**{**CONFIG, "target_parameters": BOTH, **fields})
    return fill(peft.get_peft_model(experts_model(name, dtype), config))


def loss(model: nn.Module) -> torch.Tensor:
    return loss_of(model.get_base_model() if isinstance(model, peft.PeftModel) else model, token_batch())


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_the_same_as_get_lors_model_through_every_file(name, tmp_path):
    model = masked(name, target_modules="all-linear", target_parameters=None)
    model.save_pretrained(tmp_path)
    expected = loss(model)
    expected.backward()
    again = from_pretrained(experts_model(name), tmp_path)
    ours = load_adapter(experts_model(name), tmp_path)

    torch.testing.assert_close(loss(again), expected, rtol=0, atol=0)
    value = loss(ours)
    value.backward()

    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    layers = {key: layer for key, layer in model.base_model.model.named_modules() if hasattr(layer, "factors")}
    compared = 0
    for path, layer in layers.items():
        grads = [p.grad for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
        wanted = ours.get_submodule(path)
        if isinstance(layer, LoRSLoraExpertWeight):
            compared += 1
            E = layer.num_experts
            grads = [grads[0].unflatten(0, (E, -1)), grads[1].unflatten(1, (-1, E)).permute(2, 0, 1)]
        assert torch.equal(grads[0], wanted.lora_A.grad), path
        assert torch.equal(grads[1], wanted.lora_B.grad), path
    assert compared == len(list(expert_stacks(experts_model(name))))
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(loss(from_pretrained(experts_model(name), tmp_path / "ours")), expected, rtol=0, atol=0)


@pytest.mark.parametrize("parameters", [BOTH, BOTH[1:]])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_before_masking_the_product_is_that_of_pefts_own_wrappers(name, parameters, tmp_path):
    plain = fill(peft.get_peft_model(experts_model(name), peft.LoraConfig(**CONFIG, target_parameters=parameters)))
    plain.save_pretrained(tmp_path)
    model = from_pretrained(experts_model(name), tmp_path, strict_mask=False)
    wrapped = {
        key: layer for key, layer in plain.base_model.model.named_modules() if type(layer).__name__ == "ParamWrapper"
    }
    assert len(wrapped) == 2 * len(parameters)
    for key, theirs in wrapped.items():
        path = f"{key.replace('.base_layer', '')}.{theirs.parameter_name}"
        layer = model.base_model.model.get_submodule(path)
        delta = theirs.get_delta_weight("default")
        delta = delta.transpose(1, 2) if name == "gpt_oss" else delta
        kept = layer.sparse_weight.mask().view(delta.shape)
        torch.testing.assert_close(layer.get_delta_weight("default"), torch.where(kept, delta, 0))
    merged = model.merge_and_unload()
    theirs = plain.merge_and_unload()
    for path, module, key in expert_stacks(experts_model(name)):
        owner = path.rpartition(".")[0]
        wanted = torch.where(stack_of(module, key) != 0, stack_of(theirs.get_submodule(owner), key), 0)
        torch.testing.assert_close(stack_of(merged.get_submodule(owner), key), wanted, rtol=1e-5, atol=1e-6)


def test_merged_in_place_unmerged_disabled_and_unloaded():
    model, plain = masked("gpt_oss"), experts_model("gpt_oss")
    adapted = loss(model)
    model.merge_adapter()
    torch.testing.assert_close(loss(model), adapted)
    model.unmerge_adapter()
    torch.testing.assert_close(loss(model), adapted, rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(loss(model), loss(plain))
    with merge_cache(model):
        torch.testing.assert_close(loss(model), adapted)
        torch.testing.assert_close(loss(model), adapted)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(loss(merged), adapted)
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in unloaded.state_dict().items())


def test_two_adapters_one_after_the_other_and_together(tmp_path):
    model = masked("mixtral", torch.float64)
    first = loss(model)
    model.add_adapter("other", LoRSLoraConfig(**{**CONFIG, "r": 2}, target_parameters=BOTH))
    fill(model, seed=1)  # the first has its numbers again, in the order of names
    names = [key for key, _ in model.named_parameters() if "lora_" in key]
    assert sum(".other." in key for key in names) == len(names) / 2
    model.set_adapter("other")
    second = loss(model)
    model.base_model.set_adapter(["default", "other"])
    together = loss(model)
    assert len({round(float(value), 6) for value in (first, second, together)}) == 3
    layer = model.base_model.model.model.layers[0].mlp.experts.down_proj
    lora_A, lora_B, scaling = layer.stacked(["default", "other"])
    expected = sum(layer.scaling[n] * torch.matmul(*reversed(layer.factors(n))) for n in ("default", "other"))
    torch.testing.assert_close(scaling * lora_B @ lora_A, expected)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(loss(merged), together)
    model.save_pretrained(tmp_path)
    again = from_pretrained(experts_model("mixtral", torch.float64), tmp_path / "other")
    torch.testing.assert_close(loss(again), second)
    refused(
        ValueError,
        lambda: model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat"),
        "add_weighted_adapter does not support",
    )
    model.delete_adapter("other")
    assert not any(".other." in key for key, _ in model.named_parameters())


def test_the_gradient_start_reaches_experts():
    base, config = experts_model("mixtral"), LoRSLoraConfig(**CONFIG, target_parameters=BOTH)
    batches = [{"input_ids": token_batch(i), "labels": token_batch(i)} for i in range(3)]
    gradients = estimate_gradients(base, batches, config)
    model = peft.get_peft_model(base, config)
    before = loss(model)
    init_from_gradients(model, gradients)
    layer = model.base_model.model.model.layers[1].mlp.experts.gate_up_proj
    lora_A, lora_B = layer.factors("default")
    assert lora_B.count_nonzero() == 0
    products = lora_A @ lora_A.transpose(1, 2)  # orthonormal rows in each expert
    torch.testing.assert_close(products, torch.eye(3).expand(4, 3, 3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss(model), before)


def test_names_choose_as_in_get_lors_model():
    def chosen(**fields) -> list[str]:
        model = peft.get_peft_model(experts_model("mixtral"), LoRSLoraConfig(r=2, **fields))
        return [key for key, layer in model.base_model.model.named_modules() if hasattr(layer, "factors")]

    def ours(**fields) -> list[str]:
        from lors_cuda import named_lors_layers

        return [
            key for key, _ in named_lors_layers(get_lors_model(experts_model("mixtral"), LoRSConfig(r=2, **fields)))
        ]

    for fields in (
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["experts"]},
        {"target_modules": ["q_proj"], "target_parameters": ["layers.1.mlp.experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ):
        assert chosen(**fields) == ours(**fields)


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"target_parameters": ["experts.w1"]}, ("What was w1 is in gate_up_proj",)),
        ({"target_parameters": ["mlp.gate.weight"]}, ("a parameter of a MixtralTopKRouter",)),
        ({"lora_dropout": 0.1}, ("lora_dropout=0.1 is not supported for adapters of experts",)),
        ({"init_lora_weights": "orthogonal", "r": 4}, ("init_lora_weights='orthogonal' is not supported",)),
        ({"rounding": "stochastic"}, ("rounding='stochastic' is not supported",)),
        ({"requantize": True}, ("requantize=True needs a quantised weight",)),
        ({"rank_pattern": {"experts.down_proj": 33}}, ("r is 33", "down_proj")),
        ({"layout": "2:4", "target_parameters": BOTH}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_changed(fields, fragments):
    model = experts_model("mixtral")
    if fragments is None:  # a stack that is not 2:4
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[1] = 1.0
        fragments = ("'model.layers.1.mlp.experts.down_proj'",)
    before = snapshot(model)
    config = {**CONFIG, "target_parameters": BOTH, **fields}
    refused(ValueError, lambda: peft.get_peft_model(model, LoRSLoraConfig(**config)), *fragments)
    assert_unchanged(model, before)


def test_a_failure_halfway_puts_the_experts_back(monkeypatch):
    model = experts_model("gpt_oss")
    before = snapshot(model)
    made = []

    def third_fails(self, *args, **kwargs):
        made.append(self)
        if len(made) == 3:
            raise MemoryError("no memory")
        return original(self, *args, **kwargs)

    original = LoRSLoraExpertWeight.update_layer
    monkeypatch.setattr(LoRSLoraExpertWeight, "update_layer", third_fails)
    config = LoRSLoraConfig(**CONFIG, target_parameters=BOTH)
    with pytest.raises(MemoryError):
        peft.get_peft_model(model, config)
    assert_unchanged(model, before)


def test_another_mask_is_refused_by_the_stacks_name(tmp_path):
    masked().save_pretrained(tmp_path)
    model = experts_model("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[0, 0, :3] = 1.0
    before = snapshot(model)
    refused(ValueError, lambda: from_pretrained(model, tmp_path), "another sparsity mask", "experts.gate_up_proj")
    assert_unchanged(model, before)


def test_samples_with_adapters_of_their_own_are_refused():
    model = masked().eval()
    ids = token_batch()
    refused(
        ValueError,
        lambda: model(input_ids=ids, adapter_names=["default", "__base__"]),
        "adapter_names is not supported with adapters of experts",
    )
