# SPDX-License-Identifier: Apache-2.0
"""What the methods refuse, through every door: a sentence each, and the model is as it was."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from method_runs import OPTIONS, batches, made, method_of, train
from test_methods_peft import made as made_by_peft

import lors_cuda.peft as lors_peft
from lors_cuda import LoRSConfig, load_adapter, merge_and_unload, save_adapter
from lors_cuda.methods import METHODS, GeLoRA, get_method
from lors_cuda.methods.gelora import block_ranks
from models import assert_unchanged, batch, refused, snapshot, tiny_llama
from trainer_runs import make_trainer, transformers

DOORS = {"get_lors_model": made, "peft": made_by_peft}
every_door = pytest.mark.parametrize("door", DOORS)
CONTROLLERS = ["sora", "rm-lora", "xgblora", "geolora"]


def unchanged(model, exception, call, *fragments):
    before = snapshot(model)
    message = refused(exception, call, *fragments)
    assert_unchanged(model, before)
    assert message.endswith(".")


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@every_door
@pytest.mark.parametrize("name", CONTROLLERS)
def test_an_optimizer_without_the_method(door, name):
    model, _ = DOORS[door](name)
    other = optimizer_of(model)
    model(**batch(0)).loss.backward()
    unchanged(model, ValueError, other.step, f"the method '{name}' acts around", "run.attach(optimizer)")


@pytest.mark.parametrize("kind", [transformers.Trainer, None], ids=["Trainer", "with the mixin"])
@every_door
def test_a_trainer_with_an_optimizer_of_its_own(tmp_path, door, kind):
    model, _ = DOORS[door]("sora")
    trainer = make_trainer(tmp_path, model=model, **({} if kind is None else {"kind": kind}))
    before = snapshot(model)["values"]  # the Trainer leaves marks of its own
    refused(ValueError, trainer.train, "the method 'sora' acts around", "run.attach(optimizer)")
    after = snapshot(model)["values"]
    assert all(torch.equal(after[key], value) for key, value in before.items())


@every_door
@pytest.mark.parametrize("name", METHODS)
def test_a_state_of_another_method_or_seed(tmp_path, door, name):
    _, run = DOORS[door](name)
    run.save(tmp_path)
    other, its_run = DOORS[door]("lors" if name != "lors" else "rm-lora")
    unchanged(other, ValueError, lambda: its_run.load(tmp_path), "state was not loaded", "Its method is", f'"{name}"')
    again, its_run = DOORS[door](name)
    its_run.seed = 7
    unchanged(again, ValueError, lambda: its_run.load(tmp_path), "Its seed is 0, and this run's 7")
    assert (its_run.step, run.step) == (0, 0)


def test_an_adapter_of_another_method_or_seed(tmp_path):
    model, run = made("sora")
    train(model, run, 2)
    save_adapter(model, tmp_path)
    for other, _ in (made("rm-lora"), made("sora", seed=1)):
        unchanged(other, ValueError, lambda other=other: load_adapter(other, tmp_path), "state was not loaded")


@every_door
@pytest.mark.parametrize("name", METHODS)
def test_merging_while_a_method_runs(door, name):
    model, run = DOORS[door](name)
    train(model, run, 4)  # in the middle of a round of boosting, and after a truncation
    model.zero_grad()
    call = model.merge_and_unload if door == "peft" else lambda: merge_and_unload(model)
    before = run.step
    unchanged(model, ValueError, call, "cannot be merged")
    assert run.step == before
    train(model, run, 1, first=4, optimizer=run._optimizer)


@pytest.mark.parametrize("config", [LoRSConfig(r=4), lors_peft.LoRSLoraConfig(r=4, target_modules="all-linear")])
def test_an_intrinsic_dimension_of_too_few_samples(config):
    model = tiny_llama()
    same, few = [batch(0)] * 100, batches(3)
    for given in (same, few, []):
        unchanged(model, ValueError, lambda given=given: GeLoRA().configure(config, model, given), "distinct points")
    assert config.r == 4


def test_no_schedule_of_ranks_empties_a_layer():
    assert min(block_ranks([9.0, 2.0, 2.0, 2.1], 0.01)) == 1
    _, run = made("sora")
    with torch.no_grad():
        for pair in run.pairs:
            pair.parametrisation("lora_A").gate.zero_()
    run.finish()
    assert {pair.r for pair in run.pairs} == {1}


# ---- what docs/howto/methods.md says goes together ----


def documented():
    return (Path(__file__).parents[3] / "docs/howto/methods.md").read_text()


def test_the_table_of_methods_is_the_code_s():
    rows = re.findall(r"^\| `([a-z-]+)` \| `(\w+)` \|", documented(), re.M)
    assert dict(rows) == {name: kind.__name__ for name, kind in METHODS.items()}
    assert OPTIONS.keys() <= METHODS.keys()


def allowed(one, two):
    """What "What goes together" says of a pair of methods."""
    pair = {one, two}
    if pair & {"lors", "sp-lora"}:  # they fill nothing
        return True
    if pair <= {"gelora", "xgblora", "sherl"}:
        return False
    if pair & {"gelora", "flat-lora", "sherl"}:
        return True
    return pair in ({"rm-lora", "lora-rite"}, {"rm-lora", "lora-mini"}, {"rm-lora", "mora"})


@pytest.mark.parametrize(("one", "two"), itertools.combinations(METHODS, 2))
def test_pairs_go_together_as_documented(one, two):
    name = f"{one}+{two}"
    if allowed(one, two):
        assert get_method(name).name == name
    else:
        refused(ValueError, lambda: get_method(name), "the place", "leave one of them out")


@pytest.mark.parametrize("name", ["gelora+sora", "rm-lora+mora", "sora+flat-lora", "gelora+xgblora"])
def test_a_combination_trains_or_is_refused(name):
    if name == "gelora+xgblora":
        refused(ValueError, lambda: method_of(name), "both fill the place 'ranks'")
        return
    model, run = made(name)
    losses = train(model, run, 4)
    run.finish()
    assert len(set(losses)) == 4
