# SPDX-License-Identifier: Apache-2.0
"""Measuring and pruning any model: what is counted, what is pruned and what is listed as left out."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from byte_model import byte_llama
from families import FAMILIES, family
from lors_cuda import LoRSConfig, get_lors_model
from lors_cuda.interchange import to_torch_semi_structured
from lors_cuda.pruning import SparsityPattern, measure_sparsity, prune, select_mask, total_sparsity
from lors_cuda.sparsity import EMBEDDING, EXPERTS, HEAD, weights_of
from lors_cuda.weight import SparseWeight
from models import fill_adapters, prune_two_of_four, refused, tiny_llama

pytest.importorskip("transformers")


def share_of_zeros(tensors) -> float:
    tensors = list(tensors)
    return sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors)


def matrices(model: nn.Module):
    return [
        p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith("proj_bias")
    ]  # gpt_oss: of experts


def pruned_quietly(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prune(model, *args, **options)


# ---- every family ----


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured_and_pruned(name):
    model, batches = family(name)
    before = measure_sparsity(model)
    assert before.model_sparsity == share_of_zeros(matrices(model))
    assert len(before) > 0
    pruned = pruned_quietly(model, "2:4", method="wanda" if batches else "magnitude", batches=batches)
    assert all(layer.sparsity == 0.5 for layer in pruned if layer.shape[-1] % 4 == 0)
    assert pruned.model_sparsity == measure_sparsity(model).model_sparsity == share_of_zeros(matrices(model))
    assert 0 < pruned.model_sparsity < pruned.sparsity <= 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_and_output_heads_are_not_pruned(name):
    model, _ = family(name)
    kept = {w.name: w.values.detach().clone() for w in weights_of(model) if w.kind in (EMBEDDING, HEAD)}
    assert kept
    pruned_quietly(model, "2:4", method="magnitude")
    for weight in weights_of(model):
        if weight.name in kept:
            assert torch.equal(weight.values, kept[weight.name]), weight.name


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_conv1d_is_pruned_along_its_input(method, pattern):
    """GPT-2 keeps a weight as [K, N]; its zeros are those of the same nn.Linear."""
    transposed, batches = family("gpt2")
    layer = transposed.transformer.h[0].mlp.c_fc  # 32 -> 128
    weight = layer.weight.detach().clone()
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    pruned = prune(transposed, pattern, method=method, batches=batches, config=LoRSConfig(target_modules=["c_fc"]))
    handle.remove()
    assert pruned[0].shape == (128, 32)
    linear = nn.Sequential(nn.Linear(32, 128))
    linear[0].weight.data = weight.T.clone()
    if method == "magnitude":
        prune(linear, pattern, method="magnitude")
        expected = linear[0].weight
    else:
        scores = weight.T.abs() * inputs[0].reshape(-1, 32).norm(dim=0)
        expected = torch.where(select_mask(scores, SparsityPattern.parse(pattern)), weight.T, 0.0)
    assert torch.equal(layer.weight.T, expected)
    assert not torch.equal(layer.weight, weight)


# ---- experts ----


@pytest.mark.parametrize("name", ["dbrx", "jetmoe", "llama4"])
def test_experts_of_a_class_that_does_not_say_how_it_stores_them_are_counted_and_named(name):
    model, _ = family(name)
    with pytest.warns(
        UserWarning, match=r"Not pruned: '.*\d\d\.\d% of the model's weights\), because they are experts of"
    ):
        pruned = prune(model, "2:4", method="magnitude")
    measured = measure_sparsity(model)
    experts = [layer for layer in measured if layer.kind == EXPERTS]
    assert experts
    assert not any(layer.kind == EXPERTS for layer in pruned)
    assert total_sparsity(measured) < 0.3 < pruned.sparsity
    assert "50.00% over" in str(pruned)
    everything = sum(layer.weights for layer in (*pruned, *pruned.rest))
    share = sum(layer.weights for layer in experts) / everything
    assert f"0.00% over the experts ({share:.1%} of the weights)" in str(pruned)
    assert f"linears ({sum(layer.weights for layer in pruned) / everything:.1%} of the weights)" in str(pruned)
    assert pruned.expert_sparsity == measured.expert_sparsity == pruned.to_dict()["expert_sparsity"] == 0
    assert f"{measured.model_sparsity:.2%} over all weights of the model" in str(pruned)


# ---- what cannot be pruned ----


def test_what_cannot_be_pruned_is_listed_once_and_the_rest_is_pruned():
    model = byte_llama()
    block = model.model.layers[0]
    nn.utils.parametrizations.weight_norm(block.self_attn.q_proj)
    torch_prune.l1_unstructured(block.self_attn.k_proj, "weight", amount=3)
    block.mlp.up_proj.weight = nn.Parameter(block.mlp.up_proj.weight.data.to(torch.int8), requires_grad=False)
    with pytest.warns(UserWarning, match="Not pruned") as caught:
        pruned = prune(model, "2:4", method="magnitude")
    (warning,) = [w for w in caught if "Not pruned" in str(w.message)]
    for part in (
        "layers.0.self_attn.q_proj', 'model.layers.0.self_attn.k_proj'",
        "are computed",
        "layers.0.mlp.up_proj",
    ):
        assert part in str(warning.message)
    assert len(pruned) == 14 - 3
    assert pruned.sparsity == 0.5


def test_computed_weights_are_counted_once():
    model = byte_llama()
    torch_prune.l1_unstructured(model.model.layers[0].self_attn.k_proj, "weight", amount=3)
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    measured = measure_sparsity(model)
    assert sum(layer.zeros for layer in measured) == 3
    assert measured.model_sparsity == 3 / sum(p.numel() for p in matrices(byte_llama()))


def test_a_linear_with_an_embeddings_weight_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 16, bias=False)
            self.embed = nn.Embedding(16, 8)
            self.inner = nn.Linear(8, 8)
            self.project.weight = self.embed.weight

    model = Tied()
    before = model.embed.weight.detach().clone()
    assert [layer.name for layer in prune(model, "2:4", method="magnitude")] == ["inner"]
    assert torch.equal(model.embed.weight, before)


def test_nothing_to_prune():
    refused(
        ValueError, lambda: prune(nn.Sequential(nn.ReLU()), method="magnitude"), "has no linear and no experts to prune"
    )
    converted = get_lors_model(tiny_llama(), LoRSConfig(r=2))
    refused(ValueError, lambda: prune(converted, method="magnitude"), "stored sparse", "merge_and_unload")
    refused(
        ValueError,
        lambda: prune(byte_llama(), method="magnitude", config=LoRSConfig(target_modules=["q_porj"])),
        "'q_porj'",
        "matches no linear",
        "q_proj",
    )


# ---- models in every state ----


@pytest.mark.parametrize("layout", ["auto", "dense", "2:4", "bitmap"])
def test_a_converted_model_measures_as_before(layout):
    model = tiny_llama()
    before = measure_sparsity(model)
    get_lors_model(model, LoRSConfig(r=2, layout=layout))
    fill_adapters(model)
    assert measure_sparsity(model) == before


def test_a_peft_model_measures_as_before():
    peft = pytest.importorskip("peft")
    from lors_cuda.peft import LoRSLoraConfig

    for config in (
        LoRSLoraConfig(r=2, target_modules="all-linear"),
        LoRSLoraConfig(r=2, target_modules="all-linear", layout="dense", modules_to_save=["lm_head"]),
        peft.LoraConfig(r=2, target_modules="all-linear"),
    ):
        model = tiny_llama()
        before = measure_sparsity(model)
        after = measure_sparsity(peft.get_peft_model(model, config))
        assert (after.sparsity, after.model_sparsity, len(after)) == (
            before.sparsity,
            before.model_sparsity,
            len(before),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_every_dtype_is_measured(dtype):
    model = prune_two_of_four(nn.Sequential(nn.Linear(16, 8))).to(dtype)
    assert measure_sparsity(model).sparsity >= 0.5


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
def test_semi_structured_weights_are_measured():
    model = prune_two_of_four(nn.Sequential(nn.Linear(64, 32))).bfloat16()
    expected = measure_sparsity(model)
    weight = to_torch_semi_structured(SparseWeight.from_dense(model[0].weight.detach(), "2:4"))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    assert measure_sparsity(model) == expected


def test_what_cannot_be_counted_is_named():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.warns(UserWarning, match=r"'model.layers.0.mlp.up_proj' were not counted"):
        measured = measure_sparsity(model)
    assert measured.sparsity == 0.5


def test_names_choose_what_is_measured():
    model = tiny_llama()
    config = LoRSConfig(target_modules=["q_proj", "lm_head"], exclude_modules=["1.self_attn.q_proj"])
    chosen = measure_sparsity(model, config)
    assert [layer.name for layer in chosen] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert chosen.model_sparsity == measure_sparsity(model).model_sparsity
    config = LoRSConfig(target_modules=["q_proj"], exclude_modules=["self_attn.q_proj"])
    refused(ValueError, lambda: measure_sparsity(model, config), "leaves nothing")


def test_measuring_changes_nothing():
    model, _ = family("qwen2_moe")
    before = copy.deepcopy(model.state_dict())
    measure_sparsity(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
