# SPDX-License-Identifier: Apache-2.0
"""transformers' Conv1D (GPT-2), whose weight is [in, out]: adapted as the nn.Linear of the transposed weight."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import Tensor, nn

from byte_model import TEXT, byte_tokenizer
from cli_calls import call
from lors_cuda import (
    LoRSConfig,
    LoRSLinear,
    SparseLinear,
    estimate_gradients,
    get_lors_model,
    init_from_gradients,
    load_adapter,
    merge_and_unload,
    named_lors_layers,
    save_adapter,
)
from lors_cuda._linears import weight_of
from lors_cuda.pruning import measure_sparsity, prune
from models import assert_unchanged, batch, fill_adapters, refused, snapshot

transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D

every_layout = pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])


def pair() -> tuple[nn.Module, nn.Linear]:
    """A Conv1D 8 -> 12 with a 2:4 weight, and the nn.Linear that computes the same."""
    torch.manual_seed(0)
    conv, linear = Conv1D(12, 8), nn.Linear(8, 12)
    with torch.no_grad():
        linear.weight.view(-1, 4)[:, 1:3] = 0.0
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    return conv, linear


def gpt2(vocabulary: int = 64) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.1,
        bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def sparse_gpt2() -> nn.Module:
    model = gpt2()
    prune(model, "2:4", method="magnitude")
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch()["input_ids"]).logits


@every_layout
def test_a_layer_of_it_is_that_of_the_transposed_linear(layout):
    conv, linear = pair()
    x = torch.randn(2, 3, 8)
    ours, theirs = (LoRSLinear.from_linear(each, r=3, layout=layout) for each in (conv, linear))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), conv(x))
    for layer in (ours, theirs):
        fill_adapters(layer, size=0.5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert torch.equal(ours.weight, conv.weight)
    for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        merged = layer.merge()
        assert (type(merged), merged.nx, merged.nf) == (Conv1D, 8, 12)
        assert torch.equal(merged.weight, theirs.merge().weight.t())
        assert merged.weight.is_contiguous()
        torch.testing.assert_close(merged(x), ours(x))
        assert torch.equal(layer.to_linear().weight, conv.weight)
    assert type(SparseLinear.compress(conv, layout).to_linear()) is Conv1D


@every_layout
def test_gpt2_is_converted_merged_saved_and_loaded(layout, tmp_path):
    model = sparse_gpt2()
    before = {name: weight_of(layer).clone() for name, layer in model.named_modules() if isinstance(layer, Conv1D)}
    get_lors_model(model, LoRSConfig(r=4, layout=layout))
    assert [name for name, _ in named_lors_layers(model)] == list(before)
    fill_adapters(model, size=0.2)
    adapted = logits(model)
    save_adapter(model, tmp_path)
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    for name, weight in before.items():
        layer = model.get_submodule(name)
        assert type(layer) is Conv1D
        assert bool((weight_of(layer)[weight == 0] == 0).all())
    reloaded = load_adapter(sparse_gpt2(), tmp_path)
    torch.testing.assert_close(logits(reloaded), adapted, rtol=1e-4, atol=1e-5)


def test_a_conversion_that_fails_half_way_puts_it_back(monkeypatch):
    model, made = sparse_gpt2(), LoRSLinear.from_linear
    before = snapshot(model)

    def failing(linear: nn.Module, **fields: object) -> LoRSLinear:
        if linear.nx == 128:  # the block's last
            raise MemoryError
        return made(linear, **fields)

    monkeypatch.setattr(LoRSLinear, "from_linear", failing)
    with pytest.raises(MemoryError):
        get_lors_model(model, LoRSConfig(r=4))
    assert_unchanged(model, before)


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 0.5), ("0.75", 0.25)])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_pruning_goes_along_its_inputs(pattern, kept, method):
    model = gpt2()
    layers = prune(model, pattern, method=method, batches=[batch()])
    weight = weight_of(model.transformer.h[0].mlp.c_fc)
    assert layers == measure_sparsity(model)
    assert {layer.name: layer.shape for layer in layers}["transformer.h.0.mlp.c_fc"] == (128, 32)
    assert int((weight != 0).sum()) == kept * weight.numel()
    if pattern == "2:4":
        assert bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())


def test_the_gradient_start_is_that_of_the_transposed_weight():
    model = sparse_gpt2()
    gradients = estimate_gradients(model, [batch()])
    model.requires_grad_(True)
    model(**batch()).loss.backward()
    name = "transformer.h.1.attn.c_attn"
    torch.testing.assert_close(gradients[name], model.get_submodule(name).weight.grad.t())
    get_lors_model(model, LoRSConfig(r=4))
    init_from_gradients(model, gradients)


@pytest.mark.parametrize("layout", ["auto", "dense", "2:4", "bitmap"])
def test_peft_adapts_it(layout, tmp_path):
    peft = pytest.importorskip("peft")
    from lors_cuda.peft import LoRSLoraConfig, from_pretrained
    from peft_models import fill

    base = logits(sparse_gpt2())
    config = LoRSLoraConfig(r=4, target_modules="all-linear", layout=layout, fan_in_fan_out=True)
    model = peft.get_peft_model(sparse_gpt2(), config)
    torch.testing.assert_close(logits(model), base)
    fill(model, size=0.2)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(from_pretrained(sparse_gpt2(), tmp_path)), adapted)
    converted = load_adapter(sparse_gpt2(), tmp_path)
    torch.testing.assert_close(logits(converted), adapted)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    restored = copy.deepcopy(model).unload()
    assert type(restored.transformer.h[0].mlp.c_fc) is Conv1D
    assert torch.equal(logits(restored), base)
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].mlp.c_fc) is Conv1D
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)


def test_peft_puts_it_back_where_it_refuses():
    peft = pytest.importorskip("peft")
    from lors_cuda.peft import LoRSLoraConfig

    model = sparse_gpt2()
    before = snapshot(model)
    config = LoRSLoraConfig(r=4, target_modules=["c_attn", "wte"])
    refused(ValueError, lambda: peft.get_peft_model(model, config), "'transformer.wte' cannot be adapted")
    assert_unchanged(model, before)


def test_the_command_line_prunes_trains_and_merges_gpt2(tmp_path, capsys):
    gpt2(384).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    sparse, run, merged = tmp_path / "sparse", tmp_path / "run", tmp_path / "merged"
    short = ["--data", text, "--sequence-length", 32]
    assert call("prune", "--model", tmp_path / "dense", "--output", sparse, *short) == 0
    more = ["--rank", 4, "--lr", "1e-2", "--steps", 4, "--batch-size", 2]
    assert call("finetune", "--model", sparse, "--output", run, *short, *more) == 0
    assert call("merge", "--model", sparse, "--adapter", run, "--output", merged) == 0
    perplexity = []
    for arguments in (["--model", sparse, "--adapter", run], ["--model", merged]):
        capsys.readouterr()
        assert call("eval", *arguments, *short, "--json") == 0
        perplexity.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-4)
