# SPDX-License-Identifier: Apache-2.0
"""The gradient start of experts: each has its own mean gradient, whole or sketched, and its own singular vectors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from expert_models import EXPERT_MODELS, experts_model, loss_of, token_batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lors_cuda import LoRSConfig, estimate_gradients, get_lors_model, init_from_gradients
from lors_cuda.experts import expert_stacks, stack_of
from lors_cuda.gradient_init import leading_right_singular_vectors
from lors_cuda.model import named_lors_layers
from models import refused

BATCHES = [token_batch(seed) for seed in range(3)]
# Accumulated in float32, and compared with float64.
RELATIVE = 1e-6


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return loss_of(model, ids)


def estimated(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    return estimate_gradients(model, BATCHES, loss_fn=loss, progress=False, **options)


def by_autograd(model: nn.Module) -> dict[str, Tensor]:
    """The mean over the batches of every stack's gradient, [E, N, K]."""
    stacks = {path: (module, module._parameters[name]) for path, module, name in expert_stacks(model)}
    sums = {path: torch.zeros_like(parameter) for path, (_, parameter) in stacks.items()}
    for ids in BATCHES:
        gradients = torch.autograd.grad(loss(model, ids), [parameter for _, parameter in stacks.values()])
        for path, gradient in zip(stacks, gradients, strict=True):
            sums[path] += gradient / len(BATCHES)
    return {path: total.transpose(1, 2) if stacks[path][0].is_transposed else total for path, total in sums.items()}


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_the_gradients_are_those_of_autograd(name):
    model = experts_model(name, torch.float64)
    expected = by_autograd(model)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    own = {module: set(vars(module)) for module in model.modules()}

    gradients = estimated(model)

    assert set(expected) < set(gradients)  # beside linears
    for path, gradient in expected.items():
        assert gradients[path].dtype == torch.float32
        assert gradients[path].shape == gradient.shape
        error = (gradients[path] - gradient).norm() / gradient.norm()
        assert error < RELATIVE, f"{path}: {error:.1e}"
    assert flags == {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert own == {module: set(vars(module)) for module in model.modules()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_stack_alone_and_no_linears():
    model = experts_model("mixtral", torch.float64)
    expected = by_autograd(model)
    path = "model.layers.0.mlp.experts.gate_up_proj"  # of the first layer: nothing before it requires a gradient
    gradients = estimated(model, config=LoRSConfig(r=1, target_parameters=[path]))
    assert list(gradients) == [path]
    assert (gradients[path] - expected[path]).norm() < RELATIVE * expected[path].norm()


class Fresh(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator has made anew."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        views = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in made:
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in views:
                self.largest = max(self.largest, one.numel())
        return result


@pytest.mark.parametrize("sketched", [False, True])
def test_no_gradient_of_a_whole_stack_is_formed_on_the_device(sketched):
    """The accumulators on the host are made before; in a batch nothing of their size is."""
    model = experts_model("qwen3_moe")
    _, module, _ = next(expert_stacks(model))
    E, N, K = stack_of(module, "gate_up_proj").shape
    made = Fresh()

    def watched(model: nn.Module, ids: Tensor) -> Tensor:
        made.__enter__()  # until backward is done, in this thread
        return loss(model, ids)

    config = LoRSConfig(r=2, target_parameters=["gate_up_proj", "down_proj"])
    try:
        estimate_gradients(model, BATCHES[:1], loss_fn=watched, progress=False, config=config, sketch_experts=sketched)
    finally:
        made.__exit__(None, None, None)
    assert N * K <= made.largest < E * N * K / 2


def test_a_sketch_keeps_the_leading_directions_of_each_expert():
    """Compared: what the gradient has in r directions of the sketch, and in its own first r; in r directions by chance
    it would have a quarter."""
    model = experts_model("mixtral", torch.float64)
    config = LoRSConfig(r=2)
    whole, sketches = estimated(model, config=config), estimated(model, config=config, sketch_experts=True)
    for path, module, name in expert_stacks(model):
        E, _, K = stack_of(module, name).shape
        shares = []
        assert sketches[path].shape == (E, 8, K)
        for gradient, sketch in zip(whole[path], sketches[path], strict=True):
            best = (gradient @ leading_right_singular_vectors(gradient, 2).T).norm()
            kept = (gradient @ leading_right_singular_vectors(sketch, 2).T).norm()
            assert kept <= best * (1 + 1e-5)
            shares.append(float(kept / best))
            # Of normal numbers whose squares sum to 1 in expectation: lengths are kept but for chance.
            assert 0.5 < sketch.norm() / gradient.norm() < 2
        assert min(shares) > 0.75
        assert sum(shares) / E > 0.85
    linears = set(whole) - {path for path, _, _ in expert_stacks(model)}
    assert linears
    assert all(torch.equal(whole[name], sketches[name]) for name in linears)
    again = estimated(model, config=config, sketch_experts=True)
    assert all(torch.equal(sketches[name], again[name]) for name in sketches)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("sketched", [False, True])
def test_lora_a_holds_each_experts_singular_vectors(name, sketched):
    model = experts_model(name)
    config = LoRSConfig(r=2, rank_pattern={"down_proj": 3})
    gradients = estimated(model, config=config, sketch_experts=sketched)
    get_lors_model(model, config)
    ids = token_batch(7)
    before = loss(model, ids).detach()
    init_from_gradients(model, gradients, stable_gamma=4.0)
    stacks = [(path, layer) for path, layer in named_lors_layers(model) if layer.num_experts is not None]
    assert stacks
    for path, layer in stacks:
        assert layer.lora_A.requires_grad
        assert not bool(layer.lora_B.any())
        for rows, gradient in zip(layer.lora_A.detach(), gradients[path], strict=True):
            right = torch.linalg.svd(gradient.double()).Vh[: layer.r].float()
            signs = (rows * right).sum(1, keepdim=True).sign()
            torch.testing.assert_close(rows * 4.0, right * signs, rtol=0, atol=1e-3)
    torch.testing.assert_close(loss(model, ids).detach(), before, rtol=1e-6, atol=0)


def test_experts_without_rows_keep_their_start_and_are_counted():
    model = experts_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()  # of equal scores the router takes two experts, always the same
    gradients = estimated(model)
    path = "model.layers.0.mlp.experts.down_proj"
    idle = [expert for expert, gradient in enumerate(gradients[path]) if not bool(gradient.any())]
    assert len(idle) == 6
    torch.manual_seed(0)
    get_lors_model(model, LoRSConfig(r=2))
    layer: Any = model.get_submodule(path)
    drawn = layer.lora_A.detach().clone()
    with pytest.warns(UserWarning, match="no token of the batches was routed") as caught:
        init_from_gradients(model, gradients)
    message = str(caught[0].message)
    assert f"6 of '{path}'" in message
    assert "of 32 adapters of experts" in message
    for expert in range(8):
        assert torch.equal(layer.lora_A[expert], drawn[expert]) == (expert in idle)
    assert not bool(layer.lora_B.any())


def test_all_experts_reached_is_no_warning():
    model = experts_model("mixtral")
    gradients = estimated(model)
    get_lors_model(model, LoRSConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        init_from_gradients(model, gradients)


def test_gradients_that_do_not_fit_are_refused_and_nothing_changes():
    model = experts_model("mixtral")
    gradients = estimated(model, config=LoRSConfig(r=2), sketch_experts=True)
    path = "model.layers.1.mlp.experts.down_proj"
    get_lors_model(model, LoRSConfig(r=3, rank_pattern={"down_proj": 9}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # 8 rows of a sketch for r = 2 do not hold 9 singular vectors.
    refused(ValueError, lambda: init_from_gradients(model, gradients), f"'{path}'", "[4, 8, 48]", "[4, 32, 48]")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_names_the_stack():
    model = experts_model("mixtral")
    config = LoRSConfig(r=1, target_parameters=["experts.down_proj"])

    def bad(model, ids):
        return _Infinite.apply(loss_of(model, ids))

    refused(
        ValueError,
        lambda: estimate_gradients(model, BATCHES, loss_fn=bad, config=config),
        "experts.down_proj' has NaN or infinity in batch 0",
    )


class _Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf
