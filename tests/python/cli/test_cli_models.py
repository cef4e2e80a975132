# SPDX-License-Identifier: Apache-2.0
"""The command line on models that are no plain Llama: measured whatever they are, and never called sparser than so."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from byte_model import TEXT, byte_llama, byte_tokenizer
from cli_calls import SHORT, call, failed, safetensors_torch
from families import family
from lors_cuda import LoRSConfig, get_lors_model, merge_and_unload, save_adapter
from lors_cuda.pruning import prune

pytest_plugins = ["cli_fixtures"]
pytestmark = pytest.mark.filterwarnings("default::UserWarning")


@pytest.fixture
def saved(tmp_path):
    """Write a model with a tokenizer and a text beside it; returns its directory."""

    def save(model: nn.Module):
        model.save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "text.txt").write_text(TEXT[:600])
        return tmp_path / "model"

    return save


def zeros_of_file(directory) -> float:
    tensors = [t for t in safetensors_torch.load_file(directory / "model.safetensors").values() if t.dim() > 1]
    return sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors)


def result(capsys, *arguments) -> tuple[dict, str]:
    """What a command prints under --json, and on stderr."""
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def printed(capsys, *arguments) -> tuple[str, str]:
    capsys.readouterr()
    assert call(*arguments) == 0
    captured = capsys.readouterr()
    return " ".join(captured.out.split()), captured.err


def data(tmp_path) -> list:
    return ["--data", tmp_path / "text.txt", "--tokenizer", tmp_path / "tokenizer", *SHORT]


def one_step(directory, tmp_path) -> list:
    run = ["finetune", "--model", directory, "--output", tmp_path / "run", "--rank", "2", "--steps", "1"]
    return [*run, "--init", "default", *data(tmp_path)]


def test_a_mixture_of_experts_is_not_called_sparse(saved, tmp_path, capsys):
    directory, output = saved(family("mixtral")[0]), tmp_path / "sparse"
    without = ["--exclude-modules", "experts"]
    out, _ = printed(capsys, "prune", "--model", directory, "--output", output, "--method", "magnitude", *without)
    share = zeros_of_file(output)
    assert share < 0.06
    assert "Sparsity 50.00% over 8 linears (7.7% of the weights), 0.00% over the experts (" in out
    assert f"{share:.2%} over all weights of the model" in out
    assert "experts: gate_up_proj 2 32,768 0.00%" in out
    assert f"all weights 16 80,128 {share:.2%}" in out

    out, _ = printed(capsys, "eval", "--model", output, *data(tmp_path))
    assert f"{share:.2%} over all weights of the model" in out
    measured, _ = result(capsys, "eval", "--model", output, *data(tmp_path))
    assert measured["model_sparsity"] == share
    assert measured["sparsity"] < 0.1

    out, err = printed(capsys, *one_step(output, tmp_path), *without)
    assert "sparsity 50.00% over 8 linears (7.7% of the weights), 0.00% over the experts (" in out
    assert f"{share:.2%} over all weights of the model" in out
    assert "lors-cuda: warning: The experts" in err
    merge = ["merge", "--model", output, "--adapter", tmp_path / "run", "--output", tmp_path / "merged"]
    merged, _ = result(capsys, *merge)
    assert merged["model_sparsity"] == merged["model_sparsity_before"] == zeros_of_file(tmp_path / "merged") == share


def test_a_dense_model_is_noticed_by_finetune(saved, tmp_path, capsys):
    measured, err = result(capsys, *one_step(saved(byte_llama()), tmp_path))
    assert measured["sparsity"] == measured["model_sparsity"] == 0
    assert "lors-cuda: warning: Nothing is sparse" in err
    assert "lors-cuda prune" in err


@pytest.mark.parametrize("name", ["gpt2", "falcon", "qwen2_moe", "llama4", "gemma3", "mamba", "bloom"])
def test_every_causal_language_model_is_pruned_and_evaluated(name, saved, tmp_path, capsys):
    directory, output = saved(family(name)[0]), tmp_path / "sparse"
    measured, _ = result(capsys, "eval", "--model", directory, *data(tmp_path))
    assert measured["sparsity"] < 0.05
    more = ["--method", "wanda", "--calibration-batches", "1", *data(tmp_path)]
    pruned, _ = result(capsys, "prune", "--model", directory, "--output", output, *more)
    assert pruned["sparsity"] == 0.5
    measured, _ = result(capsys, "eval", "--model", output, *data(tmp_path))
    assert measured["model_sparsity"] == pruned["model_sparsity"] == pytest.approx(zeros_of_file(output))


@pytest.mark.parametrize("name", ["bert", "bert classifier", "roberta classifier", "t5", "vit"])
def test_models_for_other_tasks_are_pruned_and_merged_as_what_they_are(name, saved, tmp_path, capsys):
    model = family(name)[0]
    directory, output = saved(model), tmp_path / "sparse"
    pruned, _ = result(capsys, "prune", "--model", directory, "--output", output, "--method", "magnitude")
    assert pruned["sparsity"] == 0.5
    prune(model, "2:4", method="magnitude")
    written = type(model).from_pretrained(output)
    assert all(torch.equal(p, q) for p, q in zip(written.parameters(), model.parameters(), strict=True))

    error = failed(capsys, "eval", "--model", output, *data(tmp_path))
    assert f"holds a {type(model).__name__}, and a causal" in error or "Unrecognized configuration" in error

    target = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    get_lors_model(model, LoRSConfig(r=2, target_modules=[target]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    merge = ["merge", "--model", output, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    merged, _ = result(capsys, *merge)
    assert merged["model_sparsity"] == pruned["model_sparsity"]
    expected = merge_and_unload(model)
    written = type(model).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(p, q) for p, q in zip(written.parameters(), expected.parameters(), strict=True))
