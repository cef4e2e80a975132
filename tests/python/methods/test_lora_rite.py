# SPDX-License-Identifier: Apache-2.0
"""LoRA-RITE: the library's steps are the definition's, do not see how an update is factored, and lower the loss."""

from __future__ import annotations

import copy
import itertools
import sys

import pytest
import torch
from method_runs import net, step
from torch import nn
from torch.nn.utils import parametrize

from lors_cuda import LoRSConfig, get_lors_model
from lors_cuda.methods import LoRARITE, get_method, reference
from models import prune_two_of_four, refused, tiny_llama

pytest.importorskip("pytorch_optimizer")


def rite_run(name, start, optimizer_of, gradient, steps=50):
    """B A after training a pair that begins as R A and B R^-1."""
    model = net(r=4, gradient=gradient, init_lora_weights=False)
    layer = model[0]
    with torch.no_grad():
        layer.lora_B.copy_(layer.lora_B @ torch.linalg.inv(start))
        layer.lora_A.copy_(start @ layer.lora_A)
    run = get_method(name).start(model)
    optimizer = optimizer_of(run)
    for number in range(steps):
        step(model, run, optimizer, number)
    return (layer.lora_B @ layer.lora_A).detach()


@pytest.mark.parametrize("gradient", ["lors", "exact"])
def test_lora_rite_does_not_see_the_factoring_and_adamw_does(gradient):
    pytest.importorskip("pytorch_optimizer")
    plain = torch.eye(4, dtype=torch.float64)
    drawn = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    other = drawn @ torch.diag(torch.tensor([30.0, 1.0, 1.0, 0.1], dtype=torch.float64))

    def distance(name):
        ours, theirs = (rite_run(name, start, lambda run: run.optimizer(1e-2), gradient) for start in (plain, other))
        return float((ours - theirs).norm() / ours.norm())

    assert distance("lora-rite") < 1e-8
    assert distance("lors") > 0.1


def test_a_large_gradient_is_not_dropped():
    pytest.importorskip("pytorch_optimizer")
    model = net(init_lora_weights=False)
    run = get_method("lora-rite").start(model)
    optimizer = run.optimizer(1e-2)
    before = model[0].lora_A.detach().clone()
    for p in run.pairs[0].trained():
        p.grad = 100 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
    optimizer.step()
    assert not torch.equal(model[0].lora_A, before)


def test_lora_rite_refuses_what_its_library_would_pair_wrongly(monkeypatch):
    pytest.importorskip("pytorch_optimizer")
    model = get_lors_model(tiny_llama(), LoRSConfig(r=4, modules_to_save=["norm"]))
    refused(ValueError, lambda: get_method("lora-rite").start(model).optimizer(1e-3), "adapters alone", "norm")
    refused(ValueError, lambda: get_method("lora-rite+lora-mini"), "pass by what 'lora-mini' does", "leave one")
    run = get_method("lora-rite").start(net())
    parametrize.register_parametrization(run.pairs[0].layer, "lora_A", nn.Tanh())
    refused(ValueError, lambda: run.optimizer(1e-3), "plain factors", "another method")
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    run = get_method("lora-rite").start(net())
    refused(ModuleNotFoundError, lambda: run.optimizer(1e-3), "pip install 'pytorch_optimizer>=4.1,<5'")


OPTIONS = [{}, {"escape": False}, {"clip": 0.0}, {"clip": 1e-3}, {"betas": (0.5, 0.8)}, {"betas": (0.0, 0.0)}]


def two_layers(init_lora_weights=False, gradient="exact"):
    torch.manual_seed(3)
    layers = [nn.Linear(20, 16, dtype=torch.float64), nn.Tanh(), nn.Linear(16, 12, dtype=torch.float64)]
    model = nn.Sequential(*layers)
    prune_two_of_four(model)
    return get_lors_model(model, LoRSConfig(r=4, lora_alpha=9, gradient=gradient, init_lora_weights=init_lora_weights))


