# SPDX-License-Identifier: Apache-2.0
"""The methods on models of lors_cuda.peft: trained, saved on the way, folded, loaded."""

from __future__ import annotations

import pytest
import torch
from method_runs import VARIANTS, batches, check_a_resumed_trainer, fresh, method_of, train

from lors_cuda.methods import METHODS
from models import logits, refused, tiny_llama

peft = pytest.importorskip("peft")

import lors_cuda.peft as lors_peft  # noqa: E402 (peft may be missing)

every_method = pytest.mark.parametrize("name", [*METHODS, *VARIANTS])


def made(name, layout="2:4"):
    method = method_of(name)
    model = tiny_llama()
    config = lors_peft.LoRSLoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", layout=layout, gradient=method.gradient
    )
    gradients = lors_peft.estimate_gradients(model, batches(2), config=config) if method.needs_gradients else None
    torch.manual_seed(0)
    model = peft.get_peft_model(model, method.configure(config, model, batches()))
    return model, method.start(model, steps=20, gradients=gradients)


@every_method
@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
def test_trains_saves_folds_and_merges(tmp_path, name, layout):
    model, run = made(name, layout)
    plain = logits(tiny_llama())
    assert torch.equal(logits(model), plain)
    train(model, run, 6)
    running = logits(model.eval())  # in training flat-lora adds noise
    model.save_pretrained(tmp_path / "running")
    assert torch.equal(logits(lors_peft.from_pretrained(fresh(name), tmp_path / "running")), running)
    run.finish()
    finished = logits(model)
    torch.testing.assert_close(finished, running, rtol=0, atol=float(running.abs().max()) * 1e-6)
    model.save_pretrained(tmp_path / "finished")
    again = lors_peft.from_pretrained(fresh(name), tmp_path / "finished")
    assert torch.equal(logits(again), finished)
    if name == "sherl":
        refused(ValueError, again.merge_and_unload, "cannot be merged", "side network")
        return
    sparse = dict(tiny_llama().named_modules())
    merged = dict(again.merge_and_unload().named_modules())
    for layer, module in sparse.items():
        if isinstance(module, torch.nn.Linear) and layer != "lm_head":
            assert not merged[layer].weight[module.weight == 0].any(), layer


def test_a_smaller_rank_is_written_into_the_configuration(tmp_path):
    model, run = made("sora")
    train(model, run, 2)
    for number, pair in enumerate(run.pairs):
        with torch.no_grad():
            gate = pair.parametrisation("lora_A").gate
            gate.fill_(1)
            gate[: number % 4] = 0
    run.finish()
    model.save_pretrained(tmp_path)
    again = lors_peft.from_pretrained(tiny_llama(), tmp_path)
    pairs = [module for module in again.modules() if isinstance(module, lors_peft.LoRSLoraLinear)]
    assert [layer.r["default"] for layer in pairs] == [4 - number % 4 for number in range(len(pairs))]
    assert all(layer.scaling["default"] == pytest.approx(2.0) for layer in pairs)
    assert torch.equal(logits(again), logits(model))


def test_loading_past_a_method_is_refused(tmp_path):
    model, _ = made("sora")
    model.save_pretrained(tmp_path)
    refused(ValueError, lambda: model.load_adapter(tmp_path, "default"), "computed by the method", "run.finish()")


@pytest.mark.parametrize("name", ["sora", "rm-lora", "lora-mini", "xgblora", "geolora"])
def test_a_trainer_resumes_with_the_same_loss_curve(tmp_path, name):
    check_a_resumed_trainer(tmp_path, made, name)


def test_a_merge_in_the_middle_of_a_boosting_round_is_right():
    model, run = made("xgblora")
    train(model, run, 4)
    running = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), running, rtol=0, atol=float(running.abs().max()) * 1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), running)
    train(model, run, 1, first=4, optimizer=run._optimizer)


def test_a_new_start_of_computed_factors_is_refused():
    _, run = made("sora")
    layer = run.pairs[0].layer
    refused(ValueError, lambda: layer.reset_lora_parameters("default", True), "lora_A of 'default' is computed")
    run.finish()
    layer.reset_lora_parameters("default", True)


def test_only_the_active_adapter_is_trained():
    model, run = made("lors")
    run.finish()
    model.add_adapter("other", lors_peft.LoRSLoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("other")
    run = method_of("sora").start(model)
    assert {pair.adapter for pair in run.pairs} == {"other"}
    before = {name: p.clone() for name, p in model.named_parameters() if ".default." in name}
    train(model, run, 2)
    run.finish()
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())
