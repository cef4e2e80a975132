# SPDX-License-Identifier: Apache-2.0
"""init_from_gradients: the leading singular vectors, the unchanged output, and refusals without a trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lors_cuda.config import LoRSConfig
from lors_cuda.gradient_init import estimate_gradients, init_from_gradients
from lors_cuda.model import get_lors_model, named_lors_layers
from lors_cuda.sparse_linear import SparseLinear
from models import assert_unchanged, batch, fill_adapters, logits, refused, snapshot, tiny_llama, tiny_net


def decaying(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with singular values 1, 1/2, 1/4, ... : its leading directions are well defined."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    values = 0.5 ** torch.arange(min(rows, columns))
    return left[:, : len(values)] * values @ right[: len(values)]


def one_layer(rows: int, columns: int, r: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return get_lors_model(nn.Sequential(nn.Linear(columns, rows, dtype=dtype)), LoRSConfig(r=r))


@pytest.mark.parametrize(("rows", "columns", "r"), [(64, 96, 4), (96, 64, 4), (12, 8, 3), (8, 12, 8), (16, 16, 1)])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_lora_a_holds_the_leading_right_singular_vectors(rows, columns, r, size):
    model = one_layer(rows, columns, r)
    layer = model[0]
    gradient = decaying(rows, columns) * size
    init_from_gradients(model, {"0": gradient}, stable_gamma=2.0)
    exact = torch.linalg.svd(gradient.double(), full_matrices=False).Vh[:r]
    ours = layer.lora_A.detach().double() * 2.0
    torch.testing.assert_close(ours @ ours.T, torch.eye(r, dtype=torch.double), rtol=0, atol=1e-5)
    # Each row up to its sign, which a singular value decomposition leaves open.
    torch.testing.assert_close((ours * exact).sum(-1).abs(), torch.ones(r, dtype=torch.double), rtol=0, atol=1e-4)
    assert not layer.lora_B.any()


def test_a_16_bit_model_gets_its_adapters_dtype():
    model = one_layer(16, 8, 2, torch.bfloat16)
    init_from_gradients(model, {"0": decaying(16, 8).bfloat16()})
    assert model[0].lora_A.dtype == torch.float32
    assert model[0].lora_A.requires_grad


def test_a_gradient_start_leaves_the_output_and_the_zeros():
    model = tiny_llama()
    before = logits(model)
    gradients = estimate_gradients(model, [batch(1), batch(2)])
    get_lors_model(model, LoRSConfig(r=4))
    fill_adapters(model)
    init_from_gradients(model, gradients)
    torch.testing.assert_close(logits(model), before)
    for name, layer in named_lors_layers(model):
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(4), rtol=0, atol=1e-5, msg=name)
        assert (layer.weight == 0).float().mean() == 0.5


def test_equal_gradients_give_equal_adapters_and_leave_the_random_state():
    results = []
    for seed in (1, 2):
        model = one_layer(64, 96, 4)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        init_from_gradients(model, {"0": torch.randn(64, 96, generator=torch.Generator().manual_seed(3))})
        assert torch.equal(torch.get_rng_state(), state)
        results.append(model[0].lora_A.detach().clone())
    assert torch.equal(*results)


def test_an_all_zero_gradient_keeps_lora_a():
    model = one_layer(16, 8, 2)
    before = model[0].lora_A.detach().clone()
    init_from_gradients(model, {"0": torch.zeros(16, 8)})
    assert torch.equal(model[0].lora_A, before)
    assert not model[0].lora_B.any()


def test_every_problem_is_named_and_nothing_changed():
    model = get_lors_model(
        nn.Sequential(*[nn.Linear(8, 12) for _ in range(5)]), LoRSConfig(r=2, init_lora_weights=False)
    )
    before = snapshot(model)
    gradients = {
        "1": torch.randn(8, 12),
        "2": torch.full((12, 8), math.nan),
        "3": [1.0],
        "4": torch.randn(12, 8),
    }
    message = refused(
        ValueError,
        lambda: init_from_gradients(model, gradients),
        "no gradient for '0'",
        "gradient of '1' has shape [8, 12], but [12, 8] is needed",
        "gradient of '2' has NaN or infinity",
        "gradient of '3' must be a floating-point tensor, but is list",
    )
    assert "'4'" not in message
    assert_unchanged(model, before)


def test_gradients_of_modules_that_are_not_adapted_are_ignored():
    model = tiny_llama()
    gradients = estimate_gradients(model, [batch(1)])
    names = {name for name in gradients if name.endswith("q_proj")}
    get_lors_model(model, LoRSConfig(r=4, target_modules=["q_proj"]))
    init_from_gradients(model, {**gradients, "head": torch.full((2, 2), math.nan), "words": "none"})
    for name, layer in named_lors_layers(model):
        exact = torch.linalg.svd(gradients[name]).Vh[:4]
        torch.testing.assert_close((layer.lora_A * exact).sum(-1).abs(), torch.ones(4), rtol=0, atol=1e-3)
        names.remove(name)
    assert not names
    refused(ValueError, lambda: init_from_gradients(model, {"head": torch.ones(2, 2)}), "no gradient for 'model.layers")


@pytest.mark.parametrize(
    ("gamma", "exception"), [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
def test_stable_gamma_must_be_positive(gamma, exception):
    model = one_layer(16, 8, 2)
    refused(exception, lambda: init_from_gradients(model, {"0": decaying(16, 8)}, stable_gamma=gamma), "stable_gamma")


def test_wrong_arguments_are_refused():
    refused(ValueError, lambda: init_from_gradients(tiny_net(), {}), "no LoRS layers")
    refused(TypeError, lambda: init_from_gradients(tiny_net(), []), "gradients must map module names")
    refused(TypeError, lambda: init_from_gradients(3, {}), "torch.nn.Module")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_stored_sparse_have_the_gradients_of_plain_ones(dtype):
    model = tiny_llama(dtype=dtype)
    expected = estimate_gradients(model, [batch(0), batch(1)], progress=False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SparseLinear.compress(module))
    before = snapshot(model)
    gradients = estimate_gradients(model, [batch(0), batch(1)], progress=False)
    assert gradients.keys() == expected.keys()
    eps = torch.finfo(dtype).eps
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm()) <= 4 * eps * float(expected[name].norm()), name
    assert_unchanged(model, before)
