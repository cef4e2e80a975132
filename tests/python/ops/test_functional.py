# SPDX-License-Identifier: Apache-2.0
"""lors_linear and merge as a user calls them: autograd, shapes and strides, autocast, checkpointing, repeatability."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cases import ADAPTER_DTYPES, FLOATS, Case, make_case
from expectations import (
    check_adapter_grads,
    check_grad_bias,
    check_grad_input,
    check_linear,
    check_merge,
    check_merge_backward,
)
from lors_cuda import LoRSLinear, SparseWeight, lors_linear, merge

GRADIENTS = ("lors", "exact")
TRAINABLE = ("input", "lora_A", "lora_B", "bias")


def apply(case: Case, gradient: str = "lors", **changes: object) -> Tensor:
    """lors_linear on the case."""
    a = {**vars(case), **changes}
    return lors_linear(
        a["input"], a["weight"], a["lora_A"], a["lora_B"], a["scaling"], a["bias"], mask=a["mask"], gradient=gradient
    )


def leaves(case: Case, names: tuple[str, ...] = TRAINABLE) -> Case:
    """The same case with leaves of their own that require grad."""
    return case.replace(**{n: getattr(case, n).detach().clone().requires_grad_() for n in names})


def check_all_grads(case: Case, gradient: str) -> None:
    check_grad_input(case.input.grad, case)
    check_adapter_grads(case.lora_A.grad, case.lora_B.grad, case, gradient)
    if case.bias is not None:
        check_grad_bias(case.bias.grad, case)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("adapter_dtypes", ADAPTER_DTYPES[:5])
def test_forward_and_backward(device, seed, adapter_dtypes, dtype, explicit, gradient):
    case = make_case(
        seed, 17, 31, 70, 5, dtype, device=device, explicit_mask=explicit, bias=True, adapter_dtypes=adapter_dtypes
    )
    case = leaves(case)
    output = apply(case, gradient)
    check_linear(output, case)
    output.backward(case.grad_output)
    check_all_grads(case, gradient)
    assert case.weight.grad is None


@pytest.mark.parametrize("explicit", [False, True])
def test_gradcheck_of_the_exact_gradient(device, seed, explicit):
    case = leaves(make_case(seed, 4, 6, 9, 2, torch.float64, device=device, explicit_mask=explicit, bias=True))

    def function(input: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        return apply(case, "exact", input=input, lora_A=lora_A, lora_B=lora_B, bias=bias)

    assert torch.autograd.gradcheck(function, (case.input, case.lora_A, case.lora_B, case.bias))


@pytest.mark.parametrize("explicit", [False, True])
def test_gradcheck_of_merge(device, seed, explicit):
    case = leaves(make_case(seed, 1, 6, 9, 2, torch.float64, device=device, explicit_mask=explicit), TRAINABLE[1:3])

    def function(lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return merge(case.weight, lora_A, lora_B, case.scaling, mask=case.mask)

    assert torch.autograd.gradcheck(function, (case.lora_A, case.lora_B))


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_is_differentiable(device, seed, dtype):
    case = make_case(seed, 1, 31, 70, 5, dtype, device=device, explicit_mask=True, adapter_dtypes=ADAPTER_DTYPES[3])
    case = leaves(case, TRAINABLE[1:3])
    merged = merge(case.weight, case.lora_A, case.lora_B, case.scaling, mask=case.mask)
    check_merge(merged, case)
    G = torch.randn(merged.shape, generator=torch.Generator().manual_seed(seed)).to(merged)
    merged.backward(G)
    check_merge_backward((case.lora_A.grad, case.lora_B.grad), G, case)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4)))
def test_what_needs_no_gradient_gets_none(device, seed, wanted, gradient):
    names = tuple(n for n, w in zip(TRAINABLE, wanted, strict=True) if w)
    case = leaves(make_case(seed, 9, 12, 33, 3, device=device, bias=True), names)
    output = apply(case, gradient)
    assert output.requires_grad == any(wanted)
    if not any(wanted):
        return
    output.backward(case.grad_output)
    assert {n for n in TRAINABLE if getattr(case, n).grad is not None} == set(names)
    whole = leaves(case)
    apply(whole, gradient).backward(case.grad_output)
    check_all_grads(whole, gradient)
    for n in names:
        assert torch.equal(getattr(case, n).grad, getattr(whole, n).grad)


def test_no_grad_and_inference_mode(device, seed):
    case = leaves(make_case(seed, 9, 12, 33, 3, device=device, bias=True))
    with torch.no_grad():
        assert not apply(case).requires_grad
    with torch.inference_mode():
        output = apply(case)
    assert torch.equal(output, apply(case).detach())


@pytest.mark.parametrize("leading", [(), (1,), (17,), (2, 3), (2, 0, 4), (0,), (3, 1, 2, 2)])
def test_any_leading_dimensions(device, seed, leading):
    case = make_case(seed, torch.Size(leading).numel(), 12, 33, 3, device=device, bias=True)
    input = case.input.reshape(*leading, 33).requires_grad_()
    output = apply(case, input=input)
    assert output.shape == (*leading, 12)
    check_linear(output.reshape(-1, 12), case)
    output.backward(case.grad_output.reshape(*leading, 12))
    assert input.grad.shape == input.shape
    check_grad_input(input.grad.reshape(-1, 33), case)


def strided(t: Tensor) -> list[Tensor]:
    """Views with the values of the 2-D `t`: transposed, and every second column of a wider matrix, off its start."""
    wide = torch.full((t.shape[0] + 1, 2 * t.shape[1] + 1), 7.5, device=t.device).to(t.dtype)
    wide[1:, 1::2] = t
    return [t.T.contiguous().T, wide[1:, 1::2]]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["input", "weight", "mask", "lora_A", "lora_B", "grad_output"])
def test_strided_arguments(device, seed, name, dtype, gradient):
    """Any argument in other strides: the same results, and the same bits where no product of torch's own has a part."""
    case = make_case(seed, 17, 31, 70, 5, dtype, device=device, explicit_mask=True, bias=True)
    expected = leaves(case)
    apply(expected, gradient).backward(case.grad_output)
    for view in strided(getattr(case, name)):
        assert not view.is_contiguous()
        given = leaves(case, tuple(n for n in TRAINABLE if n != name)).replace(**{name: view})
        if name in TRAINABLE:
            view.requires_grad_()
        output = apply(given, gradient)
        check_linear(output, case)
        output.backward(given.grad_output)
        check_all_grads(given, gradient)
        if gradient == "lors":
            assert torch.equal(given.lora_A.grad, expected.lora_A.grad)
            assert torch.equal(given.lora_B.grad, expected.lora_B.grad)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_expanded_input(device, seed, gradient):
    case = make_case(seed, 17, 31, 70, 5, device=device, bias=True)
    case = case.replace(input=case.input[:1].expand(17, 70))
    given = leaves(case, TRAINABLE[1:])
    given.input = case.input.detach().requires_grad_()
    assert given.input.stride() == (0, 1)
    output = apply(given, gradient)
    check_linear(output, case)
    output.backward(case.grad_output)
    check_all_grads(given, gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_expanded_gradient(device, seed, gradient):
    g = torch.tensor(-0.8125, device=device)
    case = make_case(seed, 17, 31, 70, 5, device=device, bias=True)
    given = leaves(case.replace(grad_output=g.expand(17, 31)))
    (apply(given, gradient).sum() * g).backward()  # sum's gradient is one number, expanded
    assert torch.equal(given.bias.grad, (17 * g).expand(31))  # few bits: every partial sum is exact
    given.bias = None  # equal terms are no random walk
    check_all_grads(given, gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_double_backward_is_refused(device, seed, gradient):
    case = leaves(make_case(seed, 5, 6, 9, 2, device=device, bias=True))
    (grad,) = torch.autograd.grad(apply(case, gradient).square().sum(), case.lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not support double backward.*without create_graph=True"):
        grad.square().sum().backward()
    case = leaves(case)
    merged = merge(case.weight, case.lora_A, case.lora_B, 0.75)
    (grad,) = torch.autograd.grad(merged.square().sum(), case.lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        grad.square().sum().backward()


def test_scaling_may_be_a_tensor(device, seed):
    case = make_case(seed, 5, 6, 9, 2, device=device)
    for scaling in (torch.tensor(0.75), torch.tensor(0.75, dtype=torch.float64, device=device)):
        assert torch.equal(apply(case, scaling=scaling), apply(case))
        assert torch.equal(
            merge(case.weight, case.lora_A, case.lora_B, scaling), merge(case.weight, case.lora_A, case.lora_B, 0.75)
        )


def test_sparse_weight_and_mask_are_the_same_thing(device, seed):
    case = make_case(seed, 5, 13, 70, 2, device=device, explicit_mask=True, bias=True)
    stored = SparseWeight.from_dense(case.weight, "dense", case.mask)
    assert torch.equal(apply(case, weight=stored, mask=None), apply(case))
    merged = merge(stored, case.lora_A, case.lora_B, 0.75)
    assert torch.equal(merged, merge(case.weight, case.lora_A, case.lora_B, 0.75, mask=case.mask))


AUTOCAST = [
    (torch.float32, torch.float32),  # a float32 model
    (torch.bfloat16, torch.float32),  # PEFT's default: float32 adapters on a 16-bit weight
    (torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weight_dtype", "adapter_dtype"), AUTOCAST)
def test_autocast(device, seed, weight_dtype, adapter_dtype, input_dtype, gradient):
    case = make_case(
        seed, 17, 31, 70, 5, weight_dtype, device=device, bias=True, adapter_dtypes=(adapter_dtype, adapter_dtype)
    )
    case = leaves(case.replace(input=case.input.to(input_dtype), grad_output=case.grad_output.bfloat16()))
    with torch.autocast(device.type, torch.bfloat16):
        output = apply(case, gradient)
    assert output.dtype == torch.bfloat16
    seen = case.replace(input=case.input.detach().bfloat16())  # what autocast makes of the input
    check_linear(output, seen)
    output.backward(case.grad_output)
    assert case.input.grad.dtype == input_dtype
    check_grad_input(case.input.grad.bfloat16(), seen)  # a bfloat16 value, whatever it is held in
    check_adapter_grads(case.lora_A.grad, case.lora_B.grad, seen, gradient)
    check_grad_bias(case.bias.grad, seen)


def test_autocast_leaves_float64_alone_and_merge_too(device, seed):
    case = make_case(seed, 5, 6, 33, 2, torch.float64, device=device, bias=True)
    with torch.autocast(device.type, torch.bfloat16):
        check_linear(apply(case), case)
        merged = merge(case.weight.float(), case.lora_A, case.lora_B, 0.75)
    assert torch.equal(merged, merge(case.weight.float(), case.lora_A, case.lora_B, 0.75))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device, seed, use_reentrant, gradient):
    case = make_case(seed, 9, 12, 33, 3, device=device, bias=True)
    plain, recomputed = leaves(case), leaves(case)
    apply(plain, gradient).backward(case.grad_output)
    output = checkpoint(lambda x: apply(recomputed, gradient, input=x), recomputed.input, use_reentrant=use_reentrant)
    output.backward(case.grad_output)
    for n in TRAINABLE:
        assert torch.equal(getattr(recomputed, n).grad, getattr(plain, n).grad), n


def test_functional_call(device, seed):
    torch.manual_seed(seed)
    layer = LoRSLinear.from_linear(torch.nn.Linear(33, 12).to(device), r=3)
    case = make_case(seed, 9, 12, 33, 3, device=device)
    swapped = {"lora_A": case.lora_A.requires_grad_(), "lora_B": case.lora_B.requires_grad_()}
    output = torch.func.functional_call(layer, swapped, (case.input,))
    expected = lors_linear(case.input, layer.weight, case.lora_A, case.lora_B, layer.scaling, layer.bias)
    assert torch.equal(output, expected)
    output.backward(case.grad_output)
    assert layer.lora_A.grad is None
    assert case.lora_A.grad is not None


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_deterministic_mode(device, seed, gradient):
    # It also fills fresh memory with NaN, so that anything left unwritten would show.
    case = make_case(seed, 17, 31, 70, 5, torch.bfloat16, device=device, explicit_mask=True, bias=True)
    torch.use_deterministic_algorithms(True)
    try:
        given = leaves(case)
        output = apply(given, gradient)
        output.backward(case.grad_output)
        empty = leaves(case.replace(input=case.input[:0]))
        apply(empty, gradient).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    check_linear(output, case)
    check_all_grads(given, gradient)
    assert not empty.lora_A.grad.any()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adapter_gradients_do_not_depend_on_the_number_of_threads(seed, dtype, gradient):
    case = make_case(seed, 200, 300, 515, 16, dtype, bias=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = (*case.linear_backward(gradient)[1:], case.merge())
        torch.set_num_threads(2)
        shared = (*case.linear_backward(gradient)[1:], case.merge())
    finally:
        torch.set_num_threads(threads)
    for name, a, b in zip(("grad_lora_A", "grad_lora_B", "grad_bias", "merged"), alone, shared, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_accumulating_microbatches_equals_one_batch(device, seed, gradient):
    case = make_case(seed, 64, 12, 33, 3, torch.float64, device=device, bias=True)
    whole, parts = leaves(case), leaves(case)
    apply(whole, gradient).backward(case.grad_output)
    for begin in range(0, 64, 16):
        rows = slice(begin, begin + 16)
        apply(parts, gradient, input=parts.input[rows]).backward(case.grad_output[rows])
    for n in TRAINABLE:
        torch.testing.assert_close(getattr(parts, n).grad, getattr(whole, n).grad, rtol=1e-12, atol=1e-12)
