# SPDX-License-Identifier: Apache-2.0
"""estimate_gradients: the mean gradient, the memory it takes, and the model left as it was."""

from __future__ import annotations

import copy
import math
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn

from lors_cuda.config import LoRSConfig
from lors_cuda.gradient_init import estimate_gradients
from lors_cuda.model import get_lors_model
from models import assert_unchanged, batch, refused, snapshot, tiny_llama, tiny_net

Q_PROJ = "model.layers.0.self_attn.q_proj"


def regression_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def regression_batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 8, generator=generator), torch.randn(5, 12, generator=generator)) for _ in range(count)]


def oracle(model: nn.Module, batches: list, loss_fn=lambda model, batch: model(**batch).loss) -> dict[str, Tensor]:
    """The mean gradient of every linear except the head, by autograd on a float64 copy."""
    model = copy.deepcopy(model).double().eval()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    sums = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
    for item in batches:
        weights = [linear.weight for linear in linears.values()]
        for name, gradient in zip(linears, torch.autograd.grad(loss_fn(model, item), weights), strict=True):
            sums[name] += gradient
    return {name: total / len(batches) for name, total in sums.items()}


def assert_close_to_oracle(gradients: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert list(gradients) == list(expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert gradient.device.type == "cpu"
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def test_the_mean_gradient_of_a_llama():
    model = tiny_llama()
    batches = [batch(seed) for seed in range(3)]
    gradients = estimate_gradients(model, batches, progress=False)
    assert len(gradients) == 14
    assert_close_to_oracle(gradients, oracle(model, batches))
    assert (gradients[Q_PROJ][model.get_submodule(Q_PROJ).weight == 0] != 0).any(), "G is not masked"


def test_the_gradient_of_a_loss_function():
    net, batches = tiny_net(), regression_batches(4)
    expected = oracle(net, [(x.double(), y.double()) for x, y in batches], regression_loss)
    assert_close_to_oracle(estimate_gradients(net, batches, loss_fn=regression_loss), expected)


def test_a_bfloat16_model_is_accumulated_in_float32():
    model, batches = tiny_llama(dtype=torch.bfloat16), [batch(seed) for seed in range(8)]
    single = [estimate_gradients(model, [item]) for item in batches]
    together = estimate_gradients(model, batches)
    for name, gradient in together.items():
        mean = torch.stack([one[name] for one in single]).double().mean(0)
        torch.testing.assert_close(gradient.double(), mean, rtol=1e-5, atol=1e-9)
        assert not torch.equal(gradient, gradient.bfloat16().float()), "rounded to bfloat16 on the way"


def test_no_more_batches_are_drawn_than_steps():
    net, batches = tiny_net(), regression_batches(6)
    drawn = iter(batches)
    estimate = estimate_gradients(net, drawn, steps=4, loss_fn=regression_loss)
    assert len(list(drawn)) == 2
    again = estimate_gradients(net, batches[:4], steps=100, loss_fn=regression_loss)  # fewer than steps: all of them
    assert all(torch.equal(estimate[name], again[name]) for name in estimate)


def test_config_chooses_the_targets():
    gradients = estimate_gradients(tiny_llama(), [batch()], config=LoRSConfig(target_modules=["q_proj"]))
    assert list(gradients) == [Q_PROJ, "model.layers.1.self_attn.q_proj"]


def test_a_weight_that_no_batch_reaches_has_a_zero_gradient():
    net = nn.ModuleDict({"used": nn.Linear(8, 12), "unused": nn.Linear(8, 12)})
    gradients = estimate_gradients(
        net, regression_batches(2), loss_fn=lambda model, item: regression_loss(model["used"], item)
    )
    assert gradients["used"].any()
    assert not gradients["unused"].any()


def test_a_shared_linear_gets_the_sum_of_its_uses():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 12))
    batches = regression_batches(2)
    expected = oracle(net, [(x.double(), y.double()) for x, y in batches], regression_loss)
    assert list(expected) == ["0", "3"]
    assert_close_to_oracle(estimate_gradients(net, batches, loss_fn=regression_loss), expected)


