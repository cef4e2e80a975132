# SPDX-License-Identifier: Apache-2.0
"""GeoLoRA: the basis step from one backward, orthonormal bases, exact truncation, descent, and the rank it finds."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from method_runs import made, net, step, train
from torch import nn

from lors_cuda import LoRSConfig, get_lors_model, load_adapter, save_adapter
from lors_cuda.methods import GeoLoRA, get_method, reference
from lors_cuda.methods.geolora import augmented, truncated
from models import refused, tiny_llama

N, K = 24, 20


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(r=4, seed=0, **fields):
    model = net((N, K), r=r, lora_alpha=2 * r)
    run = GeoLoRA(**{"min_rank": 2, **fields}).start(model, seed=seed)
    return model, run


def mask_of(model):
    return model[0].sparse_weight.mask()


@pytest.mark.parametrize("empty", [False, True], ids=["S", "S = 0"])
def test_a_basis_step_is_the_definition_from_one_backward(empty):
    model, run = started(cycle=1)
    optimizer = run.optimizer(lr=0.0 if empty else 0.05)
    x = random(9, K, seed=1)
    step(model, run, optimizer)  # moves S, and then writes the pair of a basis step
    pair, (state,) = run.pairs[0], optimizer.state.values()
    U, S, V = state["U"].clone(), state["S"].clone(), pair["lora_A"][:4].T.detach().clone()
    assert (pair.r, bool(S.any())) == (8, not empty)
    torch.testing.assert_close(pair["lora_B"] @ pair["lora_A"], U @ S @ V.T, rtol=0, atol=1e-14)
    weight = model[0].merged_dense().detach().requires_grad_()
    (x @ weight.T).sin().sum().backward()
    G = torch.where(mask_of(model), weight.grad, 0.0)
    optimizer.zero_grad()
    model(x).sin().sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.03
    optimizer.step()
    U2, S2, V2 = reference.geolora_basis_step(U, S, V, G, 0.03, model[0].scaling)
    torch.testing.assert_close(state["U"] @ state["S"] @ pair["lora_A"].detach(), U2 @ S2 @ V2.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(pair["lora_B"] @ pair["lora_A"], U2 @ S2 @ V2.T, rtol=0, atol=1e-12)


def test_steps_between_are_adam_on_s():
    model, run = started(cycle=50)
    layer, stored = model[0], model[0].sparse_weight
    optimizer = run.optimizer(lr=0.05)
    x = random(9, K, seed=1)
    S = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([S], lr=0.05)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).sin().sum().backward()
        optimizer.step()
        (state,) = optimizer.state.values()
        V = run.pairs[0]["lora_A"].T.detach()
        update = torch.where(stored.mask(), layer.scaling * state["U"] @ S @ V.T, 0.0)
        adam.zero_grad()
        (x @ (stored.to_dense() + update).T).sin().sum().backward()
        adam.step()
        torch.testing.assert_close(state["S"], S.detach(), rtol=0, atol=1e-10)


def test_a_truncation_begins_adam_anew_also_where_it_keeps_the_rank():
    model, run = started(cycle=4, tolerance=0.0, max_rank=4)
    optimizer = run.optimizer(lr=0.05)
    for number in range(9):  # the truncations come after steps 8 and 13
        step(model, run, optimizer, number)
    (state,) = optimizer.state.values()
    assert (state["S"].shape, state["moved"]) == ((4, 4), 0)
    assert not state["first"].any()
    assert not state["second"].any()


def test_bases_stay_orthonormal_and_the_base_untouched():
    model, run = started(cycle=5, tolerance=0.05, max_rank=8)
    optimizer = run.optimizer(lr=0.02)
    for number in range(200):
        step(model, run, optimizer, number)
        (state,) = optimizer.state.values()
        r = len(state["S"])
        for basis in (state["U"], run.pairs[0]["lora_A"][:r].T.detach()):
            torch.testing.assert_close(basis.T @ basis, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-12)
        product = state["U"] @ state["S"] @ run.pairs[0]["lora_A"][:r].detach()
        torch.testing.assert_close(run.pairs[0]["lora_B"] @ run.pairs[0]["lora_A"], product, rtol=0, atol=1e-12)


def test_a_truncation_drops_the_tail_and_nothing_else():
    U, V, S = torch.linalg.qr(random(N, 8)).Q, torch.linalg.qr(random(K, 8, seed=1)).Q, random(8, 8, seed=2)
    sigma = torch.linalg.svdvals(S)
    for tolerance in (0.0, 0.1, 0.3, 0.6):
        P, D, Q = truncated(U, S, V, tolerance, 2, 8)
        error = (P @ D @ Q.T - U @ S @ V.T).norm()
        tail = sigma[len(D) :].norm()
        assert float(error) == pytest.approx(float(tail), abs=1e-12)
        assert float(tail) < max(tolerance * float(sigma.norm()), 1e-12)
        if len(D) > 2:  # one less would have been too few
            assert float(sigma[len(D) - 1 :].norm()) >= tolerance * float(sigma.norm())
    assert len(truncated(U, S, V, 0.0, 2, 5)[1]) == 5
    assert len(truncated(U, torch.zeros_like(S), V, 0.1, 3, 8)[1]) == 3


def target(mask, rank, seed=3):
    """An update of a rank, singular values 3 to 1, and the gradient of half its squared masked distance."""
    P, Q = torch.linalg.qr(random(N, rank, seed=seed)).Q, torch.linalg.qr(random(K, rank, seed=seed + 1)).Q
    wanted = P @ torch.diag(torch.linspace(3, 1, rank, dtype=torch.float64)) @ Q.T
    return wanted, lambda update: torch.where(mask, update - wanted, 0.0)


@pytest.mark.parametrize("r", [2, 4, 8])
def test_basis_steps_and_truncations_descend_on_a_masked_quadratic(r):
    mask = random(N, K, seed=9) > 0
    _, residual = target(mask, 5)
    U, V = torch.linalg.qr(random(N, r)).Q, torch.linalg.qr(random(K, r, seed=1)).Q
    S = torch.zeros(r, r, dtype=torch.float64)
    losses = []
    for _ in range(100):
        G = residual(U @ S @ V.T)
        losses.append(float(G.square().sum()) / 2)
        U, S, V = augmented(U, S, V, G @ V, G.T @ U, 0.2)
        U, S, V = truncated(U, S, V, 1e-3, 2, 10)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.05 * losses[0]


class Quadratic(nn.Module):
    """A layer whose input is the identity, so that its output is its merged weight."""

    def __init__(self, rows, columns):
        super().__init__()
        self.layer = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(torch.where(random(rows, columns, seed=9) > 0, 1.0, 0.0))

    def forward(self):
        return self.layer(torch.eye(self.layer.in_features, dtype=torch.float64)).T


@pytest.mark.parametrize("r", [4, 8, 16])
def test_the_rank_of_the_target_is_found_from_any_start(r):
    model = get_lors_model(Quadratic(40, 56), LoRSConfig(r=r, lora_alpha=r, gradient="exact"))
    stored = model.layer.sparse_weight
    P, Q = torch.linalg.qr(random(40, 5, seed=3)).Q, torch.linalg.qr(random(56, 5, seed=4)).Q
    wanted = P @ torch.diag(torch.linspace(3, 1, 5, dtype=torch.float64)) @ Q.T
    goal = stored.to_dense() + torch.where(stored.mask(), wanted, 0.0)
    run = GeoLoRA(tolerance=0.15, cycle=1, max_rank=20, basis_lr=0.2).start(model, steps=400)
    optimizer = run.optimizer(lr=1e-4)
    losses = []
    for _ in range(400):
        optimizer.zero_grad()
        loss = (model() - goal).square().sum() / 2
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 1e-3 * losses[0]
    run.finish()
    assert model.layer.r == 5


def test_the_basis_rate_follows_the_schedule():
    _, run = started(cycle=1, basis_lr=0.5)
    optimizer = run.optimizer(lr=0.1)
    assert optimizer.param_groups[0]["basis_share"] == pytest.approx(5.0)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("at", [3, 4, 6], ids=["before a basis step", "after it", "after a truncation"])
def test_a_resumed_cycle_goes_on_bit_for_bit(tmp_path, at):
    model, run = made("geolora")
    optimizer = run.optimizer(lr=1e-2)
    train(model, run, at, optimizer=optimizer)
    save_adapter(model, tmp_path)
    moments = copy.deepcopy(optimizer.state_dict())
    rest = train(model, run, 7, first=at, optimizer=optimizer)
    again, other = made("geolora")
    load_adapter(again, tmp_path)
    refused(ValueError, lambda: train(again, other, 1, first=at), "the optimizer's state", "load_state_dict")
    again, other = made("geolora")
    load_adapter(again, tmp_path)
    resumed = other.optimizer(lr=1e-2)
    resumed.load_state_dict(moments)
    assert train(again, other, 7, first=at, optimizer=resumed) == rest
    assert [pair.r for pair in other.pairs] == [pair.r for pair in run.pairs]


def test_ranks_differ_and_are_written(tmp_path):
    model, run = made("geolora")
    train(model, run, 14)
    run.finish()
    ranks = [pair.layer.r for pair in run.pairs]
    assert len(set(ranks)) > 1
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_llama(), tmp_path)
    assert [module.r for module in again.modules() if hasattr(module, "lora_alpha")] == ranks


def test_refusals():
    refused(ValueError, lambda: GeoLoRA(min_rank=8).start(net((12, 20), r=2)), "room for rank 12", "lower min_rank")
    model = get_lors_model(tiny_llama(), LoRSConfig(r=4, modules_to_save=["norm"]))
    refused(ValueError, lambda: get_method("geolora").start(model).optimizer(1e-3), "adapters alone", "norm")
    refused(ValueError, lambda: get_method("geolora+lora-rite"), "both fill the place 'optimizer'")
    refused(ValueError, lambda: get_method("geolora+sora"), "both fill the place 'parametrisation'")
    model, run = started()
    other = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    refused(ValueError, lambda: run.attach(other), "an optimizer of its own", "run.optimizer(lr)")
