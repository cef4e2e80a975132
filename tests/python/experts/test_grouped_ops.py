# SPDX-License-Identifier: Apache-2.0
"""The operators of mixtures of experts, against the float64 oracle of each expert."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
from quantised_cases import make as make_quantised
from quantised_cases import values_of
from stack_cases import Stack, make_stack
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vmap

import lors_cuda
from cases import FLOATS, lors
from expectations import check_grad_input, check_linear, check_merge, check_merge_backward
from lors_cuda import grouped_linear, reference
from lors_cuda._autograd_grouped import assert_equally_often
from lors_cuda._library import FEW_TOKENS
from lors_cuda._merged_weight import MergedWeight
from lors_cuda.functional import layer_grouped_linear

every_layout = pytest.mark.parametrize(
    ("layout", "explicit"), [("dense", False), ("dense", True), ("2:4", False), ("bitmap", True)]
)
every_gradient = pytest.mark.parametrize("gradient", ["lors", "exact"])


def check(stack: Stack, gradient: str, **more: object) -> None:
    stack.check(stack.linear(gradient, **more), stack.linear_backward(gradient, **more), gradient)


# ---- against the oracle --------------------------------------------------------------------------------------------


@every_layout
@every_gradient
@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts_and_dtypes(device, seed, dtype, gradient, layout, explicit):
    check(make_stack(seed, dtype=dtype, layout=layout, explicit_mask=explicit, device=device), gradient)


@every_gradient
@pytest.mark.parametrize("counts", [(32, 0, 0), (0, 0, 32), (0, 1, 17, 14), (8, 8, 8, 8), (0, 0), (1030, 0, 2), (32,)])
def test_routings(device, seed, counts, gradient):
    """All rows to one expert; none at all; one for each; so many that the float32 matmul merges first."""
    check(make_stack(seed, counts, layout="bitmap", device=device), gradient)


@every_gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [16, 32])
def test_gathered_rows(device, seed, tokens, dtype, gradient):
    check(make_stack(seed, dtype=dtype, layout="2:4", tokens=tokens, device=device), gradient)


@every_gradient
def test_no_rows(device, seed, gradient):
    stack = make_stack(seed, (0, 0, 0), rest=0, layout="2:4", device=device)
    check(stack, gradient)
    none = stack.offsets.new_empty(0)
    some = dataclasses.replace(stack, rows=none, input=torch.ones(4, 64, device=device))
    check(some, gradient)


@every_gradient
@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_by_panels(device, seed, layout, gradient):
    """Experts so large that their merge, and the gradient of the weight, is made in several panels of rows."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    check(make_stack(seed, (2, 3), (1100, 1024, 2), dtype, layout=layout, device=device), gradient)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_dtypes_of_their_own(device, seed, dtypes):
    adapter, weight = dtypes
    check(make_stack(seed, dtype=weight, adapter_dtypes=(adapter, adapter), device=device), "lors")


@every_gradient
def test_strides(device, seed, gradient):
    stack = make_stack(seed, layout="bitmap", device=device)
    weight, mask, index = stack.stored

    def strided(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, -1)[..., ::2]

    names = ("input", "grad_output", "lora_A", "lora_B", "bias", "offsets")
    views = {name: strided(getattr(stack, name)) for name in names}
    check(dataclasses.replace(stack, **views, stored=(strided(weight), strided(mask), strided(index))), gradient)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_unwanted_gradients(device, seed, needs):
    stack = make_stack(seed, layout="2:4", device=device)
    all_of_them, some = stack.linear_backward("lors"), stack.linear_backward("lors", needs)
    for is_needed, one, all_one in zip((*needs, True), some, all_of_them, strict=True):
        assert torch.equal(one, all_one) if is_needed else one.numel() == 0


@every_layout
@pytest.mark.parametrize("counts", [(1, 0, 2), (30, 0, 12)])
def test_without_an_adapter(device, seed, counts, layout, explicit):
    """r = 0: a stack that is frozen."""
    stack = make_stack(seed, counts, layout=layout, explicit_mask=explicit, device=device)
    cases = [case.replace(lora_A=case.lora_A * 0, lora_B=case.lora_B * 0) for case in stack.experts]
    stack = dataclasses.replace(stack, experts=cases, lora_A=stack.lora_A[:, :0], lora_B=stack.lora_B[..., :0])
    output, grad_input = stack.linear(), stack.linear_backward("lors", (True, False, False))[0]
    for own, case in zip(stack.own(), cases, strict=True):
        check_linear(output[own], case)
        check_grad_input(grad_input[own], case)


