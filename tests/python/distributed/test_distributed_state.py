# SPDX-License-Identifier: Apache-2.0
"""What an FSDP2 model saves and loads: adapters, whole and sharded states, and states that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_cases import adam, converted, every_layout, shard, train_shared, trained_values
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from adapter_directories import assert_same_files
from lors_cuda import LoRSConfig, get_lors_model, load_adapter, save_adapter
from lors_cuda._distributed import OtherProcessFailed, whole
from models import assert_unchanged, fill_adapters, logits, prune_two_of_four, refused, snapshot, tiny_llama

pytest_plugins = ["pair"]

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def sharded(layout: str, seed: int = 0, **fields) -> nn.Module:
    model = converted(layout, **fields)
    fill_adapters(model, seed)
    shard(model)
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Every parameter bit for bit, those of ``expected`` whole."""
    parameters = dict(expected.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p.detach().full_tensor(), parameters[name]), name


# ---- states ----


def whole_state(rank: int, layout: str) -> None:
    model = sharded(layout, seed=5)
    state = get_model_state_dict(model, options=WHOLE)
    expected = converted(layout)
    fill_adapters(expected, 5)
    if rank == 0:  # a whole state is that of an unsharded model
        assert state.keys() == expected.state_dict().keys()
        plain = converted(layout)
        plain.load_state_dict(state)
        assert torch.equal(logits(plain), logits(expected))
    other = sharded(layout, seed=6)
    set_model_state_dict(other, state if rank == 0 else {}, options=FROM_FIRST)
    assert_same(other, expected)
    assert torch.equal(logits(other), logits(expected))


@every_layout
def test_a_whole_state_goes_from_and_to_sharded_models(pair, layout):
    pair.run(whole_state, layout)


