# SPDX-License-Identifier: Apache-2.0
"""``--rounding`` of finetune and merge: the same bits from the same seed, every zero kept, and a run that goes on."""

from __future__ import annotations

import json

import pytest
import torch

from cli_calls import call, curve, failed, finetune, linear_zeros, safetensors_torch
from lors_cuda import load_sparse_checkpoint, save_sparse_checkpoint

pytest_plugins = ["cli_fixtures"]

STOCHASTIC = ("--rounding", "stochastic")


@pytest.fixture(scope="module")
def half(home, tmp_path_factory):
    """The sparse model in bfloat16, with its tokenizer."""
    base = tmp_path_factory.mktemp("half") / "base"
    save_sparse_checkpoint(load_sparse_checkpoint(home / "sparse").to(torch.bfloat16), base, "sparse-24-bitmask")
    return base


def trained(home, half, run, *more):
    command = finetune(home, run, "--init", "default", *more)
    command[command.index("--model") + 1] = half
    return [*command, "--tokenizer", home / "sparse"]


def merged(half, run, output, *more):
    assert call("merge", "--model", half, "--adapter", run, "--output", output, *more) == 0
    return safetensors_torch.load_file(output / "model.safetensors")


def test_a_rounded_training_goes_on_and_merges_with_its_seed(home, half, tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    constant = [*STOCHASTIC, "--schedule", "constant", "--seed", "5"]
    assert call(*trained(home, half, whole, *constant, "--steps", "6", "--checkpoint-every", "3")) == 0
    assert call(*trained(home, half, run, *constant, "--steps", "3", "--checkpoint-every", "3")) == 0
    error = failed(
        capsys, *trained(home, half, run, *constant[2:], "--steps", "6", "--checkpoint-every", "3", "--resume")
    )
    assert "rounding" in error
    assert call(*trained(home, half, run, *constant, "--steps", "6", "--checkpoint-every", "3", "--resume")) == 0
    assert [entry["loss"] for entry in curve(run)] == [entry["loss"] for entry in curve(whole)]
    plain = tmp_path / "plain"
    assert call(*trained(home, half, plain, *constant[2:], "--steps", "6", "--checkpoint-every", "3")) == 0
    assert [entry["loss"] for entry in curve(plain)] != [entry["loss"] for entry in curve(whole)]

    as_trained = merged(half, whole, tmp_path / "a")
    named = merged(half, whole, tmp_path / "b", *STOCHASTIC, "--seed", "5")
    other = merged(half, whole, tmp_path / "c", "--seed", "6")
    nearest = merged(half, whole, tmp_path / "d", "--rounding", "nearest")
    assert all(torch.equal(as_trained[name], named[name]) for name in named)
    assert any(not torch.equal(as_trained[name], other[name]) for name in other)
    assert any(not torch.equal(as_trained[name], nearest[name]) for name in nearest)
    base = linear_zeros(home / "sparse")
    for output in "abcd":
        for layer, zero in linear_zeros(tmp_path / output).items():
            assert bool(zero[base[layer]].all()), layer


def test_what_was_used_is_said(home, half, tmp_path, capsys):
    run = tmp_path / "run"
    assert call(*trained(home, half, run, "--steps", "2")) == 0
    capsys.readouterr()
    for more, rounding, seed in (((), "nearest", None), ((*STOCHASTIC, "--seed", "3"), "stochastic", 3)):
        assert call("merge", "--model", half, "--adapter", run, "--output", tmp_path / f"{seed}", "--json", *more) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["rounding"], result["rounding_seed"]) == (rounding, seed)
    command = ["merge", "--model", half, "--adapter", run, "--output", tmp_path / "no", "--seed", "3"]
    assert "seed is 3 and rounding is 'nearest'" in failed(capsys, *command)
    assert not (tmp_path / "no").exists()
    for more in (STOCHASTIC, ("--method", "rm-lora")):
        error = failed(capsys, *trained(home, half, tmp_path / "no", "--fsdp", *more))
        assert "is not saved from a sharded model by the Trainer" in error