# ---- merges of a stack ---------------------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_and_its_backward(device, seed, dtype, layout, explicit):
    stack = make_stack(seed, dtype=dtype, layout=layout, explicit_mask=explicit, device=device)
    N, K = stack.lora_B.shape[1], stack.lora_A.shape[2]
    merged = lors.merge(*stack.adapted, stack.scaling).view(-1, N, K)
    G = torch.randn(len(stack.experts), N, K, device=device).to(dtype)
    grads = lors.merge_backward(G.flatten(0, 1), *stack.adapted, stack.scaling)
    for e, case in enumerate(stack.experts):
        check_merge(merged[e], case)
        check_merge_backward((grads[0][e], grads[1][e]), G[e], case)
    stored = stack.weight.merge(stack.lora_A, stack.lora_B, stack.scaling)
    assert torch.equal(stored.to_dense(), merged.flatten(0, 1) + 0.0)


@every_layout
@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_the_merged_weight(device, seed, dtype, tokens, layout, explicit):
    stack = make_stack(seed, dtype=dtype, layout=layout, explicit_mask=explicit, device=device)
    merged = lors.merged_operand(*stack.adapted, stack.scaling, dtype, tokens)
    assert (merged.shape == stack.stored[0].shape) or merged.shape == (60, 64)
    if tokens <= FEW_TOKENS and layout != "dense" and device.type == "cpu":
        assert merged.shape == stack.stored[0].shape
    check(stack, "lors", merged=merged)
    off = dataclasses.replace(stack, lora_B=torch.full_like(stack.lora_B, torch.nan))  # it is that which is read
    assert torch.equal(off.linear(merged=merged), stack.linear(merged=merged))


