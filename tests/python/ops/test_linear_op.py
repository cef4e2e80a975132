# SPDX-License-Identifier: Apache-2.0
"""lors::linear and lors::linear_backward against the float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

from cases import ADAPTER_DTYPES, FLOATS, SHAPES, floats, make_case
from expectations import check_adapter_grads, check_grad_bias, check_grad_input, check_linear, check_linear_backward
from lors_cuda import SparseWeight, lors_linear, reference
from tolerance import relative_error

GRADIENTS = ("lors", "exact")


def combinations() -> list:
    """Every (dtype, mask form, gradient, bias) three times over, shapes and adapter dtypes rotating beneath them."""
    forms = list(itertools.product(FLOATS, (False, True), GRADIENTS, (False, True))) * 3
    return [
        pytest.param(
            SHAPES[(7 * i) % len(SHAPES)],
            dtype,
            explicit,
            gradient,
            bias,
            ADAPTER_DTYPES[(i // 2) % len(ADAPTER_DTYPES)],
            id=f"{i}-{'x'.join(map(str, SHAPES[(7 * i) % len(SHAPES)]))}-{str(dtype)[6:]}-{gradient}",
        )
        for i, (dtype, explicit, gradient, bias) in enumerate(forms)
    ]


def test_combinations_cover_every_shape_and_every_pair():
    seen = [c.values for c in combinations()]
    assert {c[0] for c in seen} == set(SHAPES)
    assert {(c[1], c[5]) for c in seen} == set(itertools.product(FLOATS, ADAPTER_DTYPES))
    assert len({c[1:5] for c in seen}) == 32


@pytest.mark.parametrize(("shape", "dtype", "explicit", "gradient", "bias", "adapter_dtypes"), combinations())
def test_linear_and_its_backward(device, seed, shape, dtype, explicit, gradient, bias, adapter_dtypes):
    case = make_case(
        seed, *shape, dtype, device=device, explicit_mask=explicit, bias=bias, adapter_dtypes=adapter_dtypes
    )
    check_linear(case.linear(gradient), case)
    check_linear_backward(case.linear_backward(gradient), case, gradient)


@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
@pytest.mark.parametrize(("shape", "dtype", "explicit", "gradient", "bias", "adapter_dtypes"), combinations()[:32])
def test_compressed_layouts(device, seed, layout, shape, dtype, explicit, gradient, bias, adapter_dtypes):
    T, N, K, r = shape
    K += -K % 4 if layout == "2:4" else 0
    case = make_case(
        seed,
        *(T, N, K, r),
        dtype,
        device=device,
        explicit_mask=explicit,
        bias=bias,
        adapter_dtypes=adapter_dtypes,
        layout=layout,
    )
    check_linear(case.linear(gradient), case)
    check_linear_backward(case.linear_backward(gradient), case, gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_gradients_over_several_panels(device, seed, dtype, gradient):
    # dY^T X is formed in panels of 2^20 elements: this one has three, the last of them short.
    case = make_case(seed, 5, 700, 3100, 4, dtype, device=device, explicit_mask=dtype == torch.bfloat16)
    check_linear_backward(case.linear_backward(gradient), case, gradient)


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 1040), (torch.bfloat16, 40), (torch.float16, 40)])
@pytest.mark.parametrize("r", [0, 3])
def test_forward_over_several_panels_of_the_weight(device, seed, layout, dtype, tokens, r):
    # Of so many tokens the CPU merges 2 MiB of the weight's rows for each thread at a time, at least two parts of this one.
    case = make_case(
        seed, tokens, 1200, 1028, r, dtype, device=device, layout=layout, explicit_mask=layout == "dense", bias=True
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output = case.linear()
    finally:
        torch.set_num_threads(threads)
    check_linear(output, case)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(("activation", "weight"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_activations_in_another_dtype_than_the_weight(device, seed, activation, weight, explicit):
    # What autocast asks for: the merged weight is rounded once, to the activations' dtype.
    case = make_case(
        seed, 17, 48, 70, 16, weight, device=device, explicit_mask=explicit, bias=True, activation_dtype=activation
    )
    check_linear(case.linear(), case)
    for gradient in GRADIENTS:
        check_linear_backward(case.linear_backward(gradient), case, gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)))
def test_backward_gives_what_is_wanted_and_nothing_else(device, seed, needs, gradient):
    case = make_case(seed, 17, 31, 33, 3, bias=needs[0], device=device)
    grad_input, grad_lora_A, grad_lora_B, grad_bias = case.linear_backward(gradient, needs)
    if needs[0]:
        check_grad_input(grad_input, case)
        check_grad_bias(grad_bias, case)
    else:
        assert grad_input.shape == (0, 33)
        assert grad_bias.shape == (0,)
    assert grad_lora_A.shape == (3 if needs[1] else 0, 33)
    assert grad_lora_B.shape == (31 if needs[2] else 0, 3)
    check_adapter_grads(grad_lora_A if needs[1] else None, grad_lora_B if needs[2] else None, case, gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_tokens_give_zero_gradients(device, seed, gradient):
    case = make_case(seed, 0, 12, 33, 3, bias=True, device=device)
    for grad, shape in zip(case.linear_backward(gradient), [(0, 33), (3, 33), (12, 3), (12,)], strict=True):
        assert grad.shape == shape
        assert not grad.any()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_masks(device, seed, density, gradient):
    for dtype in floats(device):
        case = make_case(seed, 17, 12, 70, 16, dtype, device=device, bias=True, density=density)
        check_linear(case.linear(), case)
        check_linear_backward(case.linear_backward(gradient), case, gradient)


@pytest.mark.parametrize("scaling", [0.7, -2.0, 1e-3, 0.0, 4096.0])
def test_any_scaling(device, seed, scaling):
    # Few enough elements that the rounding of 0.7 and 1e-3 to float32, common to all, is within the signed-bias bound.
    case = make_case(seed, 9, 11, 33, 3, device=device, scaling=scaling)
    check_linear(case.linear(), case)
    for gradient in GRADIENTS:
        check_linear_backward(case.linear_backward(gradient), case, gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_as_accurate_as_the_plain_formula(device, seed, dtype, gradient):
    """Error against float64 at most 1.1 x plain torch's: merged rounded once, product in float32, rounded once."""
    case = make_case(seed, 160, 384, 640, 16, dtype, device=device)
    X, W, dY = case.input.float(), case.weight.float(), case.grad_output.float()
    A, B, s = case.lora_A.float(), case.lora_B.float(), case.scaling
    merged = torch.where(case.kept, W + s * (B @ A), 0.0).to(dtype).float()
    if gradient == "exact":
        G = torch.where(case.kept, dY.T @ X, 0.0)
        adapter_grads = (s * B.T @ G, s * G @ A.T)
    else:
        adapter_grads = (s * (dY @ B).T @ X, s * dY.T @ (X @ A.T))
    plain = [t.to(dtype) for t in (X @ merged.T, dY @ merged, *adapter_grads)]
    ours = (case.linear(gradient), *case.linear_backward(gradient)[:3])
    X, W, A, B, dY = (t.cpu() for t in (case.input, case.weight, case.lora_A, case.lora_B, case.grad_output))
    gradients = reference.linear_backward(dY, X, W, A, B, s, gradient=gradient)[:3]
    expected = (reference.linear(X, W, A, B, s), *gradients)
    for name, a, p, e in zip(("Y", "dX", "dA", "dB"), ours, plain, expected, strict=True):
        ratio = relative_error(a, e) / relative_error(p, e)
        assert ratio <= 1.1, f"{name}: {ratio:.3f} x the error of the plain formula"


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_sees_exactly_the_16_bit_merged_weight(device, seed, dtype, weight_dtype):
    """Where a float32 sum is exact, the output is that of the merged weight rounded once: bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    N, K, r, T = 31, 70, 3, 17

    def uniform(*size: int) -> torch.Tensor:
        return 2 * torch.rand(size, generator=generator) - 1

    # |merged| in (1/2, 2), a multiple of 2^-8 or 2^-11 after rounding; activations odd multiples of 1/8 up to 15/8 (1/2
    # up to 3/2 for float16): sums of 70 products have at most 24 bits.
    w, u = uniform(N, K), uniform(N, K)
    weight = torch.where(u < 0, w.sign() * (0.9 + 0.3 * w.abs()), 0.0)
    lora_A, lora_B = uniform(r, K), 0.15 * uniform(N, r)
    levels, step = (8, 8) if dtype == torch.bfloat16 else (2, 2)
    activations = (2 * torch.randint(-levels, levels, (T + N, max(N, K)), generator=generator) + 1) / step
    X, dY = activations[:T, :K], activations[:T, :N]

    weight, lora_A, lora_B, X, dY = (t.to(device) for t in (weight.to(weight_dtype), lora_A, lora_B, X, dY))
    scaling = 0.625
    merged = torch.ops.lors.merge(weight, None, None, lora_A, lora_B, scaling).float()
    if weight_dtype != dtype:  # merged from a float32 accumulator, rounded once: not through the weight's dtype
        merged = torch.ops.lors.merge(weight.float(), None, None, lora_A, lora_B, scaling)
    rounded = merged.to(dtype).float()
    kept = merged[weight != 0].abs()
    assert kept.min() > 0.5
    assert kept.max() < 2
    output = torch.ops.lors.linear(X.to(dtype), weight, None, None, lora_A, lora_B, None, scaling, "lors")
    assert torch.equal(output, (X @ rounded.T).to(dtype))
    assert not torch.equal(output, (X @ merged.T).to(dtype)) or torch.equal(merged, rounded), "the data would not tell"
    needs = (True, False, False)
    args = (weight, None, None, lora_A, lora_B, None, scaling, "lors", *needs)
    grad_input = torch.ops.lors.linear_backward(dY.to(dtype), None, *args)[0]
    assert torch.equal(grad_input, (dY @ rounded).to(dtype))


def test_large_values_overflow_to_infinity_in_float16(device):
    weight = torch.tensor([[300.0, 0.0], [-300.0, 2.5]], dtype=torch.float16, device=device)
    lora_A = torch.tensor([[0.25, 0.5]], device=device)
    lora_B = torch.tensor([[0.5], [-0.25]], device=device)
    X = torch.tensor([[250.0, 1.5], [20.0, 3.0]], dtype=torch.float16, device=device)
    Y = torch.ops.lors.linear(X, weight, None, None, lora_A, lora_B, None, 0.5, "lors")
    assert Y[0].tolist() == [float("inf"), -float("inf")]
    assert Y[1].isfinite().all()


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 1100])  # every path of the CPU
def test_merged_values_are_rounded_before_the_matmul(device, tokens, layout):
    """1 + 2^-10 is 1 in bfloat16, so that 1 (1 + 2^-10) - 1 * 1 is 0, and 2^-10 where nothing is rounded."""
    dense = torch.zeros(3, 64, dtype=torch.bfloat16, device=device)
    dense[:, :2] = 1
    weight = SparseWeight.from_dense(dense, layout)
    lora_A = torch.zeros(1, 64, device=device)
    lora_A[0, 0] = 2.0**-10
    input = torch.zeros(tokens, 64, dtype=torch.bfloat16, device=device)
    input[:, 0], input[:, 1] = 1, -1
    output = lors_linear(input, weight, lora_A, torch.ones(3, 1, device=device), 1.0)
    assert torch.equal(output, torch.zeros_like(output))
