# SPDX-License-Identifier: Apache-2.0
"""prefetch over streams without a GPU (fake_device): in any order that its events allow, the results are the same."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
import torch
from test_merge_cache import CHANGES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fake_device import FakeDevice
from lors_cuda import LoRSConfig, get_lors_model, merge_cache, named_lors_layers, prefetch
from models import prune_two_of_four

ORDERS = ["first", "last", 1]
WIDTHS = (24, 40, 32, 40, 16)  # of other sizes, and the widest twice


class Stack(nn.Module):
    """Linears in a row; `blocks` recomputes each half in backward, `order` calls them in another order."""

    blocks: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS))

    def half(self, x: Tensor, layers: slice) -> Tensor:
        for layer in self.layers[layers]:
            x = torch.tanh(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        for layers in (slice(0, 2), slice(2, 4)):
            if self.blocks is None or not torch.is_grad_enabled():
                x = self.half(x, layers)
            else:
                x = checkpoint(self.half, x, layers, use_reentrant=self.blocks, preserve_rng_state=False)
        return x


def model_of(layout: str = "2:4", dtype: torch.dtype = torch.float64, **config: object) -> Stack:
    return get_lors_model(
        prune_two_of_four(Stack().to(dtype)), LoRSConfig(r=3, layout=layout, init_lora_weights=False, **config)
    )


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(9, WIDTHS[0], generator=torch.Generator().manual_seed(1), dtype=dtype)


X = inputs()


def train(model: nn.Module, x: Tensor, steps: int = 3, accumulated: int = 2) -> list[Tensor]:
    """Outputs and gradients of a few steps, with an evaluation after each."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen = []
    for _ in range(steps):
        for _ in range(accumulated):
            x = x.detach().requires_grad_()
            output = model(x)
            output.square().mean().backward()
            seen += [output.detach(), x.grad]
        seen += [p.grad for p in model.parameters() if p.requires_grad]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen.append(model(x))
    return seen


def ran(world: FakeDevice, what: Callable[[], list[Tensor]]) -> list[Tensor]:
    with world:
        results = what()
        world.synchronize()
    return [t.clone() for t in results]


