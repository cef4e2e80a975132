# SPDX-License-Identifier: Apache-2.0
"""What every method promises: zeros, an untouched base, plain layers at the end, files, and a run that goes on."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from method_runs import VARIANTS, check_a_resumed_trainer, fresh, made, train
from torch.nn.utils import parametrize

from lors_cuda import (
    init_from_gradients,
    load_adapter,
    merge_and_unload,
    merge_cache,
    named_lors_layers,
    save_adapter,
)
from lors_cuda.methods import METHODS, get_method
from models import logits, refused, tiny_llama

every_method = pytest.mark.parametrize("name", [*METHODS, *VARIANTS, "lora-mini+rm-lora"])


def checksum(model):
    digest = hashlib.sha256()
    for _, layer in named_lors_layers(model):
        for tensor in (layer.weight_values, layer.weight_mask, layer.weight_index, layer.bias):
            if tensor is not None:
                digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@every_method
@pytest.mark.parametrize(
    ("layout", "dtype", "gradient"),
    [
        ("dense", torch.float32, "lors"),
        ("dense", torch.bfloat16, "exact"),
        ("2:4", torch.float32, "exact"),
        ("2:4", torch.bfloat16, "lors"),
        ("bitmap", torch.float32, "lors"),
        ("bitmap", torch.bfloat16, "exact"),
    ],
    ids=str,
)
def test_training_keeps_zeros_and_base_and_leaves_plain_layers(tmp_path, name, layout, dtype, gradient):
    model, run = made(name, layout=layout, dtype=dtype, gradient=gradient)
    sums = checksum(model)
    masks = {layer_name: layer.sparse_weight.mask() for layer_name, layer in named_lors_layers(model)}
    train(model, run, 6)
    running = logits(model.eval())
    run.finish()
    run.finish()
    assert checksum(model) == sums
    assert not any("parametrizations" in key for key in model.state_dict())
    finished = logits(model)
    # Folding computes lora_A and lora_B as each forward has: only rows of zeros may have gone.
    torch.testing.assert_close(finished, running, rtol=0, atol=float(running.abs().max()) * torch.finfo(dtype).eps * 4)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(fresh(name, dtype), tmp_path / "adapter")
    assert torch.equal(logits(again), finished)
    if name == "sherl":
        refused(ValueError, lambda: merge_and_unload(model), "cannot be merged", "side network")
        return
    merged = merge_and_unload(model)
    for layer_name, mask in masks.items():
        assert not merged.get_submodule(layer_name).weight[~mask].any(), layer_name
    bound = float(finished.abs().max()) * torch.finfo(dtype).eps * 4
    torch.testing.assert_close(logits(merged), finished, rtol=0, atol=bound)


@every_method
def test_a_start_changes_nothing(name):
    plain = logits(tiny_llama())
    model, run = made(name)
    assert torch.equal(logits(model), plain)
    run.finish()
    assert torch.equal(logits(model), plain)


@every_method
def test_every_trained_tensor_learns(name):
    model, run = made(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    assert before
    train(model, run, 8)
    still = [key for key, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[key])]
    assert not still


@every_method
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, name):
    model, run = made(name)
    optimizer = run.optimizer(lr=1e-2)
    train(model, run, 5, optimizer=optimizer)
    save_adapter(model, tmp_path / "adapter")
    moments = copy.deepcopy(optimizer.state_dict())
    rest = train(model, run, 5, first=5, optimizer=optimizer)
    run.finish()
    again, other = made(name)
    load_adapter(again, tmp_path / "adapter")
    optimizer = other.optimizer(lr=1e-2)
    optimizer.load_state_dict(moments)
    assert other.step == 5
    assert train(again, other, 5, first=5, optimizer=optimizer) == rest
    other.finish()
    assert torch.equal(logits(again), logits(model))


@every_method
def test_a_trainer_resumes_with_the_same_loss_curve(tmp_path, name):
    check_a_resumed_trainer(tmp_path, made, name)


@every_method
def test_accumulation_is_the_larger_batch(name):
    model, run = made(name)
    train(model, run, 1)
    other, second = made(name)
    train(other, second, 1, accumulate=2)
    for (key, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        # AdamW's first step is lr times the gradient's sign, so that it is the gradients that are compared.
        if one.grad is not None:
            error = (one.grad - two.grad).norm()
            assert error <= 64 * torch.finfo(torch.float32).eps * one.grad.norm(), key


@every_method
def test_the_seed_decides(name):
    def tensors(seed):
        model, run = made(name, seed=seed)
        train(model, run, 4)
        return run.state_dict()["tensors"]

    one, two, other = tensors(0), tensors(0), tensors(1)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    if {"sora", "lora-mini", "xgblora", "geolora", "rm-lora"} & set(name.split("+")):
        assert any(not torch.equal(one[key], other[key]) for key in one)


@every_method
def test_the_merge_cache_merges_once_and_sees_every_step(name):
    model, run = made(name, layout="bitmap")
    optimizer = run.optimizer(lr=1e-2)
    layers = dict(named_lors_layers(model))
    with merge_cache(model):
        for number in range(4):
            first = logits(model)
            kept = [layer.merged_weight._operand for layer in layers.values()]
            assert torch.equal(logits(model), first)
            assert all(a is b.merged_weight._operand for a, b in zip(kept, layers.values(), strict=True))
            for layer in layers.values():
                layer.merged_weight.clear()
            assert torch.equal(logits(model), first)
            train(model, run, 1, first=number, optimizer=optimizer)
    assert not torch.equal(logits(model), first)


def test_a_new_start_of_computed_factors_is_refused():
    model, run = made("lora-mini")
    layer = run.pairs[0].layer
    before = logits(model)
    refused(ValueError, layer.reset_adapter, "lora_A is computed", "run.finish()")
    assert torch.equal(logits(model), before)
    run.finish()
    layer.reset_adapter(False)
    assert not torch.equal(logits(model), before)
    parametrize.register_parametrization(layer, "lora_B", torch.nn.Tanh())
    refused(ValueError, layer.reset_adapter, "lora_B is computed", "remove_parametrizations")
    gradients = {pair.name: torch.ones(pair.layer.out_features, pair.layer.in_features) for pair in run.pairs}
    refused(ValueError, lambda: init_from_gradients(model, gradients), run.pairs[0].name, "is computed")


def test_loading_into_computed_factors_is_refused(tmp_path):
    model, run = made("lors")
    run.finish()
    save_adapter(model, tmp_path)
    parametrize.register_parametrization(run.pairs[0].layer, "lora_A", torch.nn.Tanh())
    refused(ValueError, lambda: load_adapter(model, tmp_path), "is computed", "cannot be loaded")


def test_refusals():
    refused(ValueError, lambda: get_method("dora"), "no method 'dora'", "sora")
    refused(ValueError, lambda: get_method("sora", penalty=1), "no single option 'penalty'", "threshold")
    refused(ValueError, lambda: get_method("sora+lora-mini"), "'sora' and 'lora-mini' both fill", "leave one")
    refused(ValueError, lambda: get_method("sora").start(tiny_llama()), "no adapters", "get_lors_model")
    model, run = made("sora")
    refused(ValueError, lambda: get_method("lors").start(model), "method 'sora' already", "finish()")
    some = torch.optim.AdamW([next(p for p in model.parameters() if p.requires_grad)])
    refused(ValueError, lambda: run.attach(some), "does not hold", "run.optimizer(lr)")
    run.optimizer(lr=1e-3)
    refused(ValueError, lambda: run.optimizer(lr=1e-3), "an optimizer already")
    before = logits(model)
    refused(ValueError, lambda: merge_and_unload(model), "cannot be merged", "run.finish()")
    gradients = {pair.name: torch.ones(pair.layer.out_features, pair.layer.in_features) for pair in run.pairs}
    refused(ValueError, lambda: init_from_gradients(model, gradients), "given another start", "run.finish()")
    assert torch.equal(logits(model), before)
    run.finish()
    init_from_gradients(model, gradients)


def test_other_states_are_refused(tmp_path):
    model, run = made("sora")
    save_adapter(model, tmp_path)
    for name, seed, fragment in (("rm-lora", 0, "rm-lora"), ("sora", 1, "seed")):
        other, _ = made(name, seed=seed)
        refused(ValueError, lambda other=other: load_adapter(other, tmp_path), "state was not loaded", fragment)
    run.finish()
    save_adapter(model, tmp_path / "finished")
    other, _ = made("sora")
    refused(FileNotFoundError, lambda: load_adapter(other, tmp_path / "finished"), "method.json", "'sora'")
    (tmp_path / "method.json").write_text("{")
    refused(ValueError, lambda: load_adapter(other, tmp_path), "not JSON")


@pytest.mark.parametrize("name", ["sora", "rm-lora", "xgblora", "geolora"])
def test_an_optimizer_that_passes_the_method_by_is_refused(name):
    model, run = made(name)
    before = logits(model)
    other = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    refused(ValueError, lambda: train(model, run, 1, optimizer=other), f"method '{name}'", "run.attach(optimizer)")
    assert torch.equal(logits(model), before)
    unrelated = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    unrelated.step()
    if name == "geolora":
        refused(ValueError, lambda: run.attach(other), "an optimizer of its own", "run.optimizer(lr)")
    run.finish()
    train(model, run, 1, optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    assert not torch.equal(logits(model), before)


def test_an_optimizer_that_was_resumed_without_the_method_is_refused():
    model, run = made("sora")
    optimizer = run.optimizer(lr=1e-2)
    train(model, run, 2, optimizer=optimizer)
    other, second = made("sora")
    resumed = second.optimizer(lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    refused(ValueError, lambda: train(other, second, 1, optimizer=resumed), "resumed without the method's state")
