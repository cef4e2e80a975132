# SPDX-License-Identifier: Apache-2.0
"""``lors-cuda finetune --method``: it trains, resumes and ends in an adapter like any other."""

from __future__ import annotations

import json

import pytest
import torch

from cli_calls import call, curve, failed, finetune, linear_zeros, safetensors_torch
from lors_cuda.methods import METHODS

pytest_plugins = ["cli_fixtures"]

OPTIONS = {
    "sora": ["threshold=0.05"],
    "lora-mini": ["a=6", "b=6", "aux=gradient"],
    "rm-lora": ["active=2", "interval=2"],
    "xgblora": ["steps_per_booster=2"],
    "geolora": ["cycle=1"],
}


def command(home, run, name):
    options = ["--method-option", *OPTIONS[name]] if name in OPTIONS else []
    return finetune(home, run, "--init", "default", "--method", name, *options)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("lors", "gelora")])
def test_a_method_trains_and_merges_with_every_zero(home, tmp_path, capsys, name):
    if name == "lora-rite":
        pytest.importorskip("pytorch_optimizer")
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert call(*command(home, run, name)) == 0
    assert capsys.readouterr().err == ""
    assert {path.name for path in run.iterdir()} >= {"adapter_model.safetensors", "run.json"}
    if name == "sherl":
        error = failed(capsys, "merge", "--model", home / "sparse", "--adapter", run, "--output", merged)
        assert "side_network" in error
        return
    assert call("merge", "--model", home / "sparse", "--adapter", run, "--output", merged) == 0
    base, kept = linear_zeros(home / "sparse"), linear_zeros(merged)
    for layer, zero in base.items():
        assert bool(kept[layer][zero].all()), layer


@pytest.mark.parametrize("name", ["sora", "xgblora", "lora-mini"])
def test_a_killed_run_goes_on(home, tmp_path, capsys, name):
    run, whole = tmp_path / "run", tmp_path / "whole"
    long = ["--schedule", "constant"]
    assert call(*command(home, run, name), *long, "--steps", 4, "--checkpoint-every", 2) == 0
    assert call(*command(home, run, name), *long, "--steps", 6, "--resume") == 0
    assert call(*command(home, whole, name), *long, "--steps", 6) == 0
    assert curve(run) == curve(whole)
    files = [safetensors_torch.load_file(each / "adapter_model.safetensors") for each in (run, whole)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[1])
    assert json.loads((run / "run.json").read_text())["identity"]["method"]["name"] == name
    error = failed(capsys, *command(home, run, "rm-lora"), *long, "--steps", 7, "--resume")
    assert "other settings" in error
    assert "method was" in error


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--method", "dora"], ("There is no method 'dora'", "sora")),
        (["--method", "sora", "--method-option", "rank=3"], ("no single option 'rank'", "threshold")),
        (["--method", "sora", "--method-option", "threshold=-1"], ("0 or more",)),
        (["--method", "sora+mora"], ("both fill the place", "leave one")),
        (["--method", "gelora"], ("distinct points",)),
        (["--method", "mora", "--init", "gradient"], ("draws its own start", "Leave it out")),
    ],
)
def test_wrong_methods_are_sentences(home, tmp_path, capsys, options, fragments):
    error = failed(capsys, *finetune(home, tmp_path / "run", *options))
    for fragment in fragments:
        assert fragment in error
    assert not (tmp_path / "run").exists()
