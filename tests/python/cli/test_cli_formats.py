# SPDX-License-Identifier: Apache-2.0
"""The command line on checkpoints in compressed formats: every command reads them, merge writes them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from cli_calls import call, failed, finetune, safetensors_torch, tree
from interchange_cases import raw_state
from lors_cuda import load_sparse_checkpoint
from lors_cuda.compressed_tensors.bitmask import FORMATS

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(scope="module")
def merged(home, adapter, tmp_path_factory):
    """The same adapter merged in each format."""
    output = tmp_path_factory.mktemp("merged")
    for format in ("dense", *FORMATS):
        more = [] if format == "dense" else ["--format", format]
        assert call("merge", "--model", home / "sparse", "--adapter", adapter, "--output", output / format, *more) == 0
    return output


def test_merge_writes_dense_weights_without_a_sparsity_config(merged):
    config = json.loads((merged / "dense" / "config.json").read_text())
    assert not any("quantization" in key or "sparsity" in key or "compression" in key for key in config)
    tensors = safetensors_torch.load_file(merged / "dense" / "model.safetensors")
    assert tensors.keys() == load_sparse_checkpoint(merged / "dense").state_dict().keys()
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            assert bool(((tensor.view(tensor.shape[0], -1, 4) == 0).sum(-1) >= 2).all())
            assert not (tensor.signbit() & (tensor == 0)).any()


@pytest.mark.parametrize("format", FORMATS)
def test_merge_in_a_compressed_format_reads_back_equal(merged, format, capsys):
    dense = load_sparse_checkpoint(merged / "dense").state_dict()
    assert raw_state(load_sparse_checkpoint(merged / format).state_dict()) == raw_state(dense)
    names = safetensors_torch.load_file(merged / format / "model.safetensors").keys()
    assert sum(name.endswith(".compressed") for name in names) == 14
    assert (
        json.loads((merged / format / "config.json").read_text())["quantization_config"]["sparsity_config"]["format"]
        == format
    )
    others = [set(tree(merged / which)) for which in ("dense", format)]
    assert others[0] == others[1]


@pytest.mark.parametrize("format", FORMATS)
def test_every_command_reads_a_compressed_checkpoint(home, merged, tmp_path, capsys, format):
    """A run on it; and what comes of that adapter, and of pruning, is to the byte what the dense checkpoint gives."""
    run = tmp_path / "run"
    assert call("finetune", "--model", merged / format, *finetune(home, run)[3:], "--steps", "2") == 0
    data = ["--data", home / "text.txt", "--sequence-length", "48", "--batch-size", "4"]
    written = {}
    for which in ("dense", format):
        model, output = merged / which, tmp_path / which
        prune = ["--method", "magnitude", "--pattern", "1:4"]
        assert call("prune", "--model", model, "--output", output / "pruned", *prune) == 0
        assert call("merge", "--model", model, "--adapter", run, "--output", output / "merged") == 0
        capsys.readouterr()
        assert call("eval", "--model", model, "--adapter", run, *data, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        written[which] = [tree(output), result["sparsity"], result["tokens"]]
    assert written["dense"] == written[format]
    assert written[format][1] >= 0.5


def test_a_format_that_compresses_nothing_is_refused_before_anything_is_written(home, adapter, tmp_path, capsys):
    unstructured, run, output = tmp_path / "unstructured", tmp_path / "run", tmp_path / "merged"
    prune = ["prune", "--model", home / "dense", "--output", unstructured, "--method", "magnitude", "--pattern", "50%"]
    assert call(*prune) == 0
    assert call("finetune", "--model", unstructured, *finetune(home, run)[3:], "--steps", "1") == 0
    merge = ["merge", "--model", unstructured, "--adapter", run, "--output", output]
    assert "linears is 2:4" in failed(capsys, *merge, "--format", "sparse-24-bitmask")
    assert not output.exists()
    assert call(*merge, "--format", "sparse-bitmask") == 0
    assert call(*merge, "--format", "marlin-24") == 2
    assert "invalid choice: 'marlin-24'" in capsys.readouterr().err


def test_quantized_and_damaged_checkpoints_are_refused_in_one_line(home, merged, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(merged / "sparse-24-bitmask", model)
    command = ["eval", "--model", model, "--data", home / "text.txt"]
    weights = model / "model.safetensors"
    tensors = safetensors_torch.load_file(weights)
    tensors["model.layers.0.mlp.up_proj.bitmask"][3, 1] ^= 1
    safetensors_torch.save_file(tensors, weights, metadata={"format": "pt"})
    assert "'model.layers.0.mlp.up_proj.weight' is corrupted" in failed(capsys, *command)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated or corrupted" in failed(capsys, *command)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    before = tree(model)
    run = tmp_path / "run"
    for arguments in (command, ["finetune", "--model", model, *finetune(home, run)[3:]]):
        assert "quantized with 'awq'" in failed(capsys, *arguments)
    assert not run.exists()
    assert tree(model) == before


def test_merged_weights_are_on_the_models_mask(home, merged):
    source = safetensors_torch.load_file(home / "sparse" / "model.safetensors")
    for format in ("dense", *FORMATS):
        for name, weight in load_sparse_checkpoint(merged / format).state_dict().items():
            if name.endswith("proj.weight"):
                assert torch.equal(weight != 0, source[name] != 0), name
