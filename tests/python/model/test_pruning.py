# SPDX-License-Identifier: Apache-2.0
"""Pruning: the selection against brute force and torch's own pruners, Wanda against a slow oracle, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from byte_model import TEXT, byte_llama, byte_tokenizer
from lors_cuda.config import LoRSConfig
from lors_cuda.data import TokenDataset
from lors_cuda.pruning import SparsityPattern, measure_sparsity, prune, select_mask, total_sparsity
from lors_cuda.targets import find_targets
from models import refused, tiny_net

# ---- patterns ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", SparsityPattern(0.5, 2, 4)),
        ("1:8", SparsityPattern(0.875, 1, 8)),
        ("50%", SparsityPattern(0.5)),
        ("62.5%", SparsityPattern(0.625)),
        ("0.25", SparsityPattern(0.25)),
        (0.5, SparsityPattern(0.5)),
    ],
)
def test_patterns(text, expected):
    assert SparsityPattern.parse(text) == expected


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "50", "0", "1", "100%", "0%", "-0.5", "nan", "2:4:8", "", 1.0])
def test_bad_patterns(text):
    hint = "of N:M, N are kept" if text in ("4:4", "0:4", "5:4") else "such as 50%"
    refused(ValueError, lambda: SparsityPattern.parse(text), f"pattern is '{text}'", hint)


# ---- selection ----


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 13),
    pattern=st.sampled_from(["2:4", "1:4", "3:5", "1:2", 0.5, 0.3, 0.9]),
    data=st.data(),
)
def test_selection_against_brute_force(rows, columns, pattern, data):
    # Few distinct values, so that equal scores are the rule.
    scores = torch.tensor([[float(data.draw(st.integers(0, 4))) for _ in range(columns)] for _ in range(rows)])
    parsed = SparsityPattern.parse(pattern)
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    group = columns if parsed.group is None else parsed.group
    kept = columns - round(parsed.sparsity * columns) if parsed.kept is None else parsed.kept
    for row in range(rows):
        for start in range(0, columns, group):
            members = range(start, min(start + group, columns))
            for column in sorted(members, key=lambda c: (-scores[row, c].item(), c))[:kept]:
                expected[row, column] = True
    assert torch.equal(select_mask(scores, parsed), expected)


@pytest.mark.parametrize("shape", [(16, 32), (5, 8)])
def test_magnitude_two_of_four_agrees_with_torch(shape):
    from torch.ao.pruning import WeightNormSparsifier

    torch.manual_seed(1)
    ours, theirs = nn.Sequential(nn.Linear(shape[1], shape[0])), nn.Sequential(nn.Linear(shape[1], shape[0]))
    theirs.load_state_dict(ours.state_dict())
    prune(ours, "2:4", method="magnitude")
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(ours[0].weight, theirs[0].weight)


@pytest.mark.parametrize("sparsity", [0.5, 0.3])
def test_magnitude_unstructured_agrees_with_torch(sparsity):
    from torch.nn.utils import prune as torch_prune

    torch.manual_seed(1)
    ours, theirs = nn.Sequential(nn.Linear(33, 17)), nn.Sequential(nn.Linear(33, 17))
    theirs.load_state_dict(ours.state_dict())
    prune(ours, sparsity, method="magnitude")
    torch_prune.l1_unstructured(theirs[0], "weight", amount=round(sparsity * 33 * 17))
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_equal_magnitudes_still_give_the_exact_count():
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    nn.init.constant_(net[0].weight, -0.5)
    (layer,) = prune(net, "25%", method="magnitude")
    assert layer.zeros == 16


# ---- Wanda ----


def slow_wanda(model, pattern, batches, groups):
    """Prune group after group; for each, run the whole model and collect every input in float64."""
    for group in groups:
        rows = {name: [] for name in group}
        handles = []
        for name in group:

            def keep(module, args, found=rows[name]):
                found.append(args[0].detach().double())

            handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
        masks = []
        with torch.no_grad():
            for batch in batches:
                masks.append(batch["attention_mask"].bool())
                model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
        for handle in handles:
            handle.remove()
        for name in group:
            tokens = torch.cat([x[mask] for x, mask in zip(rows[name], masks, strict=True)])
            linear = model.get_submodule(name)
            scores = linear.weight.detach().double().abs() * tokens.square().sum(0).sqrt()
            mask = select_mask(scores, SparsityPattern.parse(pattern))
            linear.weight.data[~mask] = 0.0


def padded_batches():
    records = [(i, {"text": TEXT[17 * i : 17 * i + 10 + 7 * i]}) for i in range(9)]
    return list(TokenDataset.from_records(records, byte_tokenizer(), 64).batches(3))


class CrossBlock(nn.Module):
    """Wraps a decoder layer so that it also adds what the first one was given: the blocks are then no chain."""

    def __init__(self, inner, shared):
        super().__init__()
        self.inner, self.shared = inner, shared

    def forward(self, hidden, **kwargs):
        self.shared.setdefault("first", hidden)
        output = self.inner(hidden, **kwargs) + self.shared["first"]
        return output * 1.0


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_wanda_goes_block_by_block_and_skips_padding(pattern, seed):
    model, oracle = byte_llama(seed, layers=3), byte_llama(seed, layers=3)
    batches = padded_batches()
    assert not all(bool(batch["attention_mask"].all()) for batch in batches)
    names = [target.name for target in find_targets(oracle, LoRSConfig())]
    slow_wanda(oracle, pattern, batches, [[n for n in names if f"layers.{i}." in n] for i in range(3)])
    prune(model, pattern, batches=batches)
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_order_of_blocks_matters():
    """The test above would be empty if calibrating on the dense model gave the same masks."""
    blockwise, at_once = byte_llama(layers=3), byte_llama(layers=3)
    batches = padded_batches()
    prune(blockwise, "2:4", batches=batches)
    slow_wanda(at_once, "2:4", batches, [[target.name for target in find_targets(at_once, LoRSConfig())]])
    last = "model.layers.2.mlp.down_proj.weight"
    assert not torch.equal(blockwise.get_parameter(last), at_once.get_parameter(last))


def test_blocks_that_are_no_chain_are_calibrated_all_the_same():
    def wrapped():
        model = byte_llama(layers=2)
        shared: dict[str, torch.Tensor] = {}
        model.model.register_forward_pre_hook(lambda *_: shared.clear())
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = CrossBlock(layer, shared)
        # An extra step between the blocks, outside any of them.
        model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
        return model

    model, oracle = wrapped(), wrapped()
    batches = padded_batches()
    names = [target.name for target in find_targets(oracle, LoRSConfig())]
    slow_wanda(oracle, "2:4", batches, [[n for n in names if f"layers.{i}." in n] for i in range(2)])
    prune(model, "2:4", batches=batches)
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_blocks_of_a_transformers_model_are_run_one_by_one():
    """Once through the model to record, then block after block; running the model for each block is the exception."""
    model = byte_llama(layers=3)
    batches = padded_batches()
    embedded, run = [], []
    model.model.embed_tokens.register_forward_hook(lambda *_: embedded.append(1))
    model.model.layers[0].register_forward_hook(lambda *_: run.append(1))
    prune(model, "2:4", batches=batches)
    assert len(embedded) == len(batches)
    assert len(run) == 3 * len(batches)


class Wrapper(nn.Module):
    """tiny_net under a name, so that a batch is {"input": x}; it has no blocks."""

    def __init__(self):
        super().__init__()
        self.net = tiny_net()
        for linear in (self.net[0], self.net[2]):
            nn.init.normal_(linear.weight)

    def forward(self, input):
        return self.net(input)


def test_wanda_without_blocks_against_the_formula():
    model = Wrapper()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 10, 1, 1, 5, 1, 1, 1])
    weight = model.net[0].weight.detach().clone()
    prune(model, "2:4", batches=[{"input": x[:20]}, {"input": x[20:]}])
    score = weight.abs() * x.norm(dim=0)
    for row in range(16):
        for start in (0, 4):
            kept = set(score[row, start : start + 4].topk(2).indices.tolist())
            group = model.net[0].weight[row, start : start + 4]
            assert set(group.nonzero().flatten().tolist()) == kept
    assert not bool(model.net[0].weight[:, 0].any()), "a column that is hardly used is pruned first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_pruned_is_exactly_plus_zero_and_the_rest_unchanged(dtype):
    model = byte_llama().to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    layers = prune(model, "2:4", batches=padded_batches())
    assert model.training
    assert model.config.use_cache
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    pruned = {f"{layer.name}.weight" for layer in layers}
    assert len(pruned) == 14
    assert "lm_head.weight" not in pruned
    for name, parameter in model.named_parameters():
        if name not in pruned:
            assert torch.equal(parameter, before[name]), name
            continue
        zero = parameter == 0
        assert not bool(torch.signbit(parameter[zero]).any())
        assert torch.equal(parameter[~zero], before[name][~zero])
        assert bool((zero.view(zero.shape[0], -1, 4).sum(-1) == 2).all())
    assert total_sparsity(layers) == 0.5
    measured = measure_sparsity(model)
    assert layers == measured
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert measured.model_sparsity == zeros / weights < 0.5


def test_large_layers_are_selected_in_parts(monkeypatch):
    import lors_cuda.pruning as module

    torch.manual_seed(0)
    whole, parts = nn.Sequential(nn.Linear(32, 40)), nn.Sequential(nn.Linear(32, 40))
    parts.load_state_dict(whole.state_dict())
    prune(whole, "2:4", method="magnitude")
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 96)
    prune(parts, "2:4", method="magnitude")
    assert torch.equal(whole[0].weight, parts[0].weight)


def test_config_selects_the_targets():
    model = byte_llama()
    layers = prune(model, "2:4", method="magnitude", config=LoRSConfig(target_modules=["q_proj"]))
    assert [layer.name for layer in layers] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert total_sparsity(measure_sparsity(model)) == pytest.approx(2 * 512 / (14 * 1024 + 6 * 1024), abs=0.1)


# ---- refusals ----


def test_refusals():
    model = byte_llama()
    batches = padded_batches()
    refused(ValueError, lambda: prune(model, method="sparsegpt"), "'sparsegpt'", "'magnitude' or 'wanda'")
    refused(ValueError, lambda: prune(model), "calibration batches", "magnitude")
    refused(ValueError, lambda: prune(model, batches=[]), "calibration batches")
    refused(ValueError, lambda: prune(model, "7:4", batches=batches), "pattern is '7:4'")
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
    refused(ValueError, lambda: prune(model, method="magnitude"), "layers.1.mlp.up_proj", "NaN", "nothing was pruned")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    inputs = Wrapper()
    refused(ValueError, lambda: prune(inputs, batches=[{"input": torch.full((2, 8), math.inf)}]), "net.0", "inputs")


def test_a_layer_without_calibration_tokens_is_pruned_by_magnitude_and_named():
    class Unused(Wrapper):
        def __init__(self):
            super().__init__()
            self.expert = nn.Linear(8, 8)

    model = Unused()
    scores = model.expert.weight.detach().abs()
    with pytest.warns(UserWarning, match="'expert' saw no calibration token, and magnitude pruned them"):
        prune(model, batches=[{"input": torch.ones(2, 8)}])
    assert torch.equal(model.expert.weight != 0, select_mask(scores, SparsityPattern.parse("2:4")))


def test_an_error_leaves_hooks_and_flags_as_they_were():
    model = byte_llama()
    bad = [{"input_ids": torch.full((1, 4), 10**6)}]
    with pytest.raises(IndexError):
        prune(model, batches=bad)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.use_cache