def test_dropout_is_off_and_the_random_state_untouched():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 12)).train()
    expected = oracle(net, [(x.double(), y.double()) for x, y in regression_batches(2)], regression_loss)
    state = torch.get_rng_state()
    assert_close_to_oracle(estimate_gradients(net, regression_batches(2), loss_fn=regression_loss), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = tiny_llama().train()
    model.model.layers[0].mlp.eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    model(**batch(7)).loss.backward()
    before = snapshot(model)
    gradients = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    assert gradients[f"{Q_PROJ}.weight"][0] is not None

    def loss_fn(model: nn.Module, item: dict[str, Tensor]) -> Tensor:
        assert not any(module.training for module in model.modules())
        if fails and loss_fn.calls == 1:
            raise KeyError("in the second batch")
        loss_fn.calls += 1
        return model(**item).loss

    loss_fn.calls = 0
    if fails:
        refused(KeyError, lambda: estimate_gradients(model, [batch(), batch(1)], loss_fn=loss_fn), "second batch")
    else:
        estimate_gradients(model, [batch(), batch(1)], loss_fn=loss_fn)
    assert_unchanged(model, before)
    for name, parameter in model.named_parameters():
        original, values = gradients[name]
        assert parameter.grad is original, name
        assert original is None or torch.equal(original, values)
        assert not parameter._post_accumulate_grad_hooks, "a hook was left behind"


def test_one_gradient_is_alive_at_a_time():
    model = tiny_llama()
    alive: weakref.WeakSet = weakref.WeakSet()
    most, seen = 0, 0

    def count(weight: Tensor) -> None:
        nonlocal most, seen
        alive.add(weight.grad)
        most, seen = max(most, len(alive)), seen + 1

    # Registered first, so that it sees each gradient before estimate_gradients frees it.
    targets = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    handles = [weight.register_post_accumulate_grad_hook(count) for weight in targets]
    model(**batch()).loss.backward()
    assert most == 14, "without estimate_gradients all gradients live together, so this test can fail"
    model.zero_grad(set_to_none=True)
    assert len(alive) == 0
    most = seen = 0
    estimate_gradients(model, [batch(), batch(1)])
    assert (most, seen) == (1, 28)
    for handle in handles:
        handle.remove()


def test_nothing_but_targets_gets_a_gradient():
    model = tiny_llama()
    required = []

    def loss_fn(model: nn.Module, item: dict[str, Tensor]) -> Tensor:
        required.append([name for name, parameter in model.named_parameters() if parameter.requires_grad])
        return model(**item).loss

    config = LoRSConfig(target_modules=["down_proj"])
    estimate_gradients(model, [batch()], loss_fn=loss_fn, config=config)
    assert required == [[f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_names_the_module(value):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * value

    def loss_fn(net: nn.Module, item: tuple[Tensor, Tensor]) -> Tensor:
        hidden = net[0](item[0])
        hidden = Poison.apply(hidden) if item is batches[1] else hidden
        return ((net[2](net[1](hidden)) - item[1]) ** 2).mean()

    net, batches = tiny_net(), regression_batches(3)
    refused(ValueError, lambda: estimate_gradients(net, batches, loss_fn=loss_fn), "weight of '0'", "in batch 1")


@pytest.mark.parametrize(
    ("call", "exception", "fragments"),
    [
        (lambda: estimate_gradients(tiny_net(), []), ValueError, ("batches is empty",)),
        (lambda: estimate_gradients(tiny_net(), iter([])), ValueError, ("batches is empty",)),
        (lambda: estimate_gradients(tiny_net(), 3), TypeError, ("batches must be an iterable", "int")),
        (lambda: estimate_gradients(tiny_net(), [], steps=0), ValueError, ("steps must be at least 1, but is 0",)),
        (lambda: estimate_gradients(tiny_net(), [], steps=1.5), TypeError, ("steps must be an integer",)),
        (lambda: estimate_gradients(None, []), TypeError, ("torch.nn.Module",)),
        (lambda: estimate_gradients(tiny_net(), [(1, 2)]), TypeError, ("batch 0 is tuple", "loss_fn")),
        (
            lambda: estimate_gradients(tiny_net(), [1], loss_fn=lambda model, item: torch.ones(2)),
            ValueError,
            ("must be a scalar, but has shape [2]",),
        ),
        (lambda: estimate_gradients(tiny_net(), [1], loss_fn=lambda model, item: 1.0), TypeError, ("is float",)),
        (
            lambda: estimate_gradients(tiny_net(), [1], loss_fn=lambda model, item: torch.ones(())),
            ValueError,
            ("depends on no target weight",),
        ),
        (
            lambda: estimate_gradients(tiny_net(), [1], loss_fn=lambda model, item: model[0].weight.sum() * math.nan),
            ValueError,
            ("The loss of batch 0 is nan",),
        ),
        (
            lambda: estimate_gradients(tiny_llama(), [{"input_ids": batch()["input_ids"]}]),
            ValueError,
            ("no loss for batch 0", "'labels'"),
        ),
        (
            lambda: estimate_gradients(tiny_net(), [1], config=LoRSConfig(target_modules=["x"])),
            ValueError,
            ("matches no nn.Linear",),
        ),
        (
            lambda: estimate_gradients(get_lors_model(tiny_net(), LoRSConfig(r=2)), [1]),
            ValueError,
            ("already has LoRS layers",),
        ),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(call, exception, fragments):
    assert refused(exception, call, *fragments).endswith(".")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_bar_shows_on_a_terminal_only(monkeypatch, terminal):
    tqdm = pytest.importorskip("tqdm")
    shown = []
    monkeypatch.setattr(tqdm, "tqdm", lambda items, **options: shown.append(options["total"]) or items)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    estimate_gradients(tiny_net(), regression_batches(3), loss_fn=regression_loss)
    estimate_gradients(tiny_net(), iter(regression_batches(3)), loss_fn=regression_loss, steps=2)
    estimate_gradients(tiny_net(), regression_batches(3), loss_fn=regression_loss, progress=False)
    assert shown == ([3, 2] if terminal else [])
