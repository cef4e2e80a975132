# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny model: what it promises holds, what it writes can be used, and nothing of a person's is lost."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from torch import nn

from lors_cuda.cli import demo, main
from lors_cuda.cli._demo_peers import AutogradMasking, PlainLoRA, measure_steps, merge_layers, replace_layers
from lors_cuda.cli._demo_text import language_reference, split_topics
from lors_cuda.config import LoRSConfig
from lors_cuda.data import load_data
from lors_cuda.linear import LoRSLinear
from lors_cuda.model import get_lors_model
from models import batch, fill_adapters, logits, tiny_llama, trained

for package in ("transformers", "safetensors", "matplotlib"):
    pytest.importorskip(package)

TINY = shlex.split(
    "--hidden-size 32 --layers 1 --rank 4 --batch-size 4 --sequence-length 64 --dense-steps 40 --steps 20"
)
LORS = [method.name for method in demo.METHODS if method.peer is None]
QUANTIZED = "lors-int4"


@pytest.fixture(scope="module", autouse=True)
def brief():
    """Less held-out text and fewer rounds of measuring than a person gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_HELD_OUT_BYTES", 4000)
        patch.setattr(demo, "_ROUNDS", 2)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of one run, and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "a demo"  # a space, because the suggested commands must bear it
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *values, **_: lines.extend(str(value) for value in values))
        code = main(["demo", "--output", str(output), *TINY])
    assert code == 0, "\n".join(lines)
    return output, "\n".join(lines)


def numbers(output) -> dict[str, dict]:
    """The rows of demo.json by name."""
    return {row["name"]: row for row in json.loads((output / "demo.json").read_text())["rows"]}


def test_lors_is_better_than_pruned_and_as_sparse(finished):
    rows = numbers(finished[0])
    assert list(rows) == ["dense", "pruned", *(method.name for method in demo.METHODS), "lora-masked"]
    assert rows["dense"]["sparsity"] == 0
    assert rows["pruned"]["sparsity"] == 0.5
    for name in LORS:
        assert rows[name]["perplexity"] < rows["pruned"]["perplexity"]
        if name == QUANTIZED:  # a kept weight may have the code 0
            assert 0.5 <= rows[name]["sparsity"] < 0.55
        else:
            assert rows[name]["sparsity"] == 0.5
        assert rows[name]["zeros_lost"] == 0
        assert max(rows[name]["logit_difference"].values()) <= 1e-5 * rows[name]["largest_logit"]
        assert [step for step, _ in rows[name]["curve"]] == [0, 4, 8, 12, 16, 20]
        start = rows[name]["curve"][0][1]
        assert (start == rows["pruned"]["perplexity"]) == (name != QUANTIZED)
        assert start == pytest.approx(rows["pruned"]["perplexity"], rel=0.1)
        assert rows[name]["curve"][-1][1] == rows[name]["perplexity"]


def test_the_comparison_methods_behave_as_said(finished):
    rows = numbers(finished[0])
    assert rows["lora"]["sparsity"] < 0.01  # merging filled the zeros
    assert rows["lora-masked"]["sparsity"] == 0.5
    assert rows["lora-masked"]["perplexity"] > rows["lora"]["perplexity"]
    assert rows["sqft"]["sparsity"] == 0.5
    # The same gradients from the same start, in another order of summation.
    assert rows["sqft"]["perplexity"] == pytest.approx(rows["lors-exact"]["perplexity"], rel=1e-3)
    assert rows["lors"]["perplexity"] != rows["lors-exact"]["perplexity"]
    # Autograd keeps every merged weight for backward, LoRS none.
    assert rows["lors"]["peak_bytes"] < rows["sqft"]["peak_bytes"]
    assert all(rows[method.name]["ms_per_step"] > 0 for method in demo.METHODS)


def test_what_was_written_keeps_the_promises_without_the_demo(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lors_cuda import load_sparse_checkpoint
    from lors_cuda.checkpoint import load_adapter

    output, _ = finished
    sparse = AutoModelForCausalLM.from_pretrained(output / "sparse")
    masks = {name: module.weight != 0 for name, module in sparse.model.named_modules() if isinstance(module, nn.Linear)}
    tokenizer = AutoTokenizer.from_pretrained(output / "lors" / "merged")
    ids = load_data(output / "heldout.txt", tokenizer, 64).batch([0, 1])["input_ids"]
    for name in LORS:
        if name == QUANTIZED:
            with pytest.warns(UserWarning, match="kept weights of"):
                merged = load_sparse_checkpoint(output / name / "merged", quantized="dequantize").eval()
            base = load_sparse_checkpoint(output / "sparse-int4", quantized="keep")
        else:
            merged = AutoModelForCausalLM.from_pretrained(output / name / "merged").eval()
            base = AutoModelForCausalLM.from_pretrained(output / "sparse")
        adapted = load_adapter(base.eval(), output / name / "adapter")
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
        for path, mask in masks.items():
            weight = merged.model.get_submodule(path).weight
            assert not bool(weight[~mask].any()), path
            assert name == QUANTIZED or torch.equal(weight != 0, mask), path
            assert not torch.equal(weight, sparse.model.get_submodule(path).weight), path


def test_files_and_table(finished):
    output, printed = finished
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    table = (output / "table.txt").read_text()
    assert table in printed
    for label in ["dense model", "pruned to 2:4 (Wanda)", *(method.label for method in demo.METHODS)]:
        assert re.search(rf"^{re.escape(label)} .*\d%", table, re.MULTILINE), label
    marker = json.loads((output / "demo.json").read_text())
    assert sorted(marker["files"]) == sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())
    assert not [path for path in output.parent.iterdir() if path != output], "temporary directories were left"


def test_the_suggested_commands_work(finished, capsys):
    output, printed = finished
    commands = [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("  lors-cuda ")]
    assert [command[0] for command in commands] == ["eval", "merge", "finetune"]
    assert main([*commands[0], "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    rows = numbers(output)
    assert evaluated["perplexity"] == pytest.approx(rows["lors"]["perplexity"], rel=1e-4)
    assert evaluated["perplexity_without_adapter"] == pytest.approx(rows["pruned"]["perplexity"], rel=1e-4)
    assert main(commands[1]) == 0
    assert main([*commands[2], "--steps", "2"]) == 0
    for ending in ("merged", "run"):
        assert any(output.with_name(f"{output.name}-{ending}").iterdir())


def test_a_second_run_replaces_the_first_and_gives_the_same(finished, capsys):
    output, _ = finished
    first = numbers(output)
    (output / "table.txt").write_text("of the first run")
    assert main(["demo", "--output", str(output), *TINY, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["promises_kept"]
    assert "of the first run" not in (output / "table.txt").read_text()
    for row in result["rows"]:
        assert row["perplexity"] == first[row["name"]]["perplexity"], row["name"]


def test_a_broken_promise_is_an_error(tmp_path, capsys):
    # With such a learning rate nothing is repaired.
    short = ["--steps", "1", "--dense-steps", "1", "--lr", "1e-30"]
    assert main(["demo", "--output", str(tmp_path / "demo"), *TINY, *short]) == 1
    captured = capsys.readouterr()
    assert "which is not below the" in captured.err
    assert captured.err.startswith("lors-cuda: error: LoRS has perplexity")
    assert (tmp_path / "demo" / "table.txt").is_file()
    assert not json.loads((tmp_path / "demo" / "demo.json").read_text())["promises_kept"]


@pytest.mark.parametrize("marker", [None, "not json", '{"made_by": "lors-cuda demo", "files": ["demo.json"]}'])
def test_a_directory_with_other_files_is_refused(tmp_path, capsys, marker):
    (tmp_path / "mine.txt").write_text("precious")
    if marker is not None:
        (tmp_path / "demo.json").write_text(marker)
    assert main(["demo", "--output", str(tmp_path), *TINY]) == 1
    error = capsys.readouterr().err
    assert "which the demo did not make; nothing was written" in error
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_output_that_cannot_be_replaced_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file")]) == 1
    assert "is a file" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--output", "."]) == 1
    assert "the current directory" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--hidden-size 40", "--hidden-size 16 --rank 17", "--sequence-length 1"])
def test_wrong_usage(tmp_path, capsys, options):
    assert main(["demo", "--output", str(tmp_path / "demo"), *options.split()]) == 2
    assert "--hidden-size must be a multiple of 16" in capsys.readouterr().err


def test_the_split_does_not_leak():
    split = split_topics(language_reference(), 24_000)
    assert 20_000 < len(split.held_out.encode()) < 30_000
    assert len(split.train) > 5 * len(split.held_out)
    train, held_out = (" ".join(text.split()) for text in (split.train, split.held_out))
    length = 40
    windows = {train[start : start + length] for start in range(len(train) - length)}
    shared = [held_out[start : start + length] in windows for start in range(len(held_out) - length)]
    assert sum(shared) < 0.02 * len(shared)


def test_the_split_uses_every_paragraph_once():
    topics = {f"{number:02}": f"Own {number}.\n\nIn  all\nof them.\n" for number in range(12)}
    split = split_topics(topics, 1000)
    assert split.held_out == "Own 0.\n\nIn  all\nof them.\n\nOwn 10.\n"
    assert split.train == "\n\n".join(f"Own {n}." for n in range(12) if n not in (0, 10)) + "\n"
    assert (split.train_topics, split.held_out_topics) == (10, 2)
    short = split_topics(topics, 5)
    assert (short.held_out, short.held_out_topics) == ("Own 0.\n", 1)
    assert short.train == split.train  # what is left out for size is not trained on either


@pytest.fixture
def layer():
    """A LoRS layer with the exact gradient, pruned half, its adapters filled; and an input [5, 16]."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 12)
    with torch.no_grad():
        linear.weight.masked_fill_(torch.rand(12, 16) < 0.5, 0.0)
    made = LoRSLinear.from_linear(linear, r=3, lora_alpha=6, gradient="exact", init_lora_weights=False)
    return made, torch.randn(5, 16)


