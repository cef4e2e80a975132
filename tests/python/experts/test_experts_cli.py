# SPDX-License-Identifier: Apache-2.0
"""The commands on mixtures of experts: pruned, trained, measured and merged with their experts, and so reported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from byte_model import TEXT, byte_tokenizer
from cli_calls import SHORT, call, failed, safetensors_torch
from lors_cuda.cli import demo
from lors_cuda.cli import finetune as cli_finetune

transformers: Any = pytest.importorskip("transformers")

_SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MODELS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**_SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **_SIZES, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
        )
    ),
}
E, STACKS = {"mixtral": 4, "qwen3_moe": 8}, 4


@pytest.fixture(scope="module", params=MODELS)
def home(request, tmp_path_factory) -> Path:
    """A dense mixture of experts with a tokenizer, a text, and what `prune` makes of it by Wanda."""
    home: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(home / "dense")
    byte_tokenizer().save_pretrained(home / "tokenizer")  # beside Mixtral's configuration it would be taken for Llama's
    (home / "text.txt").write_text(TEXT)
    (home / "name").write_text(request.param)
    assert call("prune", "--model", home / "dense", "--output", home / "sparse", *data(home)) == 0
    return home


def data(home: Path) -> list:
    return ["--data", home / "text.txt", "--tokenizer", home / "tokenizer", *SHORT]


def finetune(home: Path, output: Path, *more) -> list:
    run = ["finetune", "--model", home / "sparse", "--output", output, *data(home), "--rank", "2", "--alpha", "4"]
    return [*run, "--lr", "1e-2", "--steps", "4", *more]


def printed(capsys, *arguments) -> tuple[str, str]:
    capsys.readouterr()
    assert call(*arguments) == 0
    captured = capsys.readouterr()
    return " ".join(captured.out.split()), captured.err


def result(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def experts_in(directory: Path) -> dict[str, Tensor]:
    """The weights of the experts as the family's own files have them: one matrix per expert and projection."""
    tensors = safetensors_torch.load_file(directory / "model.safetensors")
    found = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    assert len(found) == 2 * 3 * E[(directory.parent / "name").read_text()]
    return found


def test_prune_prunes_the_experts_and_says_so(home, tmp_path, capsys):
    for tensor in experts_in(home / "sparse").values():
        assert int((tensor.view(-1, 4) != 0).sum(1).max()) == 2
        assert (tensor == 0).float().mean() == 0.5
    prune = ["prune", "--model", home / "dense", "--output", tmp_path / "sparse", "--method", "magnitude"]
    out, err = printed(capsys, *prune, "--pattern", "50%")
    assert err == ""
    assert re.search(r"experts: gate_up_proj 2 [\d,]+ 50.00% experts: down_proj 2 [\d,]+ 50.00% all weights", out)
    assert re.search(
        r"Sparsity 50.00% over 8 linears \(\d+\.\d% of the weights\), 50.00% over the experts "
        r"\(\d+\.\d% of the weights\), \d\d\.\d\d% over all weights of the model\.",
        out,
    )


def test_the_whole_way(home, tmp_path, capsys, monkeypatch):
    """Finetune from gradients, evaluate, merge; every zero of every expert is in the merged files."""
    name = (home / "name").read_text()
    gradients: dict[str, Tensor] = {}
    estimate = cli_finetune.estimate_gradients

    def noted(*args, **options):
        gradients.update(estimate(*args, **options))
        return gradients

    monkeypatch.setattr(cli_finetune, "estimate_gradients", noted)
    out, err = printed(capsys, *finetune(home, tmp_path / "run"))
    assert err == ""
    parameters = {
        "mixtral": 2 * 4 * (2 * (128 + 32) + 2 * (32 + 64)),
        "qwen3_moe": 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16)),
    }
    assert (
        f"12 adapted layers, of which 4 of experts with {STACKS * E[name]} adapters, {parameters[name]:,} parameters."
        in out
    )
    assert "50.00% over the experts" in out
    run = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    sketches = [gradient.shape for gradient in gradients.values() if gradient.dim() == 3]
    assert len(sketches) == STACKS
    assert all(shape[1] == 8 for shape in sketches), "4 rows for each of rank 2"
    assert run["expert_sparsity"] == run["sparsity"] == 0.5
    assert run["adapted_layers"] == 12
    assert run["last_loss"] < run["first_loss"]

    adapter = ["--model", home / "sparse", "--adapter", tmp_path / "run"]
    measured = result(capsys, "eval", *adapter, *data(home))
    assert measured["perplexity"] < measured["perplexity_without_adapter"]
    assert measured["expert_sparsity"] == 0.5

    (tmp_path / "name").write_text(name)
    merged = result(capsys, "merge", *adapter, "--output", tmp_path / "merged")
    assert merged["merged_layers"] == 12
    assert merged["expert_sparsity"] == 0.5
    assert merged["model_sparsity"] == merged["model_sparsity_before"]
    before, after = experts_in(home / "sparse"), experts_in(tmp_path / "merged")
    assert all(torch.equal(before[key] == 0, after[key] == 0) for key in before)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    again = result(capsys, "eval", "--model", tmp_path / "merged", *data(home))
    assert again["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-5)


@pytest.mark.filterwarnings("default::UserWarning")  # the command line prints it
def test_target_parameters_and_ranks_of_them(home, tmp_path, capsys):
    name = (home / "name").read_text()
    options = ["--target-parameters", "experts.down_proj", "--rank-pattern", "experts.down_proj=3"]
    out, err = printed(capsys, *finetune(home, tmp_path / "run", "--init", "default", *options))
    inner = {"mixtral": 64, "qwen3_moe": 16}[name]
    own = 2 * E[name] * 3 * (32 + inner)
    assert f"Trained: {own:,} parameters" in out
    assert f"2 adapted layers, of which 2 of experts with {2 * E[name]} adapters, {own:,} parameters." in out
    assert "gate_up_proj" in err
    assert "down_proj" not in err
    assert "get no adapters" in err
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)]

    run = finetune(home, tmp_path / "again", "--adapter", tmp_path / "run", "--target-parameters", "gate_up_proj")
    del run[run.index("--rank") : run.index("--rank") + 4]
    assert "--target-parameters was given" in failed(capsys, *run)


