# SPDX-License-Identifier: Apache-2.0
"""XGBLoRA: the stack is the sum of the boosters, boundaries do not jump, and a round goes on where it was."""

from __future__ import annotations

import copy

import pytest
import torch
from method_runs import made, net, step, train

from lors_cuda import LoRSConfig, get_lors_model, load_adapter, merge_and_unload, save_adapter
from lors_cuda.methods import XGBLoRA, get_method, reference
from models import batch, logits, refused, tiny_llama

peft = pytest.importorskip("peft")


def boosted(steps=7, kappa=3, **fields):
    model = net(r=1, lora_alpha=1.5, **fields)
    run = XGBLoRA(steps_per_booster=kappa).start(model)
    optimizer = run.optimizer(lr=1e-1)
    for number in range(steps):
        step(model, run, optimizer, number)
    return model, run, optimizer


def test_the_stack_is_the_boosters_merged_one_after_the_other():
    model, run, _ = boosted(12)
    layer, pair = model[0], run.pairs[0]
    assert pair.r == layer.r == 5  # four boosters and the one that begins
    boosters = [(pair["lora_A"][i : i + 1], pair["lora_B"][:, i : i + 1]) for i in range(5)]
    stored = layer.sparse_weight
    wanted = reference.xgblora_merged(stored.to_dense(), stored.mask(), boosters, 1.5)
    torch.testing.assert_close(layer.merged_dense(), wanted, rtol=1e-12, atol=1e-12)
    update = pair["lora_B"] @ pair["lora_A"]
    assert torch.linalg.matrix_rank(update) == 4
    run.finish()
    assert (layer.r, layer.scaling, layer.lora_alpha) == (4, 1.5, 6.0)
    torch.testing.assert_close(layer.merged_dense(), wanted, rtol=1e-12, atol=1e-12)


def test_a_boundary_does_not_jump_and_finished_boosters_stay():
    model, run, optimizer = boosted(2)
    x = torch.randn(5, 20, dtype=torch.float64)
    trained = [p.detach().clone() for p in run.pairs[0].trained()]
    step(model, run, optimizer, 2)  # the last of the booster: it moves, and is then put on the stack
    history = run.pairs[0].parametrisation("lora_A").history.clone()
    assert not torch.equal(history, trained[0])
    assert torch.equal(run.pairs[0]["lora_A"][:1], history)
    assert not run.pairs[0].stored("lora_B").any()
    assert not optimizer.state[run.pairs[0].stored("lora_A")]  # the moments belong to another function
    full = model(x)
    with torch.no_grad():
        run.pairs[0].stored("lora_A").mul_(7)
    torch.testing.assert_close(model(x), full, rtol=1e-14, atol=1e-14)
    for number in range(2):
        step(model, run, optimizer, number)
    assert torch.equal(run.pairs[0].parametrisation("lora_A").history, history)


def test_a_share_of_the_layers_is_boosted_and_the_others_stay_bit_for_bit():
    method = XGBLoRA(steps_per_booster=2, layers=0.3)
    model = get_lors_model(tiny_llama(), method.configure(LoRSConfig(r=4, lora_alpha=8)))
    run = method.start(model)
    optimizer = run.optimizer(lr=1e-2, weight_decay=0.1)
    chosen = []
    for number in range(4):
        picked = {pair.name for pair in method.picked(run)}
        before = {pair.name: [p.detach().clone() for p in pair.trained()] for pair in run.pairs}
        optimizer.zero_grad()
        model(**batch(number)).loss.backward()
        optimizer.step()
        chosen.append(picked)
        assert len(picked) == round(0.3 * len(run.pairs))
        for pair in run.pairs:
            same = [torch.equal(a, b) for a, b in zip(pair.trained(), before[pair.name], strict=True)]
            assert all(same) if pair.name not in picked else not any(same)
    assert chosen[0] == chosen[1] != chosen[2] == chosen[3]
    ranks = {pair.name: pair.r for pair in run.pairs}
    assert ranks == {name: 1 + (name in chosen[0]) + (name in chosen[2]) for name in ranks}


