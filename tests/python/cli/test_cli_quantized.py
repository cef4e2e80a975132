# SPDX-License-Identifier: Apache-2.0
"""The command line on quantised checkpoints: quantize makes them, every command reads them, merge writes them."""

from __future__ import annotations

import json

import pytest
import torch

from byte_model import byte_llama, byte_tokenizer
from cli_calls import SHORT, call, failed, finetune, safetensors_torch, tree
from lors_cuda import SparseLinear, load_sparse_checkpoint
from lors_cuda.adapter_directory import read_adapter
from lors_cuda.compressed_tensors.kept import SCHEMES
from lors_cuda.compressed_tensors.quantized_files import MASK_NAME
from quantized_writers import SCHEMES as STORED
from quantized_writers import write_quantized

pytest_plugins = ["cli_fixtures"]

EVAL = ["--sequence-length", "48", "--batch-size", "4"]


def quantize(home, output, scheme, *more) -> list:
    return ["quantize", "--model", home / "sparse", "--scheme", scheme, "--output", output, *more]


@pytest.fixture(scope="module")
def int4(home, tmp_path_factory):
    """The sparse model in int4, a scale for each row."""
    output = tmp_path_factory.mktemp("quantized") / "int4"
    assert call(*quantize(home, output, "int4")) == 0
    return output