def test_refusals_speak_the_command_lines_words(home, tmp_path, capsys):
    name = (home / "name").read_text()
    old = {"mixtral": "w1", "qwen3_moe": "gate_proj"}[name]
    error = failed(capsys, *finetune(home, tmp_path / "run", "--target-modules", old))
    assert "--target-parameters" in error
    assert "gate_up_proj" in error
    error = failed(capsys, *finetune(home, tmp_path / "run", "--target-parameters", "mlp.gate.weight"))
    assert "--target-parameters" in error
    error = failed(capsys, *finetune(home, tmp_path / "run", "--rounding", "stochastic"))
    assert "--rounding" in error
    assert "--exclude-modules experts" in error
    prune = ["prune", "--model", home / "dense", "--output", tmp_path / "sparse", "--method", "magnitude"]
    assert "--target-parameters" in failed(capsys, *prune, "--target-modules", "experts.down_proj")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "sparse").exists()


@pytest.mark.filterwarnings("default::UserWarning")  # the command line prints it
def test_quantize_leaves_the_experts_as_values_and_says_so(home, tmp_path, capsys):
    """And the model trains: linears from codes, experts from values."""
    out, err = printed(capsys, "quantize", "--model", home / "sparse", "--output", tmp_path / "q", "--scheme", "int8")
    assert "8 linears are int8" in out
    assert "lors-cuda: warning: Not quantized: the experts 'model.layers.0.mlp.experts.gate_up_proj'" in err
    run = [*finetune(home, tmp_path / "run", "--init", "default"), "--model", tmp_path / "q"]
    assert result(capsys, *run)["expert_sparsity"] == 0.5
    merge = ["merge", "--model", tmp_path / "q", "--adapter", tmp_path / "run", "--output", tmp_path / "merged"]
    assert result(capsys, *merge)["expert_sparsity"] == 0.5


def test_info_lists_the_kernels_of_experts(capsys):
    kernels = result(capsys, "info")["kernels"]
    assert kernels["grouped_linear"]["cpu"] is True
    assert kernels["grouped_linear_backward"]["cpu"] is True


@pytest.mark.filterwarnings("default::UserWarning")  # the command line prints it
def test_the_demo_repairs_a_mixture_of_experts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_HELD_OUT_BYTES", 4000)
    monkeypatch.setattr(demo, "_ROUNDS", 2)
    tiny = "--hidden-size 32 --layers 1 --rank 8 --batch-size 4 --sequence-length 64 --dense-steps 40 --steps 20"
    out, _ = printed(capsys, "demo", "--moe", "--output", tmp_path / "demo", *tiny.split())
    assert "with Wanda, its experts too" in out
    content = json.loads((tmp_path / "demo" / "demo.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["dense", "pruned", "lors", "lors-gradient-init", "lors-exact"]
    assert content["promises_kept"]
    assert rows["dense"]["sparsity"] == 0
    for name in list(rows)[2:]:
        assert rows[name]["perplexity"] < rows["pruned"]["perplexity"]
        assert rows[name]["sparsity"] == rows["pruned"]["sparsity"] == 0.5
        assert rows[name]["zeros_lost"] == 0
        config = json.loads((tmp_path / "demo" / name / "adapter" / "adapter_config.json").read_text())
        assert config["rank_pattern"] == {r"experts\.\w+": 2}
        sparse, merged = (
            safetensors_torch.load_file(tmp_path / "demo" / part / "model.safetensors")
            for part in ("sparse", f"{name}/merged")
        )
        experts = [key for key in sparse if ".experts." in key]
        assert len(experts) == 8 * 3
        assert all(torch.equal(sparse[key] == 0, merged[key] == 0) for key in experts)
    suggested = out[out.index("Try next") :].split("lors-cuda ")[1]
    evaluated = result(capsys, *suggested.split())
    assert evaluated["perplexity"] == pytest.approx(rows["lors"]["perplexity"], rel=1e-4)