@pytest.mark.parametrize("at", [5, 6, 7], ids=["within", "boundary", "after"])
def test_a_resumed_round_goes_on_bit_for_bit_at_the_grown_rank(tmp_path, at):
    model, run = made("xgblora")
    optimizer = run.optimizer(lr=1e-2)
    train(model, run, at, optimizer=optimizer)
    save_adapter(model, tmp_path)
    # What was saved on the way is an adapter like any other.
    assert torch.equal(logits(load_adapter(tiny_llama(), tmp_path)), logits(model))
    moments = copy.deepcopy(optimizer.state_dict())
    rest = train(model, run, 5, first=at, optimizer=optimizer)
    again, other = made("xgblora")
    load_adapter(again, tmp_path)
    assert {pair.r for pair in other.pairs} == {1 + at // 3}
    resumed = other.optimizer(lr=1e-2)
    resumed.load_state_dict(moments)
    assert train(again, other, 5, first=at, optimizer=resumed) == rest


def test_a_damaged_stack_is_refused_and_nothing_is_changed():
    model, run = made("xgblora")
    train(model, run, 7)
    state = run.state_dict()
    state["tensors"] = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    other_model, other = made("xgblora")
    before = logits(other_model)
    name = next(name for name in state["tensors"] if name.endswith("lora_A.0.how._extra_state"))
    whole = state["tensors"][name]
    for damaged, fragment in ((whole[:, :-1], "do not fit"), (whole[:1], "rows, and lora_B 3 columns")):
        state["tensors"][name] = damaged
        refused(ValueError, lambda: other.load_state_dict(state), "was not loaded", fragment)
        assert torch.equal(logits(other_model), before)
        assert {pair.r for pair in other.pairs} == {1}
    state["tensors"][name] = whole
    other.load_state_dict(state)
    assert torch.equal(logits(other_model), logits(model))


def test_a_merge_in_the_middle_of_a_round_is_refused_or_right():
    model, run, optimizer = boosted(4)
    before = model(torch.eye(20, dtype=torch.float64))
    refused(ValueError, lambda: merge_and_unload(model), "method 'xgblora'", "run.finish()")
    merged = model[0].merge()
    torch.testing.assert_close(merged.weight.T, before, rtol=1e-12, atol=1e-12)
    assert not merged.weight[~model[0].sparse_weight.mask()].any()
    step(model, run, optimizer, 4)  # and training goes on
    run.finish()
    torch.testing.assert_close(merge_and_unload(model)(torch.eye(20, dtype=torch.float64)),
                               net_output(run), rtol=1e-12, atol=1e-12)  # fmt: skip


def net_output(run):
    (pair,) = run.pairs
    stored = pair.layer.sparse_weight
    update = torch.where(stored.mask(), pair.scaling * pair["lora_B"] @ pair["lora_A"], 0.0)
    return (stored.to_dense() + update).T


def test_ranks_that_do_not_fit_are_sentences():
    refused(ValueError, lambda: XGBLoRA().start(net(r=3)), "rank 3", "method.configure(config)")
    refused(ValueError, lambda: XGBLoRA(2).start(net((6, 20), r=1), steps=13), "7 boosters", "at most 6", "raise")
    model = net((2, 4), r=1)
    run = XGBLoRA(1).start(model)
    optimizer = run.optimizer(lr=1e-2)
    step(model, run, optimizer)
    refused(ValueError, lambda: step(model, run, optimizer), "3 boosters", "at most 2")
    last = net((2, 4), r=1)
    run = XGBLoRA(1).start(last, steps=2)
    optimizer = run.optimizer(lr=1e-2)
    for number in range(2):
        step(last, run, optimizer, number)
    run.finish()
    assert last[0].r == 2
    config = LoRSConfig(r=2, rank_pattern={"0": 3})
    refused(ValueError, lambda: XGBLoRA().configure(config), "leave rank_pattern")
    refused(ValueError, lambda: get_method("gelora+xgblora"), "both fill the place 'ranks'")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_configure_keeps_the_scaling(use_rslora):
    config = LoRSConfig(r=16, lora_alpha=8, use_rslora=use_rslora)
    configured = XGBLoRA().configure(config)
    assert config.r == 16
    model = get_lors_model(torch.nn.Sequential(net()[0].to_linear()), configured)
    assert (model[0].r, model[0].scaling) == (1, 8 / (4 if use_rslora else 16))
