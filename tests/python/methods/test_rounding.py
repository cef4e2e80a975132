# SPDX-License-Identifier: Apache-2.0
"""Rounding by chance and Flat-LoRA's noise in a training: one draw per step, evaluation as merged, files, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from method_runs import made, train

from lors_cuda import (
    LoRSConfig,
    LoRSLinear,
    get_lors_model,
    load_adapter,
    merge_and_unload,
    merge_cache,
    named_lors_layers,
    save_adapter,
)
from lors_cuda._draws import derived_seed
from lors_cuda.methods import FlatLoRA, Method, get_method
from models import batch, logits, refused, tiny_llama

BF16 = torch.bfloat16


def model_of(layout="2:4", dtype=BF16, **fields):
    torch.manual_seed(0)
    fields = {"rounding": "stochastic", "init_lora_weights": False} | fields
    return get_lors_model(tiny_llama(dtype=dtype), LoRSConfig(r=4, lora_alpha=8, layout=layout, **fields)).train()


def grads(model, data):
    model.zero_grad()
    model(**data).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_the_adapted_model_evaluates_with_the_merged_bits(layout):
    model = model_of(layout, rounding_seed=5).eval()
    masks = {name: layer.sparse_weight.mask() for name, layer in named_lors_layers(model)}
    adapted, nearest = logits(model), logits(model_of(layout, rounding="nearest").eval())
    assert not torch.equal(adapted, nearest)
    with merge_cache(model):
        assert torch.equal(logits(model), adapted)
    merged = merge_and_unload(copy.deepcopy(model))
    assert torch.equal(logits(merged), adapted)
    assert torch.equal(logits(merge_and_unload(copy.deepcopy(model))), adapted)
    assert torch.equal(logits(merge_and_unload(copy.deepcopy(model), rounding="nearest")), nearest)
    other = merge_and_unload(copy.deepcopy(model), seed=6)
    assert not torch.equal(logits(other), adapted)
    assert torch.equal(logits(other), logits(merge_and_unload(model_of(layout, rounding_seed=6))))
    for name, mask in masks.items():
        layer = merged.get_submodule(name)
        assert not layer.weight[~mask].any()
        moved = (
            layer.weight[mask].float()
            - merge_and_unload(copy.deepcopy(model), rounding="nearest").get_submodule(name).weight[mask].float()
        )
        assert 0.1 < float((moved != 0).float().mean()) < 0.5  # of uniform fractions a quarter


def test_layers_draw_differently():
    seeds = [layer.rounding_seed for _, layer in named_lors_layers(model_of())]
    assert len(set(seeds)) == len(seeds)


def test_a_wide_model_has_nothing_to_round():
    model = model_of(dtype=torch.float32)
    run = Method().start(model)
    plain = model_of(dtype=torch.float32, rounding="nearest")
    assert torch.equal(logits(model), logits(plain))
    # Under autocast a step rounds by chance, and evaluation as a merged float32 model does.
    with torch.autocast("cpu", BF16):
        assert not torch.equal(logits(model), logits(plain))
        assert torch.equal(logits(model.eval()), logits(plain.eval()))
    run.finish()


@pytest.mark.parametrize("method", [Method(), FlatLoRA(sigma=0.3)])
def test_a_step_has_one_draw_and_the_next_another(method):
    model = model_of()
    run = method.start(model)
    optimizer = run.optimizer(lr=0.0)  # nothing moves: only the draws differ
    first, again = grads(model, batch(0)), grads(model, batch(0))
    assert equal(first, again)
    seeds = [layer.step_seed for _, layer in named_lors_layers(model)]
    assert len(set(seeds)) == len(seeds)
    optimizer.step()
    assert not equal(grads(model, batch(0)), first)
    evaluated = logits(model.eval())
    run.finish()
    assert torch.equal(logits(model), evaluated)
    assert torch.equal(logits(model.train()), evaluated)  # without a run the seed of merging serves
    assert equal(grads(model, batch(0)), grads(model, batch(0)))


@pytest.mark.parametrize("name", ["lors", "flat-lora"])
def test_activation_checkpointing_draws_the_same_again(name):
    found = []
    for checkpointing in (False, True):
        model = model_of()
        run = get_method(name).start(model, steps=3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = run.optimizer(lr=1e-2)
        for step in range(3):
            found.append(grads(model, batch(step)))
            optimizer.step()
    assert all(equal(one, two) for one, two in zip(found[:3], found[3:], strict=True))


def test_micro_batches_of_a_step_see_one_weight():
    """The gradients of a step are the sum of those at one weight: the same as with the weight merged once, kept."""
    model = model_of(dtype=torch.float32)
    run = FlatLoRA(sigma=0.3).start(model)
    run.optimizer(lr=1e-2)
    apart = [grads(model, batch(i)) for i in range(2)]
    with merge_cache(model):
        kept = [grads(model, batch(i)) for i in range(2)]
    for one, two in zip(apart, kept, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lors", "flat-lora", "sora+flat-lora"])
def test_a_resumed_run_draws_what_it_would_have(tmp_path, name):
    fields = {"dtype": BF16, "rounding": "stochastic"}
    model, run = made(name, **fields)
    optimizer = run.optimizer(lr=1e-2)
    train(model, run, 5, optimizer=optimizer)
    save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    drawn = [
        (layer.step_seed, None if layer.noise is None else layer.noise[1]) for _, layer in named_lors_layers(model)
    ]
    rest = train(model, run, 5, first=5, optimizer=optimizer)
    other, second = made(name, **fields)
    load_adapter(other, tmp_path)
    assert second.step == 5
    again = [
        (layer.step_seed, None if layer.noise is None else layer.noise[1]) for _, layer in named_lors_layers(other)
    ]
    assert again == drawn
    resumed = second.optimizer(lr=1e-2)
    resumed.load_state_dict(state)
    assert train(other, second, 5, first=5, optimizer=resumed) == rest
    assert made(name, seed=1, **fields)[1].state_dict()["seed"] == 1


def test_files_keep_rounding_and_seed(tmp_path):
    model = model_of(rounding_seed=11).eval()
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_llama(dtype=BF16), tmp_path).eval()
    assert (again.lors_config.rounding, again.lors_config.rounding_seed) == ("stochastic", 11)
    assert torch.equal(logits(again), logits(model))


def test_one_layer():
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 16).to(BF16)
    with torch.no_grad():
        linear.weight[:, ::2] = 0
    fields = {"rounding": "stochastic", "rounding_seed": 3, "init_lora_weights": False}
    layer = LoRSLinear.from_linear(linear, r=4, **fields).eval()
    x = torch.randn(40, 32, dtype=BF16)
    merged = layer.merge()
    assert torch.equal(layer(x), merged(x))
    assert torch.equal(layer.merged_dense(), merged.weight)
    assert "rounding='stochastic'" in repr(layer)
    other = LoRSLinear.from_linear(linear, r=4, **{**fields, "rounding_seed": 4})
    other.load_state_dict(layer.state_dict())
    assert not torch.equal(other.merge().weight, merged.weight)


def test_flat_lora_perturbs_training_alone_by_its_share_of_each_row():
    model, run = made("lors", dtype=torch.float32)
    run.finish()
    before = logits(model.eval())
    run = FlatLoRA(sigma=0.2).start(model)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model.train()), before)
    for _, layer in named_lors_layers(model):
        with torch.no_grad():
            plain, noisy = layer.merged_dense(), layer._merged(layer.draws(training=True))
        noise = noisy - plain
        assert not noise[~layer.sparse_weight.mask()].any()
        share = noise.norm() / plain.norm()
        assert 0.9 * 0.2 < float(share) < 1.1 * 0.2
    run.finish()
    assert torch.equal(logits(model.train()), before)


def test_noise_alone_rounds_to_nearest():
    model = model_of(rounding="nearest")
    before = logits(model)
    run = FlatLoRA(sigma=0.2).start(model)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model.eval()), before)
    run.finish()


def test_a_cache_knows_whose_draws_it_keeps():
    """Evaluation between the micro-batches of a step, inside one merge_cache."""
    model = model_of()
    run = Method().start(model)
    stepping, evaluated = logits(model), logits(model.eval())
    assert not torch.equal(stepping, evaluated)
    with merge_cache(model):
        for _ in range(2):
            assert torch.equal(logits(model.train()), stepping)
            assert torch.equal(logits(model.eval()), evaluated)
    run.finish()


def test_flat_lora_grows_and_refreshes():
    model, _ = made("lors", dtype=torch.float32)
    model.lors_run.finish()
    run = FlatLoRA(sigma=0.1, refresh=2).start(model, steps=4)
    name, layer = next(named_lors_layers(model))
    optimizer = run.optimizer(lr=0.0)
    seen = []
    for step in range(5):
        seen.append((layer.noise[0].clone(), layer.noise[1]))
        grads(model, batch(step))
        optimizer.step()
    assert not seen[0][0].any()  # f(0) = 0
    assert [seed for _, seed in seen] == [derived_seed(0, step, f"{name}.noise") for step in (0, 0, 2, 2, 4)]
    kept = layer.sparse_weight.mask()
    rms = (layer.merged_dense().square().sum(1) / kept.sum(1)).sqrt()
    torch.testing.assert_close(seen[2][0], 0.1 * 0.5 * rms)
    assert torch.equal(seen[3][0], seen[2][0])
    torch.testing.assert_close(seen[4][0], 0.1 * rms)


def test_no_sigma_is_lors_bit_for_bit():
    losses = []
    for method in (Method(), FlatLoRA(sigma=0)):
        model, run = made("lors", dtype=torch.float32)
        run.finish()
        losses.append(train(model, method.start(model, steps=20), 4))
    assert losses[0] == losses[1]


def test_refusals():
    for fields, sentence in (
        ({"rounding": "down"}, "rounding is 'down'; it must be 'nearest' or 'stochastic'"),
        ({"rounding_seed": -1}, "rounding_seed is -1; it must be a whole number from 0"),
        ({"rounding_seed": "7"}, "rounding_seed is '7'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            LoRSConfig(**fields)
    model = model_of(rounding="nearest")
    before = logits(model)
    refused(ValueError, lambda: merge_and_unload(model, seed=3), "seed is 3 and rounding is 'nearest'")
    refused(ValueError, lambda: merge_and_unload(model, rounding="up"), "rounding is 'up'")
    assert torch.equal(logits(model), before)
    refused(ValueError, lambda: FlatLoRA(sigma=-1), "sigma is -1")
    refused(ValueError, lambda: FlatLoRA(refresh=0), "refresh is 0")