def differing(actual: list[Tensor], expected: list[Tensor]) -> int:
    """How many tensors are not the same; bit for bit, because both multiply by a weight that was merged whole."""
    return sum(not torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.fixture
def world(monkeypatch):
    """Makes a FakeDevice that lors_cuda takes for CUDA."""

    def make(*args, **kwargs) -> FakeDevice:
        made = FakeDevice(*args, **kwargs)
        made.install(monkeypatch)
        return made

    return make


def prefetched(world: FakeDevice, model: nn.Module, what: Callable[[], list[Tensor]]) -> list[Tensor]:
    def inside() -> list[Tensor]:
        with prefetch(model):
            return what()

    return ran(world, inside)


def merges(world: FakeDevice) -> tuple[int, int, int]:
    """How many were queued on the second stream; how many calls used one; how many merged for themselves."""
    side = world.streams[len(world.devices) :]
    ahead = sum(name == "lors.merged_operand.default" and stream in side for stream, name, _ in world.log)
    place = {"lors.linear.default": 9, "lors.linear_backward.default": 13}
    calls = [(none, place[name]) for _, name, none in world.log if name in place]
    alone = [len(none) <= at or none[at] for none, at in calls]  # the dispatcher leaves out defaults
    return ahead, len(alone) - sum(alone), sum(alone)


def assert_same(
    world: FakeDevice, model: nn.Module, what: Callable[[nn.Module], list[Tensor]], reference: Callable = nullcontext
) -> None:
    other = copy.deepcopy(model)
    with reference(other):
        expected = what(other)
    actual = prefetched(world, model, lambda: what(model))
    assert differing(actual, expected) == 0
    assert merges(world)[1] > 0, "no merge was used"


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
@pytest.mark.parametrize("blocks", [None, False, True], ids=["saved", "checkpoint", "reentrant"])
@pytest.mark.parametrize("order", ORDERS)
def test_training_is_the_same(world, order, blocks, layout):
    model = model_of(layout)
    model.blocks = blocks
    device = world(order)
    assert_same(device, model, lambda model: train(model, X))
    assert device.races == []


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("broken", ["wait_event", "wait_stream"])
def test_without_one_of_its_waits_it_would_be_seen(world, broken, order):
    """The fake device sees a race in every order, and wrong results in the orders that are against it."""
    model = model_of()
    expected = train(copy.deepcopy(model), inputs())
    device = world(order, (broken,))
    wrong = differing(prefetched(device, model, lambda: train(model, X)), expected)
    assert device.races
    assert wrong > 0 or order != {"wait_event": "first", "wait_stream": "last"}[broken]


def test_each_layer_is_merged_ahead_once_its_place_is_known(world):
    model, device = model_of(), world()
    x = X.clone().requires_grad_()

    def step() -> list[Tensor]:
        model(x).sum().backward()
        return []

    assert merges(device) == (0, 0, 0)
    with prefetch(model):
        ran(device, step)
        assert merges(device) == (0, 0, 8)
        ran(device, step)  # what follows the last backward was not known yet
        assert merges(device) == (8, 7, 9)
        for _ in range(3):
            ran(device, step)
    assert merges(device) == (8 + 3 * 8, 7 + 3 * 8, 9)


@pytest.mark.parametrize("blocks", [False, True], ids=["checkpoint", "reentrant"])
def test_recomputation_and_backward_have_an_order_each(world, blocks):
    model, device = model_of(), world()
    model.blocks = blocks
    x = X.clone().requires_grad_()

    def steps() -> list[Tensor]:
        for _ in range(2):
            model(x).sum().backward()
        return []

    with prefetch(model):
        ran(device, steps)
        _, used, alone = merges(device)
        ran(device, steps)
    assert merges(device)[1:] == (used + 24, alone)  # forward, recomputation and backward of four layers, twice


def test_two_merged_weights_of_memory(world):
    model, device = model_of(), world()
    prefetched(device, model, lambda: train(model, X))
    largest = 8 * max(a * b for a, b in itertools.pairwise(WIDTHS))
    assert largest < device.peak <= 2 * largest
    device.collect()
    assert not any(block.stream in device.streams[1:] for block in device.blocks.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_a_change_is_seen(world, order, change):
    """Between a merge that was queued and the call that would have used it."""

    def what(model: nn.Module) -> list[Tensor]:
        seen = []
        for _ in range(3):
            seen += [model(X).detach(), model(X).detach()]
            change(model, X)
        return [*seen, model(X).detach()]

    model = nn.Sequential(*model_of().layers)
    model[1].register_forward_pre_hook(lambda layer, args: (args[0] * 1.0,))
    assert_same(world(order), model, what)


@pytest.mark.parametrize("order", ORDERS)
def test_a_write_between_two_layers_is_waited_for_or_makes_it_stale(world, order):
    def what(model: nn.Module) -> list[Tensor]:
        seen = []
        for i in range(6):
            x = X
            for layer in model.layers:
                x = layer(x)
                with torch.no_grad():
                    model.layers[i % 4].lora_B.add_(0.1)
                    model.layers[(i + 1) % 4].lora_A.mul_(0.9)
            seen.append(x.detach())
        return seen

    assert_same(world(order), model_of(), what)


def test_what_a_merge_reads_is_given_to_nobody_else(world):
    """The adapters' memory, which is free when they are replaced, while a merge of them is still queued."""

    def what(model: nn.Module) -> list[Tensor]:
        seen = []
        for _ in range(4):
            seen += [model(X).detach(), model(X).detach()]
            for layer in model.layers:
                layer.lora_B.data = layer.lora_B.detach() * 2
        return seen

    device = world()
    assert_same(device, model_of(), what)
    assert device.races == []


def test_a_conversion_inside_the_block(world):
    def what(model: nn.Module) -> list[Tensor]:
        seen = [model(X).detach(), model(X).detach()]
        model.float()
        return [*seen, model(X.float()).detach(), model(X.float()).detach()]

    assert_same(world(), model_of(), what, merge_cache)


@pytest.mark.parametrize("order", ORDERS)
def test_layers_out_of_order_and_twice(world, order):
    def what(model: nn.Module) -> list[Tensor]:
        seen = []
        for places in ((0, 1, 2), (0, 1, 2), (2, 1, 0), (0, 1, 1, 2, 2), (1,), (0, 1, 2), (0, 1, 2)):
            x = Y
            for place in places:
                x = model[place](x)
            x.square().sum().backward()
            seen += [x.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        return seen

    torch.manual_seed(3)
    linears = nn.Sequential(*(nn.Linear(16, 16, dtype=torch.float64) for _ in range(3)))
    model = get_lors_model(prune_two_of_four(linears), LoRSConfig(r=3, init_lora_weights=False))
    Y = torch.randn(5, 16, dtype=torch.float64)
    assert_same(world(order), model, what)


@pytest.mark.parametrize("order", ORDERS)
def test_autocast_in_turn_with_plain_calls(world, order):
    def what(model: nn.Module) -> list[Tensor]:
        seen = []
        for on in (True, True, False, False, True):
            x = X.float().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                output = model(x)
            output.float().square().mean().backward()
            seen += [output.detach(), x.grad]
        return seen

    assert_same(world(order), model_of(dtype=torch.float32), what, merge_cache)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("drawn", ["rounding", "deviation", "noise"])
def test_a_step_draws_its_own_random_numbers(world, order, drawn):
    deviations = {width: [torch.full((width,), 0.1 + 0.1 * step) for step in range(3)] for width in WIDTHS}

    def what(model: nn.Module) -> list[Tensor]:
        seen = []
        for step in range(3):
            for layer in model.layers:
                layer.step_seed = step if drawn == "rounding" else 7
                deviation = deviations[layer.out_features][step if drawn == "deviation" else 0]
                layer.noise = (deviation, step if drawn == "noise" else 7)
            for _ in range(2):  # the second one merges ahead for the first layer, as it would draw now
                x = X.bfloat16().requires_grad_()
                output = model(x)
                seen.append(output.detach())
        output.float().square().mean().backward()
        model.eval()
        return [*seen, x.grad, model(x).detach(), model(x).detach()]

    assert_same(world(order), model_of(dtype=torch.bfloat16, rounding="stochastic"), what, merge_cache)


@pytest.mark.parametrize("order", ORDERS)
def test_an_optimizer_whose_closure_calls_the_model(world, order):
    class Twice(torch.optim.Optimizer):
        """Evaluates before and after a write that torch does not count."""

        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure):
            closure()
            for p in self.param_groups[0]["params"]:
                p.data.add_(0.1)

    def what(model: nn.Module) -> list[Tensor]:
        optimizer, seen = Twice([p for p in model.parameters() if p.requires_grad]), []
        for _ in range(3):
            optimizer.step(lambda: seen.append(model(X).detach()))
            seen.append(model(X).detach())
        return seen

    model, device = model_of(), world(order)
    expected = what(copy.deepcopy(model))
    assert differing(prefetched(device, model, lambda: what(model)), expected) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_on_two_streams_of_the_user(world, order):
    """Each call on another stream, which has waited for the one before."""
    model, device = model_of(), world(order)
    expected = [model(X).detach() for _ in range(6)]

    def what() -> list[Tensor]:
        own = [device.current[device.devices[0]], device.new_stream(device.devices[0])]
        seen = []
        for i in range(6):
            x = X
            for j, layer in enumerate(model.layers):
                stream = own[(i + j) // 2 % 2]
                stream.wait(own[0].record_event())
                stream.wait(own[1].record_event())
                with device.on(stream):
                    x = torch.tanh(layer(x))
                seen.append(x.detach())
        return seen[3::4]

    assert differing(prefetched(device, model, what), expected) == 0
    assert merges(device)[1] > 0
    assert device.races == []


class Move(torch.autograd.Function):
    """A copy to another device, for which both of their streams wait, as torch's does."""

    @staticmethod
    def forward(ctx, x, world, to):
        ctx.world, ctx.back = world, world.device_of(x)
        return Move.moved(x, world, to)

    @staticmethod
    def backward(ctx, grad):
        return Move.moved(grad, ctx.world, ctx.back), None, None

    @staticmethod
    def moved(x, world, to):
        one, other = world.current[world.device_of(x)], world.current[to]
        other.wait(one.record_event())
        with world.on(other):
            copied = x.clone()
        one.wait(other.record_event())
        return copied


@pytest.mark.parametrize("order", ORDERS)
def test_several_devices(world, order):
    """A model in two parts, each with a second stream of its own."""
    model, device = model_of(), world(order, devices=2)
    expected = train(copy.deepcopy(model), X)
    first, second = device.devices
    for layer in model.layers[2:]:
        for tensor in (*layer.parameters(), *layer.buffers()):
            device.placed[tensor.untyped_storage().data_ptr()] = second
    forward = model.half

    def half(x: Tensor, layers: slice) -> Tensor:
        return forward(x, layers) if layers.start == 0 else Move.apply(
            forward(Move.apply(x, device, second), layers), device, first
        )  # fmt: skip

    model.half = half
    assert differing(prefetched(device, model, lambda: train(model, X)), expected) == 0
    assert device.races == []
    assert {stream.device for stream in device.streams[2:]} == {first, second}
    assert all(stream.clock[stream] > 0 for stream in device.streams)


def test_graph_capture_is_refused(world):
    model, device = model_of(), world()
    with device, prefetch(model):
        model(X)
        device.capturing = True
        with pytest.raises(
            RuntimeError, match=r"A CUDA graph is captured inside lors_cuda\.prefetch.*outside the block"
        ):
            model(X)
        device.capturing = False
        model(X)
    device.capturing = True
    assert differing(ran(device, lambda: [model(X).detach()]), [model(X).detach()]) == 0


def test_after_the_block_nothing_is_left(world):
    model, device = model_of(), world()
    x = X.clone().requires_grad_()
    with suppress(ZeroDivisionError), device, prefetch(model):
        outputs = [model(x), model(x)]
        raise ZeroDivisionError
    assert all(layer.merged_weight is None for _, layer in named_lors_layers(model))
    queued = len(device.log)
    with device:
        for output in outputs:
            output.sum().backward()
        device.synchronize()
    assert merges(device)[2] == 4 + 1 + 8
    assert not any(stream in device.streams[1:] for stream, _, _ in device.log[queued:])
    assert torch.equal(x.grad, 2 * torch.autograd.grad(model(x).sum(), x)[0])
    assert device.races == []


def test_the_inner_block_is_in_force_and_copies_have_none(world):
    model, device = model_of(), world()
    with device, merge_cache(model):
        kept = [layer.merged_weight for layer in model.layers]
        with prefetch(model):
            own = [layer.merged_weight for layer in model.layers]
            assert not set(own) & set(kept)
            with merge_cache(model):
                model(X)
                assert all(layer.merged_weight.nbytes for layer in model.layers)
            assert [layer.merged_weight for layer in model.layers] == own
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert [layer.merged_weight for layer in other.layers] == [None] * 4
        assert [layer.merged_weight for layer in model.layers] == kept


def test_without_cuda_it_says_that_it_has_no_effect():
    model = model_of()
    expected = train(copy.deepcopy(model), X)
    sentence = r"prefetch has no effect: the weights are on cpu.*Move the model"
    with pytest.warns(UserWarning, match=sentence) as said, prefetch(model):
        actual = train(model, X)
    assert said[0].filename == __file__
    assert differing(actual, expected) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_compiled_and_transformed_calls_merge_for_themselves(world):
    model, device = model_of(), world()
    expected = model(X)
    with prefetch(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), expected)
        torch.testing.assert_close(torch.func.vmap(model)(X[None])[0], expected)
        traced = torch.jit.trace(model, X, check_trace=False)
        model.layers[0].lora_B.data.mul_(2)
    torch.testing.assert_close(traced(X), model(X))
    assert device.streams[1:] == []