def test_masking_by_autograd_is_the_exact_gradient(layer):
    made, input = layer
    peer = AutogradMasking(made)
    grad_output = torch.randn(5, 12)
    expected = torch.autograd.grad(made(input), (made.lora_A, made.lora_B), grad_output)
    output = peer(input)
    torch.testing.assert_close(output, made(input))
    for got, want in zip(torch.autograd.grad(output, (peer.lora_A, peer.lora_B), grad_output), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_plain_lora_is_unmasked(layer):
    made, input = layer
    peer = PlainLoRA(made)
    expected = input @ (made.weight + 2.0 * made.lora_B @ made.lora_A).T + made.bias
    torch.testing.assert_close(peer(input), expected)
    assert not bool((peer.merged() == 0).any())


@pytest.mark.parametrize("peer", [AutogradMasking, PlainLoRA])
def test_peers_replace_and_merge(peer):
    model = trained()
    masked = logits(model)
    replace_layers(model, peer)
    assert not any(isinstance(module, LoRSLinear) for module in model.modules())
    before = logits(model)
    assert torch.allclose(before, masked, atol=1e-5) == (peer is AutogradMasking)
    merge_layers(model)
    assert not any(isinstance(module, peer) for module in model.modules())
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_measuring_changes_nothing():
    models = {}
    for name in ("a", "b"):
        models[name] = get_lors_model(tiny_llama(), LoRSConfig(r=4))
        fill_adapters(models[name])
    before = logits(models["a"])
    costs = measure_steps(models, [batch()], rounds=2)
    assert torch.equal(logits(models["a"]), before)
    assert all(parameter.grad is None for model in models.values() for parameter in model.parameters())
    assert costs["a"].peak_bytes == costs["b"].peak_bytes > 0