def kept_layers(directory) -> dict[str, SparseLinear]:
    model = load_sparse_checkpoint(directory, quantized="keep")
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("int4-g64", "int4-g128")])
def test_quantize_rounds_to_nearest_and_keeps_every_zero(home, tmp_path, capsys, scheme):
    output = tmp_path / "q"
    assert call(*quantize(home, output, scheme, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    sparse = load_sparse_checkpoint(home / "sparse").state_dict()
    layers = kept_layers(output)
    assert len(layers) == len(result["layers"]) == 14
    assert result["bytes"] == sum(file.stat().st_size for file in output.glob("*.safetensors"))
    for name, layer in layers.items():
        weight, before = layer.sparse_weight, sparse[f"{name}.weight"]
        assert torch.equal(weight.mask(), before != 0), name
        step = weight.quantization.scales.float().repeat_interleave(weight.quantization.group, 1)
        error = (weight.to_dense().float() - before).abs()
        limit = before.abs() / 16 + step / 512 if scheme == "fp8" else 0.51 * step
        assert bool((error <= limit).all()), name
    others = set(tree(home / "sparse")) - {"model.safetensors", "config.json"}
    assert others <= set(tree(output))


def test_quantized_models_are_measured_and_trained(home, int4, tmp_path, capsys):
    data = ["--data", home / "text.txt", *EVAL]
    perplexity = {}
    for model in (home / "sparse", int4):
        assert call("eval", "--model", model, *data, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        perplexity[model] = result["perplexity"]
        assert result["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert perplexity[int4] == pytest.approx(perplexity[home / "sparse"], rel=0.2)
    run = tmp_path / "run"
    assert call("finetune", "--model", int4, *finetune(home, run)[3:], "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapted_layers"] == 14
    assert call("eval", "--model", int4, "--adapter", run, *data, "--json") == 0
    adapted = json.loads(capsys.readouterr().out)
    assert adapted["perplexity"] < adapted["perplexity_without_adapter"]
    merged = tmp_path / "merged"
    assert call("merge", "--model", int4, "--adapter", run, "--output", merged) == 0
    capsys.readouterr()
    assert call("eval", "--model", merged, *data, "--json") == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(adapted["perplexity"], rel=1e-4)
    masks = {name: layer.sparse_weight.mask() for name, layer in kept_layers(int4).items()}
    tensors = safetensors_torch.load_file(merged / "model.safetensors")
    for name, mask in masks.items():
        assert bool((tensors[f"{name}.weight"][~mask] == 0).all())
    error = failed(
        capsys, "merge", "--model", int4, "--adapter", run, "--output", tmp_path / "q", "--format", "quantized"
    )
    assert "trained without --requantize" in error
    assert not (tmp_path / "q").exists()


def test_codes_are_merged_without_loss(home, int4, tmp_path, capsys):
    """An adapter trained on the grid: merged codes measure what the adapted model measures, to the last digit."""
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    train = ["finetune", "--model", int4, *finetune(home, adapter)[3:], "--steps", "4", "--requantize"]
    assert call(*train) == 0
    assert read_adapter(adapter).config.requantize is True
    capsys.readouterr()
    merge = ["merge", "--model", int4, "--adapter", adapter, "--output", merged, "--format", "quantized"]
    assert call(*merge, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mask_unchanged"] is True
    data = ["--data", home / "text.txt", *EVAL, "--json"]
    assert call("eval", "--model", int4, "--adapter", adapter, *data) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert call("eval", "--model", merged, *data) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == adapted["loss"] != adapted["loss_without_adapter"]
    assert (merged / MASK_NAME).is_file() == (result["kept_rounded_to_zero"] > 0)
    assert call(*merge, "--overwrite", "--seed", "1") == 2
    assert "--rounding and --seed are of plain weights" in capsys.readouterr().err
    error = failed(capsys, *finetune(home, tmp_path / "run", "--requantize"))
    assert error.count("--requantize needs a quantised weight") == 1
    assert "`lors-cuda quantize`" in error
    assert "q_proj'" in error
    assert "and 8 more" in error
    assert "Leave --remainder dither out, or set --requantize." in failed(
        capsys, *finetune(home, tmp_path / "run", "--remainder", "dither")
    )
    assert call(*finetune(home, tmp_path / "run", "--remainder", "all")) == 2
    assert not (tmp_path / "run").exists()


def test_a_stored_remainder_is_trained_on_and_merged_to_int4(home, int4, tmp_path, capsys):
    fine, adapter, merged = tmp_path / "fine", tmp_path / "adapter", tmp_path / "merged"
    assert "int8 has 8 bits" in failed(capsys, *quantize(home, fine, "int8", "--remainder", "stored"))
    assert call(*quantize(home, fine, "int4", "--remainder", "stored")) == 0
    coarse = kept_layers(int4)
    for name, layer in kept_layers(fine).items():
        weight, int4_weight = layer.sparse_weight, coarse[name].sparse_weight
        assert weight.fingerprint() == int4_weight.fingerprint()
        assert torch.equal(weight.quantization.coarser(16).scales, int4_weight.quantization.scales)
        # A fine code halfway between two coarse ones was rounded there itself, so that it may be nearer to either.
        codes = weight.codes().float()
        other = torch.round(codes / 16).clamp(-8, 7) != int4_weight.codes()
        assert bool((codes[other] % 16 == 8).all())
    train = ["finetune", "--model", fine, *finetune(home, adapter)[3:], "--steps", "4", "--requantize"]
    assert call(*train, "--remainder", "stored") == 0
    merge = ["merge", "--model", fine, "--adapter", adapter, "--output", merged, "--format", "quantized"]
    assert call(*merge) == 0
    assert {layer.kind for layer in kept_layers(merged).values()} == {"int4"}
    capsys.readouterr()
    data = ["--data", home / "text.txt", *EVAL, "--json"]
    assert call("eval", "--model", fine, "--adapter", adapter, *data) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert call("eval", "--model", merged, *data) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == adapted["loss"]
    some = tmp_path / "some"
    assert (
        call(*train[:-1], "--requantize", "--remainder", "stored", "--target-modules", "q_proj", "--output", some) == 0
    )
    merge[4], merge[6] = some, tmp_path / "none"
    assert "would stay int8 beside layers" in failed(capsys, *merge)
    assert not merge[6].exists()


@pytest.mark.filterwarnings("default::UserWarning")  # kept zeros, which the command line tells of
def test_prune_reads_quantized_weights_as_plain_ones(int4, tmp_path):
    prune = ["prune", "--method", "magnitude", "--pattern", "1:4", "--output", tmp_path / "pruned"]
    assert call(*prune, "--model", int4) == 0
    layers = load_sparse_checkpoint(tmp_path / "pruned").state_dict()
    for name, layer in kept_layers(int4).items():
        weight, before = layers[f"{name}.weight"], layer.sparse_weight.to_dense()
        assert bool(((weight == before) | (weight == 0)).all())


def test_masks_of_the_sparse_model(home, int4, tmp_path, capsys):
    command = ["eval", "--model", int4, "--data", home / "text.txt", *EVAL]
    assert call(*command, "--mask-from", home / "sparse") == 0
    assert "is quantized too" in failed(capsys, *command, "--mask-from", int4)
    error = failed(capsys, "eval", "--model", home / "sparse", *command[3:], "--mask-from", home / "sparse")
    assert "leave --mask-from out" in error


def test_what_cannot_be_quantized_is_refused_and_nothing_is_written(home, int4, tmp_path, capsys):
    output = tmp_path / "q"
    assert call(*quantize(home, output, "int3")) == 2
    assert "invalid choice: 'int3'" in capsys.readouterr().err
    assert call("quantize", "--model", home / "sparse", "--output", output) == 2
    assert "--scheme" in capsys.readouterr().err
    assert "is quantized already" in failed(capsys, "quantize", "--model", int4, "--scheme", "int8", "--output", output)
    error = failed(capsys, *quantize(home, output, "int4-g128"))
    assert "cannot be quantized to int4-g128" in error
    assert "group is 128" in error
    assert not output.exists()
    assert "exists and is not empty" in failed(capsys, *quantize(home, int4, "int8"))


def test_a_model_that_is_not_quantized_has_no_quantized_merge(home, adapter, tmp_path, capsys):
    merge = [
        "merge",
        "--model",
        home / "sparse",
        "--adapter",
        adapter,
        "--output",
        tmp_path / "q",
        "--format",
        "quantized",
    ]
    assert "has no quantized layers" in failed(capsys, *merge)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("stored", ["gptq rows", "fp8 bitmask", "int4 asymmetric rows"])
def test_every_format_is_trained_on(home, tmp_path, capsys, stored):
    model, run = tmp_path / "q", tmp_path / "run"
    write_quantized(load_sparse_checkpoint(home / "sparse"), model, STORED[stored])
    byte_tokenizer().save_pretrained(model)
    assert call("finetune", "--model", model, *finetune(home, run)[3:], "--steps", "1") == 0
    assert call("merge", "--model", model, "--adapter", run, "--output", tmp_path / "merged") == 0


def test_quantized_byte_llama_is_small(int4):
    dense = sum(p.nbytes for n, p in byte_llama().named_parameters() if "proj" in n)
    codes = sum(layer.sparse_weight.nbytes for layer in kept_layers(int4).values())
    assert codes < 0.25 * dense
    assert SHORT
