# SPDX-License-Identifier: Apache-2.0
"""Whole models: converting, training, merging, switching the adapters off, and refusing without a trace."""

from __future__ import annotations

import copy
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from lors_cuda.config import LoRSConfig
from lors_cuda.linear import LoRSLinear
from lors_cuda.model import disable_adapter, get_lors_model, merge_and_unload, named_lors_layers
from models import assert_unchanged, batch, fill_adapters, logits, refused, snapshot, tiny_llama, tiny_net

Q_PROJ = "model.layers.0.self_attn.q_proj"


def converted(seed: int = 0, dtype: torch.dtype = torch.float32, **fields) -> nn.Module:
    return get_lors_model(tiny_llama(seed, dtype), LoRSConfig(**{"r": 4, "lora_alpha": 8, **fields}))


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    kinds = (nn.Linear, LoRSLinear)
    return {name: module.weight != 0 for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_does_not_change_the_output(dtype, gradient):
    model = tiny_llama(dtype=dtype)
    before = logits(model)
    assert get_lors_model(model, LoRSConfig(r=4, gradient=gradient)) is model
    # The same weight in the same product; only the order of summation inside it may differ.
    torch.testing.assert_close(logits(model), before, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    fill_adapters(model)
    assert (logits(model) - before).abs().max() > 0.01, (
        "the adapters must have an effect for this test to mean anything"
    )


def test_only_adapters_require_gradients():
    model = converted()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 28
    assert all(name.endswith((".lora_A", ".lora_B")) for name in trained)
    assert isinstance(model.lm_head, nn.Linear)
    assert not any(layer.lora_B.any() for _, layer in named_lors_layers(model))
    assert all(layer.lora_A.std() > 0 for _, layer in named_lors_layers(model))


def test_modules_to_save_are_trained_whole_and_not_adapted():
    model = converted(modules_to_save=["lm_head", "layers.1.mlp"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {name for name in trained if not name.endswith((".lora_A", ".lora_B"))}
    mlp = {f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    assert whole == mlp | {"lm_head.weight"}
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Linear)
    assert len(trained) == 2 * 11 + 4


def test_the_configuration_reaches_every_layer():
    config = LoRSConfig(
        r=4,
        lora_alpha=6,
        gradient="exact",
        use_rslora=True,
        rank_pattern={"q_proj": 2, "mlp.*": 8},
        alpha_pattern={r"layers\.1\..*": 3},
    )
    model = get_lors_model(tiny_llama(), config)
    layers = dict(named_lors_layers(model))
    assert len(layers) == 14
    for name, layer in layers.items():
        r = 2 if "q_proj" in name else 8 if "mlp" in name else 4
        alpha = 3 if "layers.1" in name else 6
        assert (layer.r, layer.lora_alpha, layer.gradient) == (r, alpha, "exact"), name
        assert layer.scaling == pytest.approx(alpha / math.sqrt(r))
        assert tuple(layer.lora_A.shape) == (r, layer.in_features)
    assert model.lors_config == config
    assert model.lors_config is not config


def test_init_lora_weights_false_starts_elsewhere():
    model = converted(init_lora_weights=False)
    assert all(layer.lora_B.std() > 0 for _, layer in named_lors_layers(model))


@pytest.mark.parametrize("gradient", ["lors", "exact"])
def test_loss_falls_in_thirty_steps_and_every_zero_survives(gradient):
    model = converted(gradient=gradient)
    before = masks(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for step in range(30):
        loss = model(**batch(step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2]), losses
    merge_and_unload(model)
    after = masks(model)
    for name, mask in before.items():
        assert not (after[name] & ~mask).any(), f"{name} has values where it had none"
    pruned = [name for name in before if name != "lm_head"]
    assert sum(before[name].sum() for name in pruned) * 2 == sum(before[name].numel() for name in pruned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_adapted(dtype):
    model = converted(dtype=dtype).eval()
    fill_adapters(model)
    adapted = logits(model)
    assert merge_and_unload(model) is model
    assert not list(named_lors_layers(model))
    assert not hasattr(model, "lors_config")
    # The adapted forward rounds W~ once to the weight's dtype, exactly as the merged weight is.
    torch.testing.assert_close(logits(model), adapted, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_merged_layers_are_plain_frozen_linears_with_bias():
    net = tiny_net().eval()
    bias = net[2].bias.detach().clone()
    get_lors_model(net, LoRSConfig(r=2))
    fill_adapters(net)
    merge_and_unload(net)
    assert [type(net[0]), type(net[2])] == [nn.Linear, nn.Linear]
    assert net[0].bias is None
    assert torch.equal(net[2].bias, bias)
    assert not net[2].training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    get_lors_model(net, LoRSConfig(r=2))  # and can be converted again


@pytest.mark.parametrize("which", ["weight_values", "lora_A", "lora_B"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_merge_refuses_non_finite_values_and_names_the_place(which, value):
    model = converted(layout="dense")
    fill_adapters(model)
    # The last layer, so that a merge which checks as it goes would have replaced the others already.
    with torch.no_grad():
        getattr(model.model.layers[1].mlp.down_proj, which)[2, 3] = value
    before = snapshot(model)
    place = "weight[2, 3]" if which == "weight_values" else f"{which}[2, 3]"
    refused(ValueError, lambda: merge_and_unload(model), "model.layers.1.mlp.down_proj", place, str(value))
    assert_unchanged(model, before)


def test_merge_says_what_has_no_values_or_no_finite_scaling():
    model = converted()
    layer = model.model.layers[1].mlp.down_proj
    pair = layer.lora_A.detach(), layer.lora_B.detach()
    refused(ValueError, lambda: layer.sparse_weight.merge(*pair, math.nan), "scaling is nan", "lora_alpha")
    refused(ValueError, lambda: merge_and_unload(model.to("meta")), "weight is on the meta device", "Load the model")


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_merge_refuses_a_sum_beyond_the_range_and_changes_nothing(layout):
    model = converted(dtype=torch.float16, layout=layout)
    fill_adapters(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B[2] = 1e6
    before = snapshot(model)
    refused(ValueError, lambda: merge_and_unload(model), "'model.layers.1.mlp.down_proj': merged[2, ", "torch.float16")
    assert_unchanged(model, before)
    merge_and_unload(model.float())  # the way out that the sentence names
    assert torch.isfinite(model.model.layers[1].mlp.down_proj.weight).all()


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"r": 33}, (Q_PROJ, "r is 33")),
        ({"r": 4, "rank_pattern": {"k_proj": 17}}, ("'model.layers.0.self_attn.k_proj'", "r is 17")),
        ({"r": 33}, ("'model.layers.1.mlp.down_proj': r is 33; for a layer of 32 x 64",)),
        ({"target_modules": ["nothing"]}, ("matches no nn.Linear",)),
        ({"modules_to_save": ["nothing"]}, ("modules_to_save names 'nothing'",)),
        ({"target_modules": ["q_proj", "embed_tokens"]}, ("'model.embed_tokens' cannot be adapted",)),
    ],
)
def test_a_refused_conversion_changes_nothing(fields, fragments):
    model = tiny_llama()
    before = snapshot(model)
    refused(ValueError, lambda: get_lors_model(model, LoRSConfig(**{"r": 4, **fields})), *fragments)
    assert_unchanged(model, before)


def test_a_weight_that_does_not_fit_the_layout_changes_nothing():
    net = tiny_net()
    with torch.no_grad():
        net[2].weight.fill_(1.0)  # the last one: the first still fits 2:4
    before = snapshot(net)
    refused(ValueError, lambda: get_lors_model(net, LoRSConfig(r=2, layout="2:4")), "'2'")
    assert_unchanged(net, before)


def test_an_error_halfway_is_undone(monkeypatch):
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before = snapshot(model)
    from_linear = LoRSLinear.from_linear.__func__
    calls = []

    def failing(cls, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("no memory for the fourth layer")
        return from_linear(cls, *args, **kwargs)

    monkeypatch.setattr(LoRSLinear, "from_linear", classmethod(failing))
    refused(MemoryError, lambda: get_lors_model(model, LoRSConfig(r=4)), "fourth layer")
    assert_unchanged(model, before)


def test_each_linear_is_freed_before_the_next_is_converted(monkeypatch):
    model = tiny_llama()
    originals = weakref.WeakSet(module for module in model.modules() if isinstance(module, nn.Linear))
    from_linear = LoRSLinear.from_linear.__func__
    alive = []

    def counting(cls, *args, **kwargs):
        alive.append(len(originals))
        return from_linear(cls, *args, **kwargs)

    monkeypatch.setattr(LoRSLinear, "from_linear", classmethod(counting))
    get_lors_model(model, LoRSConfig(r=4))
    assert alive == list(range(15, 1, -1))  # 14 targets and the head


def test_a_model_is_converted_once():
    model = converted(target_modules=["q_proj"])
    before = snapshot(model)
    config = LoRSConfig(target_modules=["v_proj"])
    refused(ValueError, lambda: get_lors_model(model, config), "already has LoRS layers", Q_PROJ)
    assert_unchanged(model, before)


def test_wrong_arguments_are_refused():
    refused(TypeError, lambda: get_lors_model("model", LoRSConfig()), "torch.nn.Module, but is str")
    refused(TypeError, lambda: get_lors_model(tiny_net(), {"r": 4}), "LoRSConfig, but is dict")
    refused(ValueError, lambda: get_lors_model(nn.Linear(4, 4), LoRSConfig(r=2)), "LoRSLinear.from_linear")
    refused(ValueError, lambda: merge_and_unload(tiny_net()), "no LoRS layers")
    refused(TypeError, lambda: merge_and_unload(None), "torch.nn.Module")
    layer = LoRSLinear.from_linear(nn.Linear(8, 4), r=2)
    refused(ValueError, lambda: merge_and_unload(layer), "call its merge()")


def test_a_shared_linear_stays_shared():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    net = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    x = torch.randn(3, 8)
    before = net(x)
    get_lors_model(net, LoRSConfig(r=2))
    assert net[0] is net[2][0]
    assert [name for name, _ in named_lors_layers(net)] == ["0"]
    torch.testing.assert_close(net(x), before)
    fill_adapters(net)
    adapted = net(x)
    assert not torch.allclose(adapted, before)
    merge_and_unload(net)
    assert type(net[0]) is nn.Linear
    assert net[0] is net[2][0]
    torch.testing.assert_close(net(x), adapted)


def test_disable_adapter_gives_the_base_model():
    model = tiny_llama()
    base = logits(model)
    get_lors_model(model, LoRSConfig(r=4))
    fill_adapters(model)
    adapted = logits(model)
    with disable_adapter(model):
        torch.testing.assert_close(logits(model), base)
        with disable_adapter(model):
            torch.testing.assert_close(logits(model), base)
        torch.testing.assert_close(logits(model), base)
    assert torch.equal(logits(model), adapted)
    assert not torch.allclose(adapted, base)


def test_disable_adapter_undoes_itself_on_an_error_and_respects_earlier_choices():
    model = converted()
    layers = [layer for _, layer in named_lors_layers(model)]
    layers[3].adapter_enabled = False

    def fail() -> None:
        with disable_adapter(model):
            assert not any(layer.adapter_enabled for layer in layers)
            raise KeyError("inside")

    refused(KeyError, fail, "inside")
    assert [layer.adapter_enabled for layer in layers] == [index != 3 for index in range(14)]


def test_disable_adapter_needs_a_converted_model():
    def use() -> None:
        with disable_adapter(tiny_net()):
            pass

    refused(ValueError, use, "no LoRS layers")


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_compute_the_same(how):
    model = converted(modules_to_save=["lm_head"]).eval()
    fill_adapters(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = converted(seed=1, modules_to_save=["lm_head"])
        assert not torch.allclose(logits(other), logits(model))
        other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other), logits(model))
    assert other.lors_config == model.lors_config
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in other.named_parameters()} == required
    before = logits(model)
    fill_adapters(other, seed=5)
    assert torch.equal(logits(model), before), "the copy shares memory with the original"
