# SPDX-License-Identifier: Apache-2.0
"""The mathematics of each method, in float64 where it can be: definitions, invariances, published values."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from method_runs import net, step
from torch import nn

from lors_cuda import LoRSConfig, estimate_gradients, get_lors_model, named_lors_layers
from lors_cuda.methods import GeLoRA, LoRAMini, MoRA, RMLoRA, SoRA, get_method, reference
from lors_cuda.methods.gelora import block_ranks, intrinsic_dimensions, two_nn
from lors_cuda.methods.rm_lora import orthogonality_gradient
from models import batch, fill_adapters, prune_two_of_four, refused, tiny_llama, tiny_net

# ---- every method: the derivative ----


@pytest.mark.parametrize("name", ["sp-lora", "sora", "lora-mini", "mora", "xgblora", "geolora"])
def test_exact_gradients_are_the_derivative(name):
    model = net(r=1 if name == "xgblora" else 6)
    run = get_method(name).start(model)
    fill = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    with torch.no_grad():
        for p in trained:
            p.copy_(torch.randn(p.shape, generator=fill, dtype=p.dtype) / 3)
    x = torch.randn(7, 20, generator=fill, dtype=torch.float64)

    def loss():
        return model(x).sin().sum()

    loss().backward()
    for p in trained:
        direction = torch.randn(p.shape, generator=fill, dtype=p.dtype)
        slope, size = float((p.grad * direction).sum()), 1e-5
        with torch.no_grad():
            p += size * direction
            above = loss()
            p -= 2 * size * direction
            below = loss()
            p += size * direction
        assert float(above - below) / (2 * size) == pytest.approx(slope, rel=1e-6, abs=1e-6)
    run.finish()


# ---- SoRA ----


def test_sora_shrinks_by_the_proximal_operator():
    model = net()
    run = SoRA(threshold=0.3).start(model)
    gate = run.pairs[0].parametrisation("lora_A").gate
    before = torch.tensor([-2.0, -0.45, -0.1, 0.2, 0.59, 1.5], dtype=torch.float64).reshape(6, 1)
    with torch.no_grad():
        gate.copy_(before)
    run.attach(torch.optim.SGD(run.pairs[0].trained(), lr=0.0))
    run.step = 0
    with torch.no_grad():
        run.method.after_step(run)
    # argmin_z (z - v)^2 / 2 + xi |z| by a search; the authors' code zeroes -0.45 and 0.59 as well.
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for value, shrunk in zip(before.flatten(), gate.flatten(), strict=True):
        best = grid[(0.5 * (grid - value).square() + 0.3 * grid.abs()).argmin()]
        assert float(shrunk) == pytest.approx(float(best), abs=2e-4)
    torch.testing.assert_close(gate, reference.sora_prox(before, 0.3), rtol=0, atol=1e-15)
    assert gate.flatten()[[1, 4]].all()


def test_sora_s_threshold_follows_the_learning_rate_and_the_stages():
    model = net()
    run = SoRA(threshold=0.1, final_threshold=0.5, stages=3).start(model, steps=9)
    gate = run.pairs[0].parametrisation("lora_A").gate
    optimizer = run.attach(torch.optim.SGD(run.pairs[0].trained(), lr=1e-30))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 if n < 4 else 0.5)
    for number in range(9):
        with torch.no_grad():
            gate.fill_(2.0)
        step(model, run, optimizer, number)
        expected = (0.1, 0.3, 0.5)[number // 3] * (1.0 if number < 4 else 0.5)
        assert float(2 - gate[0]) == pytest.approx(expected, rel=1e-9)
        schedule.step()


def test_sora_drops_the_rows_of_zero_gates_at_the_same_scaling():
    model = net(r=5)
    run = SoRA(threshold=0.0).start(model)
    layer = model[0]
    fill_adapters(model)
    with torch.no_grad():
        run.pairs[0].stored("lora_A").normal_()
        run.pairs[0].parametrisation("lora_A").gate[[1, 3]] = 0
    dense, scaling = layer.merged_dense(), layer.scaling
    gate = run.pairs[0].parametrisation("lora_A").gate.flatten()
    update = reference.sora_update(run.pairs[0].stored("lora_A"), layer.lora_B, gate, scaling)
    stored = layer.sparse_weight
    wanted = stored.to_dense() + torch.where(stored.mask(), update, 0.0)
    torch.testing.assert_close(dense, wanted, rtol=1e-13, atol=1e-13)
    run.finish()
    assert (layer.r, tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)) == (3, (3, 20), (24, 3))
    assert layer.scaling == pytest.approx(scaling, rel=1e-15)
    torch.testing.assert_close(layer.merged_dense(), dense, rtol=1e-13, atol=1e-13)


def test_sora_without_any_gate_keeps_one_row_that_does_nothing():
    model = net(init_lora_weights=False)
    run = SoRA(threshold=0.0).start(model)
    with torch.no_grad():
        run.pairs[0].parametrisation("lora_A").gate.zero_()
    run.finish()
    assert model[0].r == 1
    assert torch.equal(model[0].merged_dense(), model[0].sparse_weight.to_dense())


def test_weight_decay_does_not_touch_gates():
    model = net()
    run = SoRA(threshold=0.0).start(model)
    gate = run.pairs[0].parametrisation("lora_A").gate
    optimizer = run.optimizer(lr=1e-1, weight_decay=0.5)
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decayed[id(gate)] == 0
    assert decayed[id(run.pairs[0].stored("lora_A"))] == 0.5


# ---- RM-LoRA ----


@pytest.mark.parametrize("shape", [(3, 11), (1, 4), (5, 5)])
def test_the_penalty_s_gradient_is_autograd_s(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    (rows @ rows.T - torch.eye(shape[0], dtype=torch.float64)).norm().backward()
    torch.testing.assert_close(orthogonality_gradient(rows.detach()), rows.grad, rtol=1e-12, atol=1e-12)
    orthonormal = torch.eye(*shape, dtype=torch.float64)
    assert torch.equal(orthogonality_gradient(orthonormal), torch.zeros(shape, dtype=torch.float64))


def test_rm_lora_adds_the_penalty_of_the_whole_model():
    torch.manual_seed(0)
    model = get_lors_model(tiny_net(dtype=torch.float64), LoRSConfig(r=3, init_lora_weights=False))
    run = RMLoRA(penalty=0.7).start(model)
    pairs = [(layer.lora_A, layer.lora_B) for _, layer in named_lors_layers(model)]
    penalty = 0.7 * reference.rm_lora_penalty(pairs)
    wanted = torch.autograd.grad(penalty, [p for p in model.parameters() if p.requires_grad])
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with torch.no_grad():
        run.method.before_step(run)
    for p, gradient in zip([p for p in model.parameters() if p.requires_grad], wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-14)


def test_directions_that_rest_stay_bit_for_bit_under_momentum_and_decay():
    model = net(init_lora_weights=False)
    run = RMLoRA(penalty=0.1, active=2, interval=3).start(model)
    optimizer = run.optimizer(lr=1e-1, weight_decay=0.3)
    pair = run.pairs[0]
    chosen = set()
    for number in range(9):
        resting = run.method.resting(pair, run)
        before = pair["lora_A"].detach().clone(), pair["lora_B"].detach().clone()
        step(model, run, optimizer, number)
        moved = (pair["lora_A"] != before[0]).any(1), (pair["lora_B"] != before[1]).any(0)
        for each in moved:
            assert not each[resting].any()
            assert int(each.sum()) == 2
        chosen.add(tuple(resting.sort().values.tolist()))
    assert len(chosen) == 3  # one choice per interval


# ---- LoRA-Mini ----


def test_lora_mini_trains_r_a_plus_b_numbers_and_starts_alive():
    model = net(r=4)
    run = LoRAMini(a=7, b=5).start(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (7 + 5)
    pair = run.pairs[0]
    aux, A_aux = pair.parametrisation("lora_B").left, pair.parametrisation("lora_A").right
    layer, stored = model[0], model[0].sparse_weight
    with torch.no_grad():
        pair.stored("lora_B").normal_()
    update = reference.lora_mini_update(pair.stored("lora_A"), A_aux, aux, pair.stored("lora_B"), layer.scaling)
    wanted = stored.to_dense() + torch.where(stored.mask(), update, 0.0)
    torch.testing.assert_close(layer.merged_dense(), wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        pair.stored("lora_B").zero_()
    torch.testing.assert_close(aux.T @ aux, torch.eye(5, dtype=aux.dtype), rtol=1e-6, atol=1e-6)
    step(model, run, torch.optim.SGD(run.pairs[0].trained(), lr=0.0))
    assert run.pairs[0].stored("lora_B").grad.any()


def test_lora_mini_takes_no_more_than_the_layer_has():
    model = net((8, 12), r=3)
    LoRAMini(a=40, b=40).start(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (12 + 8)


def random_input():
    return torch.randn(40, 20, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def test_lora_mini_from_gradients_spans_their_leading_directions():
    sparse = nn.Sequential(net()[0].to_linear())
    gradients = estimate_gradients(sparse, [random_input()], loss_fn=lambda m, x: m(x).sin().sum(), progress=False)
    model = get_lors_model(sparse, LoRSConfig(r=4, lora_alpha=4, gradient="exact"))
    run = LoRAMini(a=5, b=6, aux="gradient").start(model, gradients=gradients)
    U, _, Vh = torch.linalg.svd(gradients["0"].double())
    pair = run.pairs[0]
    for found, wanted in (
        (pair.parametrisation("lora_A").right, Vh[:5]),
        (pair.parametrisation("lora_B").left.T, U[:, :6].T),
    ):
        # Up to the signs of singular vectors: the same projection.
        torch.testing.assert_close(found.T @ found, (wanted.T @ wanted).to(found), rtol=0, atol=1e-4)
    other = get_lors_model(nn.Sequential(net()[0].to_linear()), LoRSConfig(r=4, lora_alpha=4, gradient="exact"))
    again = LoRAMini(a=5, b=6, aux="gradient").start(other, gradients={"0": torch.ones(24, 20)})
    again.load_state_dict(run.state_dict())  # with the vectors of the first
    assert all(torch.equal(pair[which], again.pairs[0][which]) for which in ("lora_A", "lora_B"))


def test_lora_mini_from_gradients_refuses_what_is_none():
    method = LoRAMini(aux="gradient")
    refused(ValueError, lambda: method.start(net()), "estimate_gradients", "start(model, gradients=...)")
    for gradients in ({}, {"0": torch.ones(3, 3)}, {"0": torch.full((24, 20), float("nan"))}):
        refused(ValueError, lambda g=gradients: method.start(net(), gradients=g), "for '0'", "same targets")
    run = method.start(net(), gradients={"0": torch.zeros(24, 20)})  # no direction leads: random ones
    assert run.pairs[0].parametrisation("lora_A").right.any()


# ---- MoRA ----


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (32, 12), (12, 32), (17, 36)])
@pytest.mark.parametrize("kind", ["sharing", "decoupling", "mixed-3", "mixed-4", "rotation"])
def test_mora_is_the_authors_operator_under_the_mask(shape, kind):
    N, K = shape
    model = net(shape, r=2, lora_alpha=3)
    run = MoRA(kind).start(model)
    q = min(round(math.sqrt((N + K) * 2)), N, K)
    q = q // 2 * 2 if kind == "rotation" else q
    (Q,) = run.pairs[0].trained()
    assert tuple(Q.shape) == (q, q)
    with torch.no_grad():
        Q.copy_(torch.randn(q, q, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    layer = model[0]
    update = reference.mora_update(Q.detach(), N, K, kind)
    rank = torch.linalg.matrix_rank(update)
    assert rank == q if kind != "rotation" else rank > q
    stored = layer.sparse_weight
    wanted = stored.to_dense() + torch.where(stored.mask(), update, 0.0)
    torch.testing.assert_close(layer.merged_dense(), wanted, rtol=1e-12, atol=1e-12)
    run.finish()
    assert layer.r == (q if kind != "rotation" else min(N, K, -(-K // q) * q))
    torch.testing.assert_close(layer.merged_dense(), wanted, rtol=1e-12, atol=1e-12)


# ---- GeLoRA ----


@pytest.mark.parametrize(("dimension", "value"), [(2, 1.926884), (5, 4.842295), (9, 7.637575)])
def test_two_nn_gives_scikit_dimension_s_values(dimension, value):
    drawn = numpy.random.default_rng(0)
    points = torch.from_numpy(drawn.random((1000, dimension)) @ drawn.standard_normal((dimension, 40)))
    assert two_nn(points) == pytest.approx(value, abs=1e-6)
    rotation = torch.linalg.qr(torch.from_numpy(drawn.standard_normal((40, 40)))).Q
    assert two_nn(1e-3 * points @ rotation) == pytest.approx(value, abs=1e-6)
    assert two_nn(torch.cat([points, points[:200]])) == pytest.approx(value, abs=1e-6)


def test_ranks_follow_the_growth_of_the_dimension():
    assert block_ranks([2.0, 5.0, 5.0, 3.0]) == [4, 1, 1]
    assert block_ranks([2.0, 5.0, 5.0, 3.0], 2.0) == [8, 2, 2]
    drawn = (20 * torch.rand(9, generator=torch.Generator().manual_seed(0))).tolist()
    assert block_ranks(drawn) == reference.gelora_ranks(drawn)
    points = torch.rand(150, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert two_nn(points, 0.2) == pytest.approx(reference.two_nn(points, 0.2), rel=1e-12)


class Planted(nn.Module):
    """Hidden states of dimensions 2, 5, 5, 3, and blocks with a linear each."""

    def __init__(self):
        super().__init__()
        drawn = torch.Generator().manual_seed(3)
        self.lift = [torch.randn(d, 16, generator=drawn, dtype=torch.float64) for d in (2, 5, 5, 3)]
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 16)}) for _ in range(3))
        prune_two_of_four(self)

    def forward(self, points, output_hidden_states):
        assert output_hidden_states
        states = [points[:, : lift.shape[0]] @ lift for lift in self.lift]
        return type("Output", (), {"hidden_states": [state.unsqueeze(1) for state in states]})


def test_gelora_s_ranks_of_planted_dimensions_keep_the_scaling():
    drawn = torch.Generator().manual_seed(4)
    batches = [{"points": torch.rand(100, 5, generator=drawn, dtype=torch.float64)} for _ in range(10)]
    model = Planted()
    found = intrinsic_dimensions(model, batches)
    assert found == pytest.approx([2, 5, 5, 3], abs=0.7)
    config = GeLoRA().configure(LoRSConfig(r=8, lora_alpha=4), model, batches)
    model = get_lors_model(model, config)
    layers = [layer for _, layer in named_lors_layers(model)]
    assert [layer.r for layer in layers] == [4, 1, 1]
    assert all(layer.scaling == pytest.approx(0.5) for layer in layers)


def test_gelora_needs_points():
    model, config = tiny_llama(), LoRSConfig()
    same = [batch(0)] * 100
    refused(ValueError, lambda: GeLoRA().configure(config, model, same), "2 distinct points", "at least 100")
    refused(ValueError, lambda: GeLoRA().configure(config), "configure(config, model, batches)")


# ---- options ----


@pytest.mark.parametrize(
    ("name", "options", "fragment"),
    [
        ("sora", {"threshold": -1.0}, "0 or more"),
        ("sora", {"stages": 2}, "belong together"),
        ("sora", {"gate_start": "zeros"}, "gate_start"),
        ("sora", {"stages": 0, "final_threshold": 1.0}, "at least 1"),
        ("rm-lora", {"penalty": float("nan")}, "0 or more"),
        ("rm-lora", {"active": 2}, "belong together"),
        ("rm-lora", {"active": 0, "interval": 5}, "at least 1"),
        ("lora-mini", {"a": 0}, "at least 1"),
        ("sora", {"threshold": "abc"}, "threshold is 'abc'"),
        ("sora", {"stages": 2.5, "final_threshold": 1.0}, "stages is 2.5"),
        ("rm-lora", {"penalty": None}, "penalty is None"),
        ("lora-rite", {"betas": 0.9}, "two numbers"),
        ("lora-rite", {"betas": [0.9, "x"]}, "two numbers"),
        ("gelora", {"multiplier": True}, "multiplier is True"),
        ("xgblora", {"layers": "half"}, "layers is 'half'"),
        ("geolora", {"basis_lr": [1]}, "basis_lr is [1]"),
        ("sherl", {"late": 1.0}, "late is 1.0"),
        ("mora", {"type": "spiral"}, "type"),
        ("lora-mini", {"aux": "zeros"}, "aux"),
        ("lora-rite", {"betas": [0.9]}, "two numbers"),
        ("lora-rite", {"clip": -1.0}, "0 or more"),
        ("gelora", {"pool": "first"}, "pool"),
        ("gelora", {"points": 10}, "at least 100"),
        ("gelora", {"multiplier": 0.0}, "more than 0"),
        ("gelora", {"discard": 1.0}, "less than 1"),
        ("xgblora", {"steps_per_booster": 0}, "at least 1"),
        ("xgblora", {"layers": 0.0}, "more than 0"),
        ("geolora", {"tolerance": 1.0}, "less than 1"),
        ("geolora", {"cycle": 0}, "at least 1"),
        ("geolora", {"min_rank": 8, "max_rank": 4}, "must not exceed"),
        ("geolora", {"basis_lr": 0.0}, "more than 0"),
    ],
)
def test_wrong_options_are_sentences(name, options, fragment):
    refused(ValueError, lambda: get_method(name, **options), fragment)


def test_stages_need_the_number_of_steps():
    refused(ValueError, lambda: SoRA(0.1, 0.2, 2).start(net()), "steps")


def test_a_combination_fills_the_places_of_its_parts():
    assert get_method("lora-mini+rm-lora").places() == ["parametrisation", "step controller"]
    assert get_method("lors+sp-lora").places() == []
    assert get_method("lora-mini+sp-lora").gradient == "exact"
    assert get_method("rm-lora+lora-mini").has_own_start
