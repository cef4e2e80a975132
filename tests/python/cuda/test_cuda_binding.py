# SPDX-License-Identifier: Apache-2.0
"""The CUDA operators' binding without a GPU: cuda_ops.cpp over a core of plain loops (fake_cuda/binding.cpp).

What goes to which kernel, in which dtype, on which stream, with whose memory; the kernels themselves run in tests/sim.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import stack_cases
import torch
from quantised_cases import LAYOUTS
from stack_cases import make_stack
from test_linear_op import combinations
from test_operators import on_grid, problem, stored

import cases
import fake_binding
from cases import make_case
from expectations import check_adapter_grads, check_linear, check_linear_backward, check_merge, check_merge_backward
from lors_cuda._draws import NO_DRAWS


@pytest.fixture(scope="module")
def fake():
    return fake_binding.load()


@pytest.fixture
def ops(fake, monkeypatch):
    """The same, in the place of lors for everything that `Case` calls; afterwards nothing is held."""
    if os.environ.get("LORS_CUDA_FUSED"):
        pytest.skip("LORS_CUDA_FUSED is set")
    monkeypatch.setattr(cases, "lors", fake)
    before = launches(fake)
    yield fake
    guards, scratch, now = map(int, fake.fake_state().split())
    assert (guards, scratch) == (0, 0)
    assert now > before, "nothing was called"


def launches(fake) -> int:
    return int(fake.fake_state().split()[2])


def test_every_operator_of_the_cpu_is_there(fake):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("lors::")}
    on_the_cpu = {name for name in names if has(f"lors::{name}", "CPU")}
    assert {"merge", "linear", "sparse24_merge"} <= on_the_cpu
    on_the_cpu.remove("compress")  # for the CPU alone
    assert on_the_cpu == {name for name in on_the_cpu if has(f"lors_on_cpu::{name}", "CPU")}


def served() -> list:
    """The combinations of test_linear_op without float64, which CUDA leaves to the CPU."""
    return [c for c in combinations() if torch.float64 not in (c.values[1], *c.values[5])]


@pytest.mark.parametrize(("shape", "dtype", "explicit", "gradient", "bias", "adapter_dtypes"), served())
@pytest.mark.parametrize("fused", ["always", "never"])
def test_every_operator_meets_the_oracle(
    ops, monkeypatch, seed, fused, shape, dtype, explicit, gradient, bias, adapter_dtypes
):
    monkeypatch.setenv("LORS_CUDA_FUSED", fused)
    case = make_case(seed, *shape, dtype, explicit_mask=explicit, bias=bias, adapter_dtypes=adapter_dtypes)
    if bias and fused == "never":  # a 16-bit matmul of torch's takes its bias in 16 bits
        case.bias = case.bias.to(dtype)
    check_merge(case.merge(), case)
    check_linear(case.linear(gradient), case)
    check_linear_backward(case.linear_backward(gradient), case, gradient)
    grad = torch.randn(case.weight.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    actual = ops.merge_backward(grad, *case.adapted, case.scaling)
    check_merge_backward(actual, grad, case)


@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
@pytest.mark.parametrize(("shape", "dtype", "explicit", "gradient", "bias", "adapter_dtypes"), served()[::3])
def test_compressed_layouts(ops, seed, layout, shape, dtype, explicit, gradient, bias, adapter_dtypes):
    T, N, K, r = shape
    K += -K % 4 if layout == "2:4" else 0
    case = make_case(seed, T, N, K, r, dtype, explicit_mask=explicit, adapter_dtypes=adapter_dtypes, layout=layout)
    check_merge(case.merge(), case)
    check_linear(case.linear(gradient), case)
    check_linear_backward(case.linear_backward(gradient), case, gradient)


def test_merging_2_4_values_is_what_the_cpu_does(ops, seed):
    for dtype, explicit in ((torch.float32, False), (torch.bfloat16, True)):
        case = make_case(seed, 1, 31, 68, 3, dtype, explicit_mask=explicit, layout="2:4")
        values, _, metadata = case.stored
        args = (values, metadata, case.lora_A, case.lora_B, case.scaling)
        expected = torch.ops.lors.sparse24_merge(*args)
        torch.testing.assert_close(ops.sparse24_merge(*args), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("gradient", ["lors", "exact"])
def test_strided_arguments(ops, seed, gradient):
    case = make_case(seed, 17, 31, 70, 5, explicit_mask=True, bias=True)

    def strided(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(2, -1)[..., ::2] if t.dim() == 1 else t.T.contiguous().T

    fields = ("input", "weight", "mask", "lora_A", "lora_B", "bias", "grad_output")
    other = case.replace(**{name: strided(getattr(case, name)) for name in fields})
    assert not other.input.is_contiguous()
    torch.testing.assert_close(other.linear(gradient), case.linear(gradient))
    for a, b in zip(other.linear_backward(gradient), case.linear_backward(gradient), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(other.merge(), case.merge())


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("tokens", [9, 100])
def test_activations_of_two_dtypes(ops, seed, gradient, tokens):
    """A gradient in another dtype than the input's: the kernels get one."""
    case = make_case(seed, tokens, 12, 33, 3, torch.bfloat16)
    case.grad_output = case.grad_output.half()
    _, grad_lora_A, grad_lora_B, _ = case.linear_backward(gradient)
    check_adapter_grads(grad_lora_A, grad_lora_B, case, gradient)


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("needs", [(False, True, False), (True, False, False), (False, False, True)])
def test_what_is_not_wanted_is_not_computed(ops, seed, gradient, needs):
    case = make_case(seed, 9, 12, 33, 3)
    before = launches(ops)
    grads = case.linear_backward(gradient, needs)
    # dX: a merge and a matmul; "exact": a matmul and a contraction.
    assert launches(ops) == before + (2 if needs[0] or gradient == "exact" else 1)
    assert [g.numel() > 0 for g in grads] == [*needs, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_gradients_of_16_bits_are_as_close_as_float32_matmuls(ops, seed, dtype):
    """In panels of a few rows, which torch is asked to leave in float32."""
    case = make_case(seed, 300, 62, 70, 4, dtype, adapter_dtypes=(torch.float32, torch.float32))
    X, dY, A, B = (t.double() for t in (case.input, case.grad_output, case.lora_A, case.lora_B))
    G = (dY.T @ X) * (case.weight != 0)
    plain = (case.grad_output.float().T @ case.input.float()) * (case.weight != 0)
    _, grad_lora_A, grad_lora_B, _ = case.linear_backward("exact")
    for got, torchs, exact in (
        (grad_lora_A, case.lora_B.T @ plain, B.T @ G),
        (grad_lora_B, plain @ case.lora_A.T, G @ A.T),
    ):
        exact = case.scaling * exact
        error, limit = ((t.double() - exact).norm() for t in (got, case.scaling * torchs))
        assert error <= 1.1 * limit


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])  # CPU tensors in float32 would be kept compressed
def test_a_merge_that_was_made_ahead_gives_the_same_bits(ops, seed, dtype, layout, gradient):
    """What lors_cuda.prefetch does: the operators' own merge, queued earlier; with it they launch one kernel less."""
    case = make_case(seed, 9, 12, 36, 3, dtype, layout=layout)
    alone = [case.linear(gradient), *case.linear_backward(gradient, (True, False, False))]
    merged = ops.merged_operand(*case.stored, case.lora_A, case.lora_B, case.scaling, dtype, 9)
    before = launches(ops)
    args = (*case.stored, case.lora_A, case.lora_B, None, case.scaling, gradient)
    given = [ops.linear(case.input, *args, merged)]
    given += ops.linear_backward(case.grad_output, None, *args, True, False, False, merged)
    assert launches(ops) == before + 2  # the matmuls
    assert all(torch.equal(a, b) for a, b in zip(given, alone, strict=True))