def block_diagonal(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The adapter of one matrix [E N, K] that is the same: lora_A [E r, K], lora_B [E N, E r]."""
    return lora_A.flatten(0, 1), torch.block_diag(*lora_B)


GRIDS = [("int4", 32, False), ("int8", None, True), ("e4m3", 32, True)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid[0])
@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_quantised(device, seed, layout, grid):
    stack = make_stack(seed, explicit_mask=True, device=device)
    E, (N, K) = len(stack.experts), stack.experts[0].weight.shape
    weight = make_quantised(seed, E * N, K, grid, layout, device=device)
    values, mask = values_of(weight).view(E, N, K), weight.mask().view(E, N, K)
    cases = [case.replace(weight=values[e], mask=mask[e]) for e, case in enumerate(stack.experts)]
    stored = (weight.values, weight.mask_bits, weight.index)
    stack = dataclasses.replace(stack, experts=cases, stored=stored)
    arguments = weight.quantization.arguments()
    for gradient in ("lors", "exact"):
        check(stack, gradient, grid=arguments)
    # The dither goes by a row's number among all experts' rows.
    seeds = (-1,) if grid[0] == "e4m3" else (-1, 5)
    for dither_seed in seeds:
        steps = arguments._replace(requantize_steps=1, dither_seed=dither_seed)
        merged = lors.merge(*stack.adapted, stack.scaling, None, None, 0, *steps)
        as_one = lors.merge(*stored, *block_diagonal(stack.lora_A, stack.lora_B), stack.scaling, None, None, 0, *steps)
        assert torch.equal(merged, as_one)
        for own, of_expert in zip(stack.own(), merged.view(E, N, K), strict=True):
            expected = stack.input[own].double() @ of_expert.double().T + stack.bias[stack.own().index(own)].double()
            torch.testing.assert_close(stack.linear(grid=steps)[own].double(), expected, rtol=1e-5, atol=1e-4)


# ---- what must not be read -----------------------------------------------------------------------------------------


def poisoned(stack: Stack) -> Stack:
    """NaN, and offsets that lead nowhere, in all that belongs to experts without rows."""
    weight, mask, index = stack.stored
    N = stack.lora_B.shape[1]
    weight, index = weight.clone(), None if index is None else index.clone()
    factors = [stack.lora_A.clone(), stack.lora_B.clone(), stack.bias.clone()]
    for e, own in enumerate(stack.own()):
        if own.start != own.stop:
            continue
        for factor in factors:
            factor[e] = torch.nan
        if weight.dim() == 1:
            weight[index[e * N] : index[(e + 1) * N]] = torch.nan
            index[e * N + 1 : (e + 1) * N] = 1 << 40
        else:
            weight[e * N : (e + 1) * N] = torch.nan
    A, B, bias = factors
    return dataclasses.replace(stack, stored=(weight, mask, index), lora_A=A, lora_B=B, bias=bias)


@every_layout
@every_gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_without_rows_are_not_read(device, seed, dtype, gradient, layout, explicit):
    options = {"dtype": dtype, "layout": layout, "explicit_mask": explicit, "device": device}
    stack = make_stack(seed, (0, 5, 0, 0, 12, 0), **options)
    check(poisoned(stack), gradient)
    if layout == "bitmap" and device.type == "cpu":
        moved = stack.stored[2].clone()
        moved[13] += 1
        wrong = dataclasses.replace(stack, stored=(*stack.stored[:2], moved))
        with pytest.raises(RuntimeError, match="row_offsets disagrees with the mask's bits at row 13"):
            wrong.linear()


@every_gradient
def test_scratch_of_the_last_call_is_not_read(device, seed, gradient):
    """In kept blocks, too: these experts are 256 KiB each, and more."""
    stack = make_stack(seed, (9, 40), (128, 1024, 4), torch.bfloat16, layout="2:4", tokens=17, device=device)
    bad = dataclasses.replace(stack, input=stack.input * torch.nan, lora_B=stack.lora_B * torch.nan)
    bad.linear()
    bad.linear_backward(gradient)
    check(stack, gradient)


@pytest.fixture
def set_threads():
    """torch.set_num_threads; afterwards as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_layout
@every_gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_threads_give_the_same_bits(set_threads, seed, dtype, gradient, layout, explicit):
    """With experts enough each is one thread's, outside of inference mode and autograd's modes."""
    stack = make_stack(seed, (3, 0, 17, 1, 9, 2, 5, 30, 4), dtype=dtype, layout=layout, explicit_mask=explicit)
    merged = lors.merged_operand(*stack.adapted, stack.scaling, dtype, 1)
    results = []
    for threads in (1, 3):
        set_threads(threads)
        with torch.inference_mode():
            made = (stack.linear(gradient), stack.linear(merged=merged), *stack.linear_backward(gradient))
        results.append([t.clone() for t in made])
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
    if layout == "bitmap":
        wrong = dataclasses.replace(stack, stored=(*stack.stored[:2], stack.stored[2] + 1))
        # The first expert says so, or the last one, whose thread may be sooner.
        with pytest.raises(RuntimeError, match=r"row_offsets disagrees with the mask's bits at row 0|the mask keeps"):
            wrong.linear()


def test_rows_that_occur_unequally_fail_where_the_operator_does_not_look():
    for rows, fails in (([1, 0, 2, 2, 1, 0], False), ([1, 0, 2, 2, 1, 1], True), ([0, 0, 1, 1, 3, 3], True)):
        rows = torch.tensor(rows, dtype=torch.int32)
        by_owner = rows.argsort(stable=True).view(3, 2)
        with pytest.raises(RuntimeError, match="more often") if fails else contextlib.nullcontext():
            assert_equally_often(rows, by_owner)


# ---- the function --------------------------------------------------------------------------------------------------

Function = Callable[..., Tensor]


def functions(seed: int, layout: str, tokens: int | None, device: torch.device) -> tuple[Function, Function, tuple]:
    """Ours, with exact gradients; the same in plain torch; and their arguments input, lora_A, lora_B and bias."""
    stack = make_stack(seed, (2, 0, 3), (3, 8, 2), torch.float64, layout=layout, tokens=tokens, rest=1, device=device)
    dense, scaling, rows = torch.stack([case.weight for case in stack.experts]), stack.scaling, stack.rows
    leaves = (stack.input.nan_to_num(), stack.lora_A, stack.lora_B, stack.bias)
    weight = dense if layout == "dense" else stack.weight

    def ours(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return grouped_linear(x, stack.offsets, weight, A, B, scaling, bias, gradient="exact", rows=rows)

    def plain(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        merged = torch.where(dense != 0, dense + scaling * (B @ A), 0.0)
        x = x if rows is None else x[rows]
        parts = [x[own] @ merged[e].T + bias[e] for e, own in enumerate(stack.own())]
        return torch.cat([*parts, x.new_zeros(len(x) - stack.offsets[-1], 3)])

    return ours, plain, leaves


def all_close(one: object, two: object) -> None:
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


forms = pytest.mark.parametrize(("layout", "tokens"), [("dense", None), ("2:4", 3), ("bitmap", 2), ("bitmap", None)])


@forms
def test_gradients_and_forward_mode(device, seed, layout, tokens):
    if device.type != "cpu":
        pytest.skip("float64 is computed on the CPU only")
    ours, plain, leaves = functions(seed, layout, tokens, device)
    all_close(jacrev(ours, (0, 1, 2, 3))(*leaves), jacrev(plain, (0, 1, 2, 3))(*leaves))
    all_close(jacfwd(ours, (0, 1, 2, 3))(*leaves), jacfwd(plain, (0, 1, 2, 3))(*leaves))
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    all_close(jvp(ours, leaves, tangents), jvp(plain, leaves, tangents))
    stacked = tuple(torch.stack([leaf, 2 * leaf]) for leaf in leaves)
    all_close(vmap(ours)(*stacked), vmap(plain)(*stacked))
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(ours, leaves, check_forward_ad=True, fast_mode=True)
    (grad,) = torch.autograd.grad(ours(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        grad.sum().backward()


@every_gradient
@pytest.mark.parametrize("tokens", [None, 16])
@pytest.mark.parametrize("explicit", [False, True])
def test_the_reference_agrees(seed, tokens, gradient, explicit):
    stack = make_stack(seed, dtype=torch.float64, explicit_mask=explicit, tokens=tokens, rest=2 if tokens else 0)
    weight = torch.stack([case.weight for case in stack.experts])
    mask = torch.stack([case.mask for case in stack.experts]) if explicit else None
    leaves = [t.clone().requires_grad_() for t in (stack.input, stack.lora_A, stack.lora_B, stack.bias)]
    X, A, B, bias = leaves
    more = {"mask": mask, "rows": stack.rows}
    dY = stack.grad_output.nan_to_num()
    Y = grouped_linear(X, stack.offsets, weight, A, B, stack.scaling, bias, gradient=gradient, **more)
    all_close(Y, reference.grouped_linear(X, stack.offsets, weight, A, B, stack.scaling, bias, **more))
    grads = torch.autograd.grad(Y, leaves, dY)
    args = (dY, stack.input, stack.offsets, weight, stack.lora_A, stack.lora_B, stack.scaling)
    for ours, expected in zip(grads, reference.grouped_linear_backward(*args, gradient=gradient, **more), strict=True):
        all_close(ours, expected)


def test_a_tokens_gradient_is_the_sum_over_its_rows(device, seed):
    stack = make_stack(seed, dtype=torch.bfloat16, tokens=16, rest=0, counts=(3, 0, 20, 9), device=device)
    X = stack.input.requires_grad_()
    args = (stack.offsets, stack.weight, stack.lora_A, stack.lora_B, stack.scaling)
    grouped_linear(X, *args, rows=stack.rows).backward(stack.grad_output)
    by_row = dataclasses.replace(stack, bias=None).linear_backward("lors")[0]
    order = stack.rows.argsort(stable=True).view(16, 2)
    assert torch.equal(X.grad, (by_row[order[:, 0]].float() + by_row[order[:, 1]].float()).bfloat16())


def test_autocast(device, seed):
    stack = make_stack(seed, adapter_dtypes=(torch.float32, torch.float32), device=device, rest=0)
    case, own = stack.experts[2], stack.own()[2]
    X = stack.input.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        output = grouped_linear(X, stack.offsets, stack.weight, stack.lora_A, stack.lora_B, stack.scaling, stack.bias)
    assert output.dtype == torch.bfloat16
    check_linear(output[own], case.replace(input=case.input.bfloat16()))
    output.backward(stack.grad_output.bfloat16())
    assert X.grad.dtype == torch.float32
    case = case.replace(input=case.input.bfloat16(), grad_output=case.grad_output.bfloat16())
    check_grad_input(X.grad[own].bfloat16(), case)


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_a_layers_call_under_the_merge_cache(device, seed, layout):
    stack = make_stack(seed, layout=layout, device=device)
    cache = MergedWeight()
    A, B = torch.nn.Parameter(stack.lora_A), torch.nn.Parameter(stack.lora_B)

    def call(cache: MergedWeight | None) -> Tensor:
        args = (stack.input, stack.offsets, stack.weight, A, B, stack.scaling, stack.bias, "lors")
        return layer_grouped_linear(*args, cache)

    kept = call(cache)
    assert cache.nbytes > 0
    stack.check(kept, stack.linear_backward("lors"), "lors")
    with torch.no_grad():
        A.mul_(2)  # which is seen
    torch.testing.assert_close(call(cache), call(None))


def test_merge_gives_three_dimensions(device, seed):
    stack = make_stack(seed, explicit_mask=True, device=device)
    dense = torch.stack([case.weight for case in stack.experts])
    mask = torch.stack([case.mask for case in stack.experts])
    A, B = stack.lora_A.requires_grad_(), stack.lora_B.requires_grad_()
    merged = lors_cuda.merge(dense, A, B, stack.scaling, mask=mask)
    assert merged.shape == dense.shape
    assert torch.equal(merged, lors_cuda.merge(stack.weight, A, B, stack.scaling))
    for e, case in enumerate(stack.experts):
        check_merge(merged[e], case)
    G = torch.randn_like(merged)
    grads = torch.autograd.grad(merged, (A, B), G)
    for e, case in enumerate(stack.experts):
        check_merge_backward((grads[0][e], grads[1][e]), G[e], case)


# ---- the contract of the operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "tokens"), [("dense", None), ("2:4", 16), ("bitmap", 16)])
def test_opcheck(device, seed, layout, tokens):
    stack = make_stack(seed, layout=layout, tokens=tokens, device=device)
    for activation in (stack.input, stack.grad_output):
        activation.nan_to_num_()
    leaves = {name: getattr(stack, name).requires_grad_() for name in ("input", "lora_A", "lora_B", "bias")}
    stack = dataclasses.replace(stack, **leaves)
    tail = (stack.bias, stack.scaling, "lors")
    torch.library.opcheck(
        lors.grouped_linear.default, (stack.input, stack.offsets, *stack.adapted, *tail, None, stack.rows)
    )
    torch.library.opcheck(lors.merge.default, (*stack.adapted, stack.scaling))
    plain = ("test_schema", "test_faketensor")
    for needs in ((True, True, True), (False, False, True), (False, True, False), (True, False, False)):
        args = (stack.offsets, *stack.adapted, *tail, *needs, None, stack.rows)
        activations = (stack.grad_output, stack.input.detach() if needs[1] or needs[2] else None)
        torch.library.opcheck(lors.grouped_linear_backward.default, (*activations, *args), test_utils=plain)
    G = torch.ones(60, 64, device=device)
    torch.library.opcheck(lors.merge_backward.default, (G, *stack.adapted, stack.scaling), test_utils=plain)
    for count in (1, 64):
        args = (*stack.adapted, stack.scaling, torch.float32, count)
        torch.library.opcheck(lors.merged_operand.default, args, test_utils=plain)


def ints(*numbers: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


# (what is changed, what the operator says, what the function says if that is another sentence)
REFUSALS = [
    ({"offsets": ints(3, 2, 20, 21, 30)}, r"offsets\[1\] is 2; it must be at least 3"),
    ({"offsets": ints(-1, 3, 20, 21, 30)}, r"offsets\[0\] is -1; it must be at least 0"),
    ({"offsets": ints(3, 3, 20, 21, 33)}, r"offsets\[4\] is 33; .* and at most 32"),
    ({"offsets": ints(3, 3, 20, 21)}, r"offsets .*\[4|int32 \[5\]"),
    ({"offsets": ints(3, 3, 20, 21, 30, dtype=torch.int64)}, "must be (torch.)?int32"),
    ({"offsets": ints(3, 3, 20, 21, 30).view(5, 1)}, "must be (torch.)?int32"),
    ({"rows": ints(*range(31), 32)}, r"rows\[31\] is 32; it must be at least 0 and below 32"),
    ({"rows": ints(-1, *range(31))}, r"rows\[0\] is -1"),
    ({"rows": ints(0, 0, *range(2, 32))}, "rows has row 0 of input 2 times"),
    ({"rows": torch.arange(32)}, "rows .*must be (torch.)?int32"),
    ({"rows": ints(*range(32)).view(4, 8)}, "rows .*must be (torch.)?int32"),
    ({"rows": ints(*range(20))}, r"offsets\[2\] is 20|equally often|offsets\[3\] is 21; .* at most 20"),
    ({"lora_A": torch.ones(4, 3, 64)}, r"(the same number for each|lora_B has shape \(5|lora_B has shape \[5)"),
    ({"lora_A": torch.ones(6, 3, 64)}, r"lora_B has shape [\[(]5, 12, 3[\])]; it must be [\[(]"),
    ({"lora_A": torch.ones(7, 3, 64)}, "the same (number )?for each"),
    ({"lora_A": torch.ones(3, 64)}, r"lora_A has shape [\[(]3, 64[\])]; it must be \[experts, r, 64\]"),
    ({"lora_A": torch.ones(5, 0, 64), "lora_B": torch.ones(5, 12, 0)}, "rank r must be at least 1"),
    ({"lora_B": torch.ones(60, 3)}, r"lora_B has shape [\[(]60, 3[\])]; it must be [\[(]"),
    ({"bias": torch.ones(12)}, r"bias has shape [\[(]12,?[\])]; it must be [\[(]"),
    ({"bias": torch.ones(4, 12)}, r"bias has shape [\[(]4, 12[\])]; it must be [\[(]"),
    ({"input": torch.ones(32, 63)}, "input has shape"),
    ({"input": torch.ones(2, 16, 64)}, "input has shape"),
    ({"input": torch.ones(32, 64, dtype=torch.float64)}, "float64"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSALS)
def test_refusals(changes, sentence):
    stack = dataclasses.replace(make_stack(0), **changes)
    if "rank" not in sentence:  # without an adapter the operators multiply by the stored weight
        with pytest.raises(RuntimeError, match=rf"lors::grouped_linear: .*{sentence}"):
            stack.linear()
    args = (stack.weight, stack.lora_A, stack.lora_B, stack.scaling, stack.bias)
    with pytest.raises((RuntimeError, ValueError), match=sentence):
        grouped_linear(stack.input, stack.offsets, *args, rows=stack.rows)


def test_refusals_of_the_others():
    stack = make_stack(0)
    A, B, s = stack.lora_A, stack.lora_B, stack.scaling
    with pytest.raises(RuntimeError, match=r"lora_A has shape \[5, 3, 64\]; it must be \[r, 64\]"):
        lors.linear(stack.input, *stack.adapted, None, s, "lors")
    with pytest.raises(RuntimeError, match="whose merge draws nothing"):
        lors.merge(*stack.adapted, s, 3)
    with pytest.raises(RuntimeError, match="grad_output has 31 rows and input 32"):
        lors.grouped_linear_backward(
            stack.grad_output[:31], stack.input, stack.offsets, *stack.adapted, None, s, "lors", True, True, True
        )
    needs = (True, True, False)
    with pytest.raises(RuntimeError, match="input is None"):
        lors.grouped_linear_backward(stack.grad_output, None, stack.offsets, *stack.adapted, None, s, "lors", *needs)
    with pytest.raises(RuntimeError, match="gradient is 'true'"):
        stack.linear("true")
    with pytest.raises(ValueError, match=r"weight has shape \(60, 64\); it must be \[experts, out_features"):
        grouped_linear(stack.input, stack.offsets, stack.stored[0], A, B, s)
    with pytest.raises(ValueError, match="weight has 4 experts and lora_A 5"):
        grouped_linear(stack.input, stack.offsets, torch.ones(4, 15, 64), A, B, s)
    mask = torch.ones(60, 64, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask is torch\.bool with shape"):
        grouped_linear(stack.input, stack.offsets, torch.ones(5, 12, 64), A, B, s, mask=mask)
    with pytest.raises(ValueError, match="requires grad"):
        grouped_linear(stack.input, stack.offsets, torch.ones(5, 12, 64).requires_grad_(), A, B, s)
    with pytest.raises(ValueError, match=r"lora_A has shape \(5, 3, 64\); it must be \[r, 64\]"):
        lors_cuda.lors_linear(stack.input, stack.weight, A, B, s)
    with pytest.raises(RuntimeError, match="merged has shape"):
        stack.linear(merged=torch.ones(12, 64))