def sharded_state(rank: int, layout: str, directory: str) -> None:
    """Training goes on from a checkpoint, each process having written its own part, as if it had not stopped."""
    model = sharded(layout)
    optimizer = adam(model)
    train_shared(model, rank, 2, optimizer)
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=directory)
    expected = train_shared(model, rank, 2, optimizer, first=2)

    resumed = sharded(layout, seed=6)
    optimizer = adam(resumed)
    state, optimizer_state = get_state_dict(resumed, optimizer)
    stored = {"model": state, "optimizer": optimizer_state}
    dcp.load(stored, checkpoint_id=directory)
    set_state_dict(resumed, optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"])
    assert train_shared(resumed, rank, 2, optimizer, first=2) == expected
    for (name, value), other in zip(trained_values(resumed).items(), trained_values(model).values(), strict=True):
        assert torch.equal(value, other), name


@every_layout
def test_training_resumes_from_a_sharded_checkpoint(pair, tmp_path, layout):
    pair.run(sharded_state, layout, str(tmp_path / "checkpoint"))
    # In one process, without fully_shard, from the same files.
    plain = converted(layout)
    fill_adapters(plain, 9)
    before = {name: p.clone() for name, p in plain.named_parameters()}
    state = plain.state_dict()
    dcp.load({"model": state}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    plain.load_state_dict(state)
    for name, p in plain.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def adapters_only(rank: int, directory: str) -> None:
    model, other = sharded("2:4", seed=5), sharded("2:4", seed=6)
    options = StateDictOptions(ignore_frozen_params=True)
    state = {"adapters": get_model_state_dict(model, options=options)}
    # torch leaves out frozen parameters, not buffers; masks are small, and must be the model's own to be loaded.
    kinds = {name.rpartition(".")[2] for name in state["adapters"]}
    assert kinds == {"lora_A", "lora_B", "weight_index", "mask_digest"}
    dcp.save(state, checkpoint_id=directory)
    state = {"adapters": get_model_state_dict(other, options=options)}
    dcp.load(state, checkpoint_id=directory)
    set_model_state_dict(other, state["adapters"], options=StateDictOptions(strict=False))
    for (name, value), expected in zip(trained_values(other).items(), trained_values(model).values(), strict=True):
        assert torch.equal(value, expected), name


def test_a_checkpoint_may_hold_the_adapters_alone(pair, tmp_path):
    pair.run(adapters_only, str(tmp_path))


def other_base(layout: str, seed: int, kept: int = 0) -> nn.Module:
    """A model of other weights, of which ``kept`` more are kept in one layer."""
    model = prune_two_of_four(tiny_llama(seed=seed))
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        zeros = (weight[0] == 0).nonzero().flatten()[:kept]
        weight[0, zeros] = 0.5
    return get_lors_model(model, LoRSConfig(r=3, lora_alpha=6, layout=layout))


def refuse_states(rank: int) -> None:
    model = sharded("bitmap")
    before = snapshot(model)

    def load(other: nn.Module) -> None:
        set_model_state_dict(model, get_model_state_dict(other))

    more = other_base("bitmap", seed=0, kept=3)
    shard(more)
    refused(RuntimeError, lambda: load(more), "up_proj: the state's weight_values does not have the layer's shape",
            "another mask", "before fully_shard")  # fmt: skip
    refused(RuntimeError, lambda: load(sharded("2:4")), "the state has a weight of layout '2:4'", "'bitmap'")
    refused(RuntimeError, lambda: model.load_state_dict(converted("bitmap").state_dict()),
            "the layer is sharded and the state is not", "set_model_state_dict")  # fmt: skip
    plain = converted("bitmap")
    refused(
        RuntimeError, lambda: plain.load_state_dict(model.state_dict()), "the state is sharded and the layer is not"
    )
    # Weights of the same number in other places are another mask that fits; damaged ones do not.
    for name in ("weight_mask", "weight_index"):
        damaged = {key: value.clone() for key, value in get_model_state_dict(model).items()}
        damaged[f"model.layers.0.mlp.up_proj.{name}"][0] = 1  # whole in each process, unlike the values
        refused(RuntimeError, lambda damaged=damaged: model.load_state_dict(damaged), "up_proj", "corrupted in")
    # As anywhere in torch, layers that fit were loaded; the one that does not is as it was.
    for name, value in model.state_dict().items():
        if name.startswith("model.layers.0.mlp.up_proj."):
            assert torch.equal(whole(value), whole(before["values"][name])), name


def test_states_that_do_not_fit_are_refused_in_every_process(pair):
    pair.run(refuse_states)


def load_another_mask(rank: int, layout: str) -> None:
    """As many values in other places: what an unsharded layer takes, a sharded one takes too."""
    model, other = sharded(layout), other_base(layout, seed=3)
    expected = other_base(layout, seed=3)
    expected.load_state_dict(other.state_dict())
    shard(other)
    assert not torch.equal(logits(model), logits(expected))
    set_model_state_dict(model, get_model_state_dict(other))
    assert_same(model, expected)
    assert torch.equal(logits(model), logits(expected))


@every_layout
def test_another_mask_of_the_same_size_is_loaded(pair, layout):
    pair.run(load_another_mask, layout)


# ---- adapters ----


def save_and_load(rank: int, layout: str, directory: str, fields: dict) -> None:
    model = converted(layout, **fields)
    if rank == 0:
        save_adapter(model, f"{directory}/alone")
    shard(model)
    logits(model)  # leaves the outermost module's parameters gathered
    save_adapter(model, f"{directory}/sharded")

    other = converted(layout, **fields)
    fill_adapters(other, seed=6)
    for name, p in other.named_parameters():
        if p.requires_grad and not name.endswith(("lora_A", "lora_B")):
            p.data += 1
    shard(other)
    assert not torch.equal(logits(other), logits(model))
    load_adapter(other, f"{directory}/sharded")
    assert torch.equal(logits(other), logits(model))
    train_shared(other, rank, 1)  # and it is what is trained


@every_layout
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head", "norm"]}])
def test_adapter_directory_are_those_of_one_process(pair, tmp_path, layout, fields):
    pair.run(save_and_load, layout, str(tmp_path), fields)
    assert_same_files(tmp_path / "sharded", tmp_path / "alone")
    loaded = load_adapter(tiny_llama(), tmp_path / "sharded")
    assert not torch.equal(logits(loaded), logits(tiny_llama()))


def refuse_adapters(rank: int, directory: str) -> None:
    model = sharded("2:4")
    before = snapshot(model)
    refused(ValueError, lambda: load_adapter(model, f"{directory}/other_mask"), "another sparsity mask")
    refused(ValueError, lambda: load_adapter(model, f"{directory}/other_rank"), "was not loaded")
    missing = (FileNotFoundError, "does not exist") if rank == 0 else (OtherProcessFailed, "Process 0 of 2 failed")
    refused(missing[0], lambda: load_adapter(model, f"{directory}/none"), missing[1])
    assert_unchanged(model, before)
    # Where the first process cannot write, no process goes on.
    Path(f"{directory}/file{rank}").write_text("")
    kind, text = (OSError, "could not be written") if rank == 0 else (OtherProcessFailed, "Process 0 of 2 failed")
    refused(kind, lambda: save_adapter(model, f"{directory}/file0/adapter"), text)
    # A base under fully_shard cannot be converted by loading.
    base = tiny_llama()
    shard(base)
    before = snapshot(base)
    refused(ValueError, lambda: load_adapter(base, f"{directory}/fits"), "is a DTensor")
    assert_unchanged(base, before)


def test_adapters_that_do_not_fit_are_refused_in_every_process(pair, tmp_path):
    save_adapter(converted("2:4"), tmp_path / "fits")
    save_adapter(other_base("2:4", seed=3), tmp_path / "other_mask")
    save_adapter(get_lors_model(tiny_llama(), LoRSConfig(r=2)), tmp_path / "other_rank")
    pair.run(refuse_adapters, str(tmp_path))
