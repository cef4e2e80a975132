# SPDX-License-Identifier: Apache-2.0
"""torch.compile and torch.export: one whole graph, forward and backward, any number of tokens, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from cases import Case, make_case
from lors_cuda import LoRSConfig, LoRSLinear, SparseWeight, get_lors_model, lors_linear, merge
from lors_cuda.methods import FlatLoRA

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own

GRADIENTS = ("lors", "exact")
TRAINABLE = ("input", "lora_A", "lora_B", "bias")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def leaves(case: Case) -> Case:
    return case.replace(**{n: getattr(case, n).detach().clone().requires_grad_() for n in TRAINABLE})


def step(case: Case, function) -> tuple[Tensor, ...]:
    """Output and the gradients of the case's leaves."""
    output = function(case.input, case.weight, case.lora_A, case.lora_B, case.bias, case.mask)
    return output.detach(), *torch.autograd.grad(output, [getattr(case, n) for n in TRAINABLE], case.grad_output)


def function_of(gradient: str):
    def function(input: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        return torch.nn.functional.silu(lors_linear(input, weight, A, B, 0.75, bias, mask=mask, gradient=gradient))

    return function


def assert_same(ours: tuple[Tensor, ...], eager: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    # Compilation leaves the ops as they are but may evaluate silu and its derivative in another order.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for name, a, b in zip(("output", *TRAINABLE), ours, eager, strict=True):
        assert a.dtype == b.dtype
        error = (a - b).double().norm() / b.double().norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_forward_and_backward_in_one_graph(device, seed, gradient, dtype, explicit):
    case = leaves(make_case(seed, 17, 31, 70, 5, dtype, device=device, explicit_mask=explicit, bias=True))
    function = function_of(gradient)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(step(case, compiled), step(case, function), dtype)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_default_backend(device, seed, gradient):
    torch.manual_seed(seed)
    net = nn.Sequential(
        LoRSLinear.from_linear(nn.Linear(33, 48), r=4, gradient=gradient, init_lora_weights=False),
        nn.GELU(),
        LoRSLinear.from_linear(nn.Linear(48, 10, bias=False), r=3, gradient=gradient, init_lora_weights=False),
    ).to(device)
    x = torch.randn(3, 9, 33, device=device)
    weights = [p for p in net.parameters() if p.requires_grad]
    compiled = torch.compile(net, fullgraph=True)
    eager, ours = net(x), compiled(x)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), weights),
        torch.autograd.grad(eager.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("marked", [True, False])
def test_token_counts_do_not_recompile(device, seed, marked):
    """One compilation where the tokens are marked dynamic; else a second, general one at the first other count."""
    counter = CompileCounterWithBackend("aot_eager")
    function = function_of("lors")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for tokens in (5, 17, 129, 64, 2):
        case = make_case(seed, tokens, 31, 70, 5, device=device, bias=True)
        case = leaves(case)
        if marked:
            torch._dynamo.mark_dynamic(case.input, 0)
            torch._dynamo.mark_dynamic(case.grad_output, 0)
        assert_same(step(case, compiled), step(case, function), torch.float32)
    assert counter.frame_count == (1 if marked else 2)


def test_dynamic_compilation_of_batch_and_length(device, seed):
    torch.manual_seed(seed)
    layer = LoRSLinear.from_linear(nn.Linear(33, 12), r=3, init_lora_weights=False).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(2, 9, 33, device=device))
    # torch first takes the layer's scaling for a dynamic number, finds that an op needs a constant, and starts again.
    first = counter.frame_count
    assert first <= 2
    for batch, length in ((2, 9), (3, 17), (4, 33), (7, 2)):
        x = torch.randn(batch, length, 33, device=device)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == first


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(device, seed, weight_dtype):
    case = make_case(
        seed, 17, 31, 70, 5, weight_dtype, device=device, bias=True, adapter_dtypes=(torch.float32, torch.float32)
    )
    case = leaves(case.replace(input=case.input.float(), grad_output=case.grad_output.bfloat16()))

    def function(*args: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return function_of("lors")(*args)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(step(case, compiled), step(case, function), torch.bfloat16)


def test_merge_and_sparse_weight_in_a_graph(device, seed):
    case = make_case(seed, 3, 31, 70, 5, device=device, explicit_mask=True)
    stored = SparseWeight.from_dense(case.weight, mask=case.mask)

    def function(input: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lors_linear(input, stored, A, B, 0.75) + input @ merge(stored, A, B, 0.75).T

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    args = (case.input, case.lora_A.requires_grad_(), case.lora_B.requires_grad_())
    ours, eager = compiled(*args), function(*args)
    torch.testing.assert_close(ours, eager)
    for a, b in zip(*(torch.autograd.grad(y.sum(), args[1:]) for y in (ours, eager)), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_in_a_graph(device, seed):
    torch.manual_seed(seed)
    layer = LoRSLinear.from_linear(nn.Linear(33, 12), r=3, init_lora_weights=False).to(device)
    x = torch.randn(9, 33, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = (x, layer.lora_A, layer.lora_B)
    for a, b in zip(torch.autograd.grad(compiled(x), inputs), torch.autograd.grad(function(x), inputs), strict=True):
        torch.testing.assert_close(a, b)


class TwoLayers(nn.Module):
    """A layer with an implicit mask and bias, one with an explicit mask and none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        first, second = nn.Linear(33, 48), nn.Linear(48, 10, bias=False)
        mask = torch.rand(10, 48) < 0.5
        self.up = LoRSLinear.from_linear(first, r=4, init_lora_weights=False)
        self.down = LoRSLinear.from_linear(second, r=3, mask=mask, gradient="exact", init_lora_weights=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_number_of_tokens(device, seed, strict):
    model = TwoLayers(seed).to(device)
    x = torch.randn(2, 9, 33, device=device)
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    assert sum(n.target is torch.ops.lors.linear.default for n in program.graph.nodes) == 2
    for size in ((2, 9, 33), (5, 2, 33), (3, 129, 33)):
        other = torch.randn(size, device=device)
        torch.testing.assert_close(program.module()(other), model(other), rtol=0, atol=0)
    assert set(program.state_dict) == set(model.state_dict())


def test_an_exported_program_survives_a_file(device, seed, tmp_path):
    model = TwoLayers(seed).to(device)
    x = torch.randn(4, 33, device=device)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


def test_training_compiled_follows_training_eagerly(device, seed):
    """Ten steps of Adam from the same start give the same losses: nothing was baked into the graph."""
    model = TwoLayers(seed).to(device)
    x, y = torch.randn(24, 33, device=device), torch.randn(24, 10, device=device)

    def losses(model: nn.Module, forward) -> list[float]:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        history = []
        for _ in range(10):
            loss = (forward(x) - y).square().mean()
            history.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return history

    twin = copy.deepcopy(model)
    eager = losses(model, model)
    assert eager[-1] < eager[0]
    assert losses(twin, torch.compile(twin, fullgraph=True, backend="aot_eager")) == pytest.approx(eager, rel=1e-4)


def test_one_graph_serves_the_seeds_of_all_steps():
    """With torch's setting for integers of modules; without it the results are right too, in a graph for each seed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).to(torch.bfloat16)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[:, ::2] = 0
    config = LoRSConfig(r=4, rounding="stochastic", init_lora_weights=False)
    run = FlatLoRA(sigma=0.1).start(get_lors_model(model, config).train())
    optimizer = run.optimizer(lr=1e-2)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for _ in range(12):
            output = compiled(x)
            assert torch.equal(output, model(x))
            output.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert backend.frame_count <= 2
