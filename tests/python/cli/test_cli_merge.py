# SPDX-License-Identifier: Apache-2.0
"""`lors-cuda merge` refuses a base of other values, and a result that its dtype cannot hold; it writes nothing then."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from adapter_directories import edit_config
from cli_calls import call, failed, safetensors_torch, tree
from lors_cuda import LoRSConfig, get_lors_model, load_sparse_checkpoint, save_adapter, save_sparse_checkpoint
from models import fill_adapters

pytest_plugins = ["cli_fixtures"]


def merge(model, adapter, output, *more) -> list:
    return ["merge", "--model", model, "--adapter", adapter, "--output", output, *more]


@pytest.mark.filterwarnings("default::UserWarning")  # the command line prints it
def test_an_adapter_is_merged_once_unless_forced(home, adapter, tmp_path, capsys):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert call(*merge(home / "sparse", adapter, once)) == 0
    error = failed(capsys, *merge(once, adapter, twice))
    assert "is merged into them already" in error
    assert "use --force" in error
    assert not twice.exists()
    assert call(*merge(once, adapter, twice, "--force")) == 0
    assert "lors-cuda: warning: The adapter in" in capsys.readouterr().err
    name = "model.layers.0.mlp.up_proj.weight"
    one, two = (safetensors_torch.load_file(each / "model.safetensors")[name] for each in (once, twice))
    assert torch.equal(one == 0, two == 0)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("format", ["dense", "sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_result_beyond_the_range_is_not_written(home, tmp_path, capsys, dtype, format):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_sparse_checkpoint(load_sparse_checkpoint(home / "sparse").to(dtype), base, format)
    model = get_lors_model(load_sparse_checkpoint(base), LoRSConfig(r=2, lora_alpha=2))
    fill_adapters(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_A.mul_(torch.finfo(dtype).max / 10)
        model.model.layers[1].mlp.down_proj.lora_B.fill_(1000.0)
    save_adapter(model, adapter)
    before = tree(tmp_path)
    error = failed(capsys, *merge(base, adapter, tmp_path / "merged", "--format", format))
    assert "'model.layers.1.mlp.down_proj': merged[0, " in error
    assert str(dtype) in error
    assert tree(tmp_path) == before


@pytest.mark.filterwarnings("default::UserWarning")  # the command line prints it
def test_a_base_in_another_dtype_is_called_that(home, adapter, tmp_path, capsys):
    half = tmp_path / "half"
    save_sparse_checkpoint(load_sparse_checkpoint(home / "sparse").half(), half)
    error = failed(capsys, *merge(half, adapter, tmp_path / "merged", "--no-strict-mask"))
    assert "trained on weights in torch.float32" in error
    assert "are in torch.float16" in error
    assert call(*merge(half, adapter, tmp_path / "merged", "--no-strict-mask", "--force")) == 0


@pytest.mark.filterwarnings("default::UserWarning")  # the command line prints it
def test_evaluating_on_other_values_is_a_warning(home, adapter, tmp_path, capsys):
    once = tmp_path / "once"
    assert call(*merge(home / "sparse", adapter, once)) == 0
    capsys.readouterr()
    assert call("eval", "--model", once, "--adapter", adapter, "--data", home / "text.txt") == 0
    errors = capsys.readouterr().err
    assert errors.startswith("lors-cuda: warning: The adapter in")
    assert errors.count("\n") == 1


def test_an_adapter_of_an_earlier_version_merges_without_a_word(home, adapter, tmp_path, capsys):
    old, merged = tmp_path / "old", tmp_path / "merged"
    shutil.copytree(adapter, old)
    fields = json.loads((old / "adapter_config.json").read_text())["lors"]
    edit_config(old, lors={name: fields[name] for name in ("format_version", "mask_fingerprints")})
    assert call(*merge(home / "sparse", old, merged)) == 0
    assert capsys.readouterr().err == ""