def gradients_of(model, run, number):
    x = torch.randn(32, 20, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss.item(), [(pair["lora_A"].grad.clone(), pair["lora_B"].grad.clone()) for pair in run.pairs]


def pairs_of(run):
    return [(pair["lora_A"].detach().clone(), pair["lora_B"].detach().clone()) for pair in run.pairs]


@pytest.mark.parametrize("start", [False, True], ids=["filled", "B = 0"])
@pytest.mark.parametrize(
    "options",
    [{}, {"escape": False}, {"clip": 0.0}, {"clip": 1e-3}, {"betas": (0.5, 0.8)}, {"betas": (0.0, 0.0)}],
    ids=str,
)
def test_steps_are_the_definition_in_another_basis(start, options):
    model = two_layers(start)
    run = LoRARITE(**options).start(model)
    optimizer, memory, wanted = run.optimizer(1e-2), None, pairs_of(run)
    for number in range(12):
        _, gradients = gradients_of(model, run, number)
        wanted, memory = reference.lora_rite_step(wanted, gradients, memory, step=number, lr=1e-2, **options)
        optimizer.step()
        for (A, B), (A_wanted, B_wanted) in zip(pairs_of(run), wanted, strict=True):
            torch.testing.assert_close(A, A_wanted, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(B, B_wanted, rtol=1e-6, atol=1e-8)
    if start:
        assert all(bool(B.any()) for _, B in pairs_of(run))


def test_the_definition_does_not_see_the_factoring():
    drawn = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    R = random(4, 4) @ torch.diag(torch.tensor([30.0, 1.0, 1.0, 0.1], dtype=torch.float64))
    A, B, target = random(4, 20), random(24, 4), random(24, 20)
    products = []
    for start in (torch.eye(4, dtype=torch.float64), R):
        pairs, memory = [(start @ A, B @ torch.linalg.inv(start))], None
        for number in range(50):
            ((lora_A, lora_B),) = pairs
            G = lora_B @ lora_A - target
            pairs, memory = reference.lora_rite_step(
                pairs, [(lora_B.T @ G, G @ lora_A.T)], memory, step=number, lr=1e-2
            )  # fmt: skip
        products.append(pairs[0][1] @ pairs[0][0])
    assert float((products[0] - products[1]).norm() / products[0].norm()) < 1e-8
    assert float((products[0] - B @ A).norm() / products[0].norm()) > 0.1


def test_without_momentum_a_small_step_never_raises_the_loss():
    model = two_layers()
    run = LoRARITE(betas=(0.0, 0.999)).start(model)
    optimizer = run.optimizer(1e-4)
    losses = []
    for _ in range(60):
        losses.append(gradients_of(model, run, 0)[0])
        optimizer.step()
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_the_first_step_from_zero_moves_lora_b_alone():
    model = two_layers(True)
    run = LoRARITE().start(model)
    optimizer, before = run.optimizer(1e-2), pairs_of(run)
    gradients_of(model, run, 0)
    optimizer.step()
    for (A, B), (A_before, _) in zip(pairs_of(run), before, strict=True):
        assert torch.equal(A, A_before)
        assert bool(B.any())


def test_a_resumed_optimizer_goes_on_bit_for_bit():
    model = two_layers()
    run = LoRARITE().start(model)
    optimizer = run.optimizer(1e-2)
    for number in range(5):
        gradients_of(model, run, number)
        optimizer.step()
    state, kept = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(run.state_dict())
    other = two_layers()
    again = LoRARITE().start(other)
    again.load_state_dict(kept)
    resumed = again.optimizer(1e-2)
    resumed.load_state_dict(state)
    for number in range(5, 9):
        for each, its_run, moves in ((model, run, optimizer), (other, again, resumed)):
            gradients_of(each, its_run, number)
            moves.step()
    for one, two in zip(pairs_of(run), pairs_of(again), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
