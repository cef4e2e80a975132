# SPDX-License-Identifier: Apache-2.0
"""torch.func and forward mode: the derivatives of the plain formula, in every layout, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

from cases import Case, lors, make_case
from lors_cuda import LoRSLinear, SparseLinear, SparseWeight, disable_adapter, lors_linear, merge, merge_cache

LAYOUTS = ("dense", "2:4", "bitmap")
GRADIENTS = ("lors", "exact")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS)
Function = Callable[..., Tensor]


def float64_case(seed: int, device: torch.device, layout: str = "dense", **options: object) -> Case:
    options = {"explicit_mask": False, **options}
    return make_case(seed, 4, 6, 12, 2, torch.float64, device=device, bias=True, layout=layout, **options)


def arguments(case: Case) -> tuple[Tensor, ...]:
    return case.input, case.lora_A, case.lora_B, case.bias


def tangents_of(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return tuple(torch.randn_like(t) for t in tensors)


def stored(case: Case) -> SparseWeight:
    return SparseWeight.from_dense(case.weight, case.layout, case.mask)


def ours(case: Case, gradient: str = "exact") -> Function:
    weight = stored(case)
    return lambda x, A, B, bias: lors_linear(x, weight, A, B, case.scaling, bias, gradient=gradient)


def operator(case: Case) -> Function:
    """The same by the operator itself, whose derivatives are the registered ones."""
    operands = case.stored
    return lambda x, A, B, bias: lors.linear(x, *operands, A, B, bias, case.scaling, "exact")


def plain(case: Case) -> Function:
    return lambda x, A, B, bias: x @ plain_merge(case, A, B).T + bias


def plain_merge(case: Case, A: Tensor, B: Tensor) -> Tensor:
    return torch.where(case.kept, case.weight + case.scaling * (B @ A), 0.0)


def loss_of(function: Function) -> Function:
    return lambda *args: function(*args).square().sum()


def assert_same(got: object, expected: object) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert any(bool(b.any()) for b in tree_leaves(expected))


ALL = (0, 1, 2, 3)
TRANSFORMS = {
    "grad": lambda f, args, tangents: grad(loss_of(f), ALL)(*args),
    "vjp": lambda f, args, tangents: vjp(f, *args)[1](torch.ones_like(f(*args))),
    "jvp": lambda f, args, tangents: jvp(f, args, tangents),
    "jacrev": lambda f, args, tangents: jacrev(f, ALL)(*args),
    "jacfwd": lambda f, args, tangents: jacfwd(f, ALL)(*args),
    "vmap of grad": lambda f, args, tangents: vmap(grad(loss_of(f), ALL), (0, None, None, None))(
        torch.stack([args[0], tangents[0]]), *args[1:]
    ),
    "grad of vmap": lambda f, args, tangents: grad(
        lambda A: vmap(f, (0, None, None, None))(torch.stack([args[0], tangents[0]]), A, *args[2:]).square().sum()
    )(args[1]),
    "vmap over all": lambda f, args, tangents: vmap(f, (1, 0, 0, 0), out_dims=1)(
        *(torch.stack(pair, dim) for pair, dim in zip(zip(args, tangents, strict=True), (1, 0, 0, 0), strict=True))
    ),
    "vmap of jvp": lambda f, args, tangents: vmap(lambda t: jvp(lambda x: f(x, *args[1:]), args[:1], (t,)))(
        torch.stack([args[0], tangents[0]])
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_layout
def test_lors_linear_and_its_operator(device, seed, layout, transform):
    case = float64_case(seed, device, layout)
    args, run = arguments(case), TRANSFORMS[transform]
    tangents = tangents_of(args, seed)
    expected = run(plain(case), args, tangents)
    assert_same(run(ours(case), args, tangents), expected)
    assert_same(run(operator(case), args, tangents), expected)


@pytest.mark.parametrize(("outer", "gradient"), [(jacfwd, "lors"), (jacfwd, "exact"), (jacrev, "exact")])
def test_second_derivatives_over_forward_mode(device, seed, outer, gradient):
    case = float64_case(seed, device)
    args = arguments(case)
    expected = hessian(loss_of(plain(case)), ALL)(*args)
    for function in (ours(case, gradient), operator(case)):
        assert_same(outer(jacfwd(loss_of(function), ALL), ALL)(*args), expected)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own
def test_linearize(device, seed):
    case = float64_case(seed, device)
    args = arguments(case)
    tangents = tangents_of(args, seed)
    output, push = linearize(ours(case), *args)
    assert_same((output, push(*tangents)), jvp(plain(case), args, tangents))


@pytest.mark.parametrize("wanted", range(4))
@every_gradient
def test_forward_mode_with_respect_to_one_argument(device, seed, gradient, wanted):
    """Whatever `gradient` says, forward mode gives the derivative of the forward."""
    case = float64_case(seed, device, explicit_mask=True)
    args = arguments(case)
    (tangent,) = tangents_of(args[wanted : wanted + 1], seed)

    def of_one(function: Function) -> Function:
        return lambda t: function(*args[:wanted], t, *args[wanted + 1 :])

    expected = jvp(of_one(plain(case)), (args[wanted],), (tangent,))
    assert_same(jvp(of_one(ours(case, gradient)), (args[wanted],), (tangent,)), expected)
    for frozen in (False, True):
        with forward_ad.dual_level(), torch.set_grad_enabled(not frozen):
            dual = forward_ad.make_dual(args[wanted].detach().requires_grad_(not frozen), tangent)
            assert_same(tuple(forward_ad.unpack_dual(of_one(ours(case, gradient))(dual))), expected)


@every_layout
def test_gradcheck_in_every_mode(device, seed, layout):
    case = float64_case(seed, device, layout)
    args = tuple(t.requires_grad_() for t in arguments(case))
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(ours(case), args, **modes)
    weight = stored(case)
    assert torch.autograd.gradcheck(lambda A, B: merge(weight, A, B, case.scaling), args[1:3], **modes)


@every_layout
def test_merge(device, seed, layout):
    case = float64_case(seed, device, layout)
    weight, pair = stored(case), arguments(case)[1:3]
    several = tuple(torch.stack([t, -2 * t]) for t in pair)
    for run in (
        lambda f: jvp(f, pair, tangents_of(pair, seed)),
        lambda f: jacrev(f, (0, 1))(*pair),
        lambda f: vmap(f)(*several),
        lambda f: vmap(grad(loss_of(f)))(*several),
    ):
        expected = run(lambda A, B: plain_merge(case, A, B))
        assert_same(run(lambda A, B: merge(weight, A, B, case.scaling)), expected)


def layer_of(case: Case, gradient: str = "exact") -> LoRSLinear:
    linear = nn.Linear(case.weight.shape[1], case.weight.shape[0], device=case.weight.device, dtype=case.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.where(case.kept, case.weight, 0.0))
        linear.bias.copy_(case.bias)
    layer = LoRSLinear.from_linear(linear, r=2, lora_alpha=2 * case.scaling, layout=case.layout, gradient=gradient)
    with torch.no_grad():
        layer.lora_A.copy_(case.lora_A)
        layer.lora_B.copy_(case.lora_B)
    return layer


@every_gradient
@every_layout
def test_a_layer_that_keeps_its_merge_or_is_disabled(device, seed, layout, gradient):
    case = float64_case(seed, device, layout)
    layer, x = layer_of(case, gradient), case.input.reshape(2, 2, -1)
    (tangent,) = tangents_of((x,), seed)
    frozen = SparseLinear(layer.sparse_weight, layer.bias)
    weight = torch.where(case.kept, case.weight, 0.0)
    expected = jvp(lambda x: x @ weight.T + case.bias, (x,), (tangent,))
    assert_same(jvp(frozen, (x,), (tangent,)), expected)
    with disable_adapter(layer):
        assert_same(jvp(layer, (x,), (tangent,)), expected)
    expected = jvp(lambda x: plain(case)(x, *arguments(case)[1:]), (x,), (tangent,))
    with merge_cache(layer):
        layer(x)
        assert_same(jvp(layer, (x,), (tangent,)), expected)
        with torch.no_grad(), forward_ad.dual_level():
            assert_same(tuple(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))), expected)
        assert_same(vmap(layer)(x), expected[0])
        pair = (case.lora_A,), (2 * case.lora_A,)
        expected = jvp(lambda A: plain(case)(x, A, case.lora_B, case.bias), *pair)
        assert_same(jvp(lambda A: functional_call(layer, {"lora_A": A}, (x,)), *pair), expected)


@every_gradient
def test_per_sample_gradients_are_those_of_each_sample_alone(device, seed, gradient):
    layer = layer_of(float64_case(seed, device), gradient)
    frozen = {name: p.detach() for name, p in layer.named_parameters()}
    trained = {name: frozen[name] for name in ("lora_A", "lora_B")}
    X = torch.randn(3, 5, 12, dtype=torch.float64, device=device)

    def loss(trained: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, {**frozen, **trained}, (x,)).square().sum()

    grads = vmap(grad(loss), (None, 0))(trained, X)
    for i, x in enumerate(X):
        alone = torch.autograd.grad(layer(x).square().sum(), (layer.lora_A, layer.lora_B))
        assert_same((grads["lora_A"][i], grads["lora_B"][i]), alone)


@every_layout
def test_an_ensemble_of_layers(device, seed, layout):
    layers = [layer_of(float64_case(seed, device, layout))]
    layers.append(copy.deepcopy(layers[0]))
    layers[1].lora_B.data *= -3
    parameters, _ = stack_module_state(layers)
    x = torch.randn(5, 12, dtype=torch.float64, device=device)
    together = vmap(lambda p: functional_call(layers[0], p, (x,)))({k: p.detach() for k, p in parameters.items()})
    assert_same(together, torch.stack([layer(x) for layer in layers]))


def test_forward_mode_in_bfloat16_and_under_autocast(device, seed):
    case = make_case(
        seed, 9, 12, 33, 3, torch.bfloat16, device=device, bias=True, adapter_dtypes=(torch.float32, torch.float32)
    )
    args = (case.input.float(), case.lora_A, case.lora_B, case.bias)
    tangents = tangents_of(args, seed)
    with torch.autocast(device.type, torch.bfloat16):
        output, tangent = jvp(ours(case), args, tangents)
    assert output.dtype == tangent.dtype == torch.bfloat16
    double = case.replace(weight=case.weight.double())
    _, expected = jvp(plain(double), tuple(t.double() for t in args), tuple(t.double() for t in tangents))
    assert (tangent.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad", "jacfwd"])
def test_a_transform_inside_a_compiled_graph(device, seed, transform):
    case = float64_case(seed, device)
    args, run = arguments(case), TRANSFORMS[transform]
    tangents = tangents_of(args, seed)
    compiled = torch.compile(lambda: run(ours(case), args, tangents), backend="aot_eager", fullgraph=True)
    assert_same(compiled(), run(plain(case), args, tangents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_gradient
def test_eager_and_the_registered_formulas_give_the_same_bits(device, seed, gradient, dtype):
    case = make_case(seed, 17, 31, 70, 5, dtype, device=device, explicit_mask=True, bias=True)
    weight, operands = SparseWeight.from_dense(case.weight, "dense", case.mask), case.stored
    args = tuple(t.requires_grad_() for t in arguments(case))
    tangents = tangents_of(args, seed)

    def eager(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return lors_linear(x, weight, A, B, 0.75, bias, gradient=gradient)

    def registered(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return lors.linear(x, *operands, A, B, bias, 0.75, gradient)

    def eager_merge(A: Tensor, B: Tensor) -> Tensor:
        return merge(weight, A, B, 0.75)

    def registered_merge(A: Tensor, B: Tensor) -> Tensor:
        return lors.merge(*operands, A, B, 0.75)

    def derivatives(function: Function, args: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return *torch.autograd.grad(loss_of(function)(*args), args), *jvp(function, args, tangents)

    for ours, theirs, some in ((eager, registered, slice(0, 4)), (eager_merge, registered_merge, slice(1, 3))):
        results = (derivatives(function, args[some], tangents[some]) for function in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- refusals ----


def test_second_derivatives_through_gradients_are_refused(device, seed):
    case = float64_case(seed, device)
    args, sentence = arguments(case), "does not support double backward.*use lors_cuda.reference"
    for function in (ours(case), operator(case)):
        with pytest.raises(RuntimeError, match=sentence):
            hessian(loss_of(function), 1)(*args)
        with pytest.raises(RuntimeError, match=sentence):
            jacrev(jacrev(loss_of(function), 1), 1)(*args)
        A, tangent = args[1].detach().requires_grad_(), torch.ones_like(args[1])
        with forward_ad.dual_level():
            loss = loss_of(function)(args[0], forward_ad.make_dual(A, tangent), *args[2:])
            with pytest.raises(RuntimeError, match=sentence):
                torch.autograd.grad(loss, A)
        with pytest.raises(RuntimeError, match=sentence):
            torch.autograd.functional.jvp(lambda A, f=function: f(args[0], A, *args[2:]), args[1], tangent)


def test_the_frozen_weight_has_no_derivatives(device, seed):
    case = float64_case(seed, device)
    layer, x, weight = layer_of(case), case.input, case.weight
    with pytest.raises(RuntimeError, match=r"weight has a tangent.*Differentiate with respect to the input"):
        jvp(lambda w: lors_linear(x, w, case.lora_A, case.lora_B, 0.5), (weight,), (weight,))
    with pytest.raises(RuntimeError, match="weight has a tangent"):
        jvp(lambda w: functional_call(layer, {"weight_values": w}, (x,)), (weight,), (weight,))
    with pytest.raises(RuntimeError, match="weight has a tangent"):
        jvp(lambda w: SparseWeight(w).to_dense(), (weight,), (weight,))
    with pytest.raises(ValueError, match=r"weight requires grad.*under torch.func differentiate"):
        grad(lambda w: functional_call(layer, {"weight_values": w}, (x,)).sum())(weight)


def test_operators_without_derivatives_refuse_tangents(device, seed):
    case = float64_case(seed, device, "2:4")
    A, B, operands = case.lora_A, case.lora_B, case.stored
    backward = (case.grad_output, case.input, *operands)
    calls = {
        "sparse24_merge": lambda A: lors.sparse24_merge(operands[0], operands[2], A, B, 0.5),
        "merged_operand": lambda A: lors.merged_operand(*operands, A, B, 0.5, torch.float64, 3),
        "linear_backward": lambda A: lors.linear_backward(*backward, A, B, None, 0.5, "lors", True, True, True),
        "merge_backward": lambda A: lors.merge_backward(case.weight, *operands, A, B, 0.5),
    }
    for name, call in calls.items():
        sentence = "not support double backward" if name.endswith("backward") else f"lors::{name} has no derivatives"
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode, forward_ad.dual_level(), pytest.raises(RuntimeError, match=sentence):
                call(forward_ad.make_dual(A, A))
        with pytest.raises(RuntimeError, match=sentence):
            jvp(call, (A,), (A,))
    with pytest.raises(RuntimeError, match="has no derivatives"):
        jvp(lambda A: stored(case).merge(A, B, 0.5).values, (A,), (A,))


def test_a_scaling_that_would_lose_its_derivative_is_refused(device, seed):
    case, scaling = float64_case(seed, device), torch.tensor(0.5, dtype=torch.float64)

    def call(scaling: Tensor) -> Tensor:
        return lors_linear(case.input, case.weight, case.lora_A, case.lora_B, scaling)

    for run in (
        lambda: call(scaling.clone().requires_grad_()),
        lambda: grad(lambda s: call(s).sum())(scaling),
        lambda: jvp(call, (scaling,), (scaling,)),
        lambda: vmap(call)(scaling.expand(3)),
    ):
        with pytest.raises(ValueError, match=r"scaling is a tensor.*Pass a float, or scaling 1.0 with lora_B"):
            run()