@pytest.mark.parametrize("fused", ["always", "never"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "grid", [("int4", 32, False), ("int8", 64, False), ("e4m3", None, True)], ids=lambda grid: grid[0]
)
def test_quantised_weights(ops, monkeypatch, seed, fused, grid, layout):
    """Merged, then multiplied, whatever LORS_CUDA_FUSED says; on the grid of their codes too."""
    monkeypatch.setenv("LORS_CUDA_FUSED", fused)
    for dtype in (torch.float32, torch.bfloat16):
        weight, case = problem(seed, grid, layout, dtype=dtype)
        adapted = (*stored(weight), case.lora_A, case.lora_B)
        as_they_are = weight.quantization.arguments()
        check_merge(ops.merge(*adapted, case.scaling, *NO_DRAWS, *as_they_are), case)
        bias = case.bias.to(dtype)
        given = (*adapted, bias, case.scaling)
        case = case.replace(bias=bias)
        check_linear(ops.linear(case.input, *given, "lors", None, *NO_DRAWS, *as_they_are), case)
        for gradient in ("lors", "exact"):
            more = (gradient, True, True, True, None, *NO_DRAWS, *as_they_are)
            check_linear_backward(ops.linear_backward(case.grad_output, case.input, *given, *more), case, gradient)
        moved = on_grid(weight, -1 if grid[0] == "e4m3" else 3)
        merged = ops.merge(*adapted, case.scaling, *NO_DRAWS, *moved)
        # The sums differ from the CPU's, and with them a code at a tie.
        on_the_cpu = torch.ops.lors.merge(*adapted, case.scaling, *NO_DRAWS, *moved)
        assert (merged != on_the_cpu).float().mean() <= 1e-3
        assert not torch.equal(merged, ops.merge(*adapted, case.scaling, *NO_DRAWS, *as_they_are))
        of_merged = case.replace(weight=merged.to(dtype), lora_B=torch.zeros_like(case.lora_B))
        check_linear(ops.linear(case.input, *given, "lors", None, *NO_DRAWS, *moved), of_merged)


def test_no_tokens(ops, seed):
    case = make_case(seed, 0, 12, 33, 3, torch.bfloat16, bias=True)
    assert case.linear().shape == (0, 12)
    for grad in case.linear_backward("exact"):
        assert grad.numel() == 0 or not grad.any()
    case.merge()


def test_the_grad_of_a_bias_is_rounded_once_under_autocast_too(ops, seed):
    case = make_case(seed, 500, 12, 33, 3, torch.bfloat16, bias=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case.bias = case.bias.to(dtype)
        plain = case.linear_backward("lors", (False, False, False))[3]
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(case.linear_backward("lors", (False, False, False))[3], plain)
        assert torch.equal(plain, case.grad_output.float().sum(0).to(dtype))
    case.merge()


def test_refusals_are_the_cpus(ops, seed):
    """The checks are the same code; a refused call leaves no guard behind."""
    case = make_case(seed, 5, 6, 33, 3)
    with pytest.raises(RuntimeError, match=r"lors::linear: lora_A has shape \[3, 32\]; it must be \[r, 33\]"):
        case.replace(lora_A=case.lora_A[:, :-1]).linear()
    case.linear()


# ---- experts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stacks(ops, monkeypatch):
    """The same for everything that `Stack` calls."""
    monkeypatch.setattr(stack_cases, "lors", ops)
    return ops


@pytest.mark.parametrize(("layout", "explicit"), [("dense", False), ("dense", True), ("2:4", False), ("bitmap", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", ["", "never"])
def test_experts(stacks, monkeypatch, seed, fused, dtype, layout, explicit):
    """Dense weights, and 2:4 ones of 16 bits, in one call; the others, and a bitmap for whose values the made-up device
    has too little shared memory, merged an expert or two at a time."""
    monkeypatch.setenv("LORS_CUDA_FUSED", fused)
    for tokens in (None, 16):
        stack = make_stack(seed, dtype=dtype, layout=layout, explicit_mask=explicit, tokens=tokens)
        before = launches(stacks)
        output = stack.linear()
        at_once = not fused and (layout == "dense" or (layout == "2:4" and dtype == torch.bfloat16))
        merged_at_once = 4096 // (12 * 64 * dtype.itemsize)
        assert launches(stacks) == before + (1 if at_once else 5 + -(-5 // merged_at_once))
        stack.check(output, stack.linear_backward("lors"), "lors")


@pytest.mark.parametrize("counts", [(32, 0, 0), (0, 0), (300,), (0, 90, 0, 1)])
def test_routings(stacks, seed, counts):
    stack = make_stack(seed, counts, layout="bitmap", dtype=torch.bfloat16)
    stack.check(stack.linear(), stack.linear_backward("lors"), "lors")


def test_experts_without_an_adapter_or_merged_before(stacks, seed):
    for layout in ("dense", "2:4"):
        stack = make_stack(seed, layout=layout)
        merged = stacks.merged_operand(*stack.adapted, stack.scaling, torch.float32, 30)
        stack.check(stack.linear(merged=merged), stack.linear_backward("lors", merged=merged), "lors")
        bare = dataclasses.replace(stack, lora_A=stack.lora_A[:, :0], lora_B=stack.lora_B[..., :0])
        nothing = dataclasses.replace(stack, lora_B=torch.zeros_like(stack.lora_B))
        torch.testing.assert_close(bare.linear(), nothing.linear())


def test_experts_of_two_dtypes(stacks, seed):
    stack = make_stack(seed, dtype=torch.bfloat16)
    stack.grad_output = stack.grad_output.half()
    stack.experts = [case.replace(grad_output=case.grad_output.half()) for case in stack.experts]
    _, dA, dB, _ = stack.linear_backward("lors")
    for e, case in enumerate(stack.experts):
        check_adapter_grads(dA[e], dB[e], case, "lors")


def test_what_experts_have_not_on_cuda_is_a_sentence(stacks, seed):
    stack = make_stack(seed)
    with pytest.raises(RuntimeError, match="how many rows each expert has; use gradient='lors', or the CPU"):
        stack.linear_backward("exact")
    stack.linear_backward("exact", (True, False, False))
    double = make_stack(seed, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="was given float64; convert the tensors or move them to the CPU"):
        double.linear()
