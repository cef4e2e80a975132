# SPDX-License-Identifier: Apache-2.0
"""lors::merge, lors::merge_backward and the packed masks against the float64 oracle; exact zeros off the mask."""

from __future__ import annotations

import itertools

import pytest
import torch

from cases import ADAPTER_DTYPES, FLOATS, SHAPES, lors, make_case, skip_unserved
from expectations import check_merge, check_merge_backward
from lors_cuda import reference
from lors_cuda.formats import pack_mask
from tolerance import assert_zero_off_mask

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("explicit", [False, True], ids=["implicit", "explicit"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[1:])))
def test_merge_and_its_backward(device, seed, shape, dtype, explicit):
    case = make_case(
        seed,
        *shape,
        dtype,
        device=device,
        explicit_mask=explicit,
        adapter_dtypes=ADAPTER_DTYPES[seed % len(ADAPTER_DTYPES)],
    )
    check_merge(case.merge(), case)
    grad_merged = torch.randn(case.weight.shape, generator=torch.Generator().manual_seed(seed)).to(case.weight)
    args = (*case.adapted, case.scaling)
    check_merge_backward(lors.merge_backward(grad_merged, *args), grad_merged, case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_any_density(device, seed, density, dtype):
    for explicit in (False, True):
        case = make_case(seed, 1, 31, 257, 16, dtype, device=device, density=density, explicit_mask=explicit)
        check_merge(case.merge(), case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_zero_counts_as_zero(device, dtype):
    weight = torch.tensor([[-0.0, 0.75, 0.0, -1.25, -0.0]], dtype=dtype, device=device)
    lora_A = torch.tensor([[-3.0, 2.0, -1.5, 0.5, 2.5]], device=device)
    lora_B = torch.tensor([[0.5]], device=device)
    merged = lors.merge(weight, None, None, lora_A, lora_B, 2.0)
    assert merged.tolist() == [[0.0, 2.75, 0.0, -0.75, 0.0]]
    assert_zero_off_mask(merged, weight != 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_explicit_mask_keeps_zeros_and_drops_garbage(device, dtype):
    weight = torch.tensor([[0.0, 7.5, -0.0, -2.25, 0.5]], dtype=dtype, device=device)
    mask = torch.tensor([[True, False, True, False, True]], device=device)
    lora_A = torch.tensor([[1.5, 2.0, -1.25, 0.5, 2.5]], device=device)
    lora_B = torch.tensor([[0.5]], device=device)
    merged = lors.merge(weight, pack_mask(mask), None, lora_A, lora_B, 2.0)
    assert merged.tolist() == [[1.5, 0.0, -1.25, 0.0, 3.0]]
    assert_zero_off_mask(merged, mask)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_adapters_spread_to_kept_weights_and_no_further(device, seed, bad, dtype, explicit):
    case = make_case(seed, 1, 13, 70, 3, dtype, device=device, explicit_mask=explicit)
    # In all the places a kernel could leak from: a whole column (through A) and a whole row (through B).
    case.lora_A[1, 40] = bad
    case.lora_B[5, 2] = bad
    merged, kept = case.merge(), case.kept
    assert_zero_off_mask(merged, kept)
    touched = torch.zeros_like(kept)
    touched[:, 40] = touched[5] = True
    assert not merged[kept & touched].isfinite().any()
    assert merged[~touched].isfinite().all()
    fixed = case.replace(lora_A=case.lora_A.clone(), lora_B=case.lora_B.clone())
    fixed.lora_A[1, 40] = fixed.lora_B[5, 2] = 0.5
    assert torch.equal(merged[~touched], fixed.merge()[~touched])


@pytest.mark.parametrize("dtype", FLOATS)
def test_non_finite_weights_propagate(device, seed, dtype):
    case = make_case(seed, 1, 13, 70, 3, dtype, device=device)
    case.weight[3, 7], case.weight[4, 8], case.weight[4, 9] = NAN, INF, -INF
    merged = case.merge()
    assert merged[3, 7].isnan()
    assert merged[4, 8:10].tolist() == [INF, -INF]
    assert int((~merged.isfinite()).sum()) == 3
    # Off an explicit mask they read as zero.
    masked = case.replace(mask=case.weight.isfinite() & (case.weight != 0))
    assert masked.merge().isfinite().all()
    assert_zero_off_mask(masked.merge(), masked.mask)


def one_plus(dtype: torch.dtype, weights: list[float], deltas: list[float], device: torch.device) -> torch.Tensor:
    """weight + delta through the op, with float32 adapters that give each delta exactly."""
    weight = torch.tensor([weights], dtype=dtype, device=device)
    assert weight.double().tolist() == [weights], "the test's weights must be numbers of this dtype"
    return lors.merge(
        weight, None, None, torch.tensor([deltas], device=device), torch.tensor([[0.5]], device=device), 2.0
    )


@pytest.mark.parametrize("repeat", [1, 40])  # in the tail of a vector, and in whole vectors
def test_ties_round_to_even(device, repeat):
    step, half = 2.0**-7, 2.0**-8  # of bfloat16, at 1
    weights = [1.0, 1 + step, -1.0, -1 - step, 1.0, 1.0]
    deltas = [half, half, -half, -half, half * (1 + 2**-10), half * (1 - 2**-10)]
    expected = [1.0, 1 + 2 * step, -1.0, -1 - 2 * step, 1 + step, 1.0]
    assert one_plus(torch.bfloat16, weights * repeat, deltas * repeat, device).tolist() == [expected * repeat]
    step, half = 2.0**-10, 2.0**-11  # of float16
    weights = [1.0, 1 + step, -1.0, -1 - step, 1.0, 1.0]
    deltas = [half, half, -half, -half, half * (1 + 2**-10), half * (1 - 2**-10)]
    expected = [1.0, 1 + 2 * step, -1.0, -1 - 2 * step, 1 + step, 1.0]
    assert one_plus(torch.float16, weights * repeat, deltas * repeat, device).tolist() == [expected * repeat]


@pytest.mark.parametrize("repeat", [1, 40])
def test_float16_subnormals_and_overflow(device, repeat):
    tiny = 2.0**-24
    weights = [3 * tiny, 3 * tiny, 2 * tiny, -5 * tiny, 2.0**-14, 65504.0, 65504.0, -65504.0, 60000.0]
    deltas = [2.5 * tiny, 2.25 * tiny, -2.25 * tiny, 5 * tiny, -0.5 * tiny, 15.5, 16.0, -16.0, 9000.0]
    expected = [6 * tiny, 5 * tiny, -0.0, 0.0, 2.0**-14, 65504.0, INF, -INF, INF]
    merged = one_plus(torch.float16, weights * repeat, deltas * repeat, device)
    assert merged.tolist() == [expected * repeat]


@pytest.mark.parametrize("repeat", [1, 40])
def test_bfloat16_overflow_and_large_values(device, repeat):
    largest = torch.finfo(torch.bfloat16).max
    merged = one_plus(
        torch.bfloat16, [largest, largest, -largest] * repeat, [2.0**118, 2.0**120, -(2.0**120)] * repeat, device
    )
    assert merged.tolist() == [[largest, INF, -INF] * repeat]


def test_a_float64_sum_is_rounded_once_to_16_bit_adapters(device):
    skip_unserved(device, torch.float64)
    # dB = G A^T here is 1 + 2^-8 + 2^-40: just above bfloat16's tie, which float32 would hide and round down to even.
    G = torch.tensor([[1.0, 2.0**-8, 2.0**-40]], dtype=torch.float64, device=device)
    lora_A = torch.ones(1, 3, dtype=torch.float64, device=device)
    lora_B = torch.tensor([[0.25]], dtype=torch.bfloat16, device=device)
    _, grad_lora_B = lors.merge_backward(G, torch.full_like(G, 1.5), None, None, lora_A, lora_B, 1.0)
    assert grad_lora_B.tolist() == [[1 + 2.0**-7]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(device, seed, dtype):
    """Transposed, sliced and expanded arguments give what their row-major copies give, bit for bit."""
    case = make_case(seed, 1, 31, 70, 5, dtype, device=device, explicit_mask=True)
    bits = case.bits
    expected = lors.merge(case.weight, bits, None, case.lora_A, case.lora_B, case.scaling)
    padded = torch.full((62, 141), 9.5, dtype=dtype, device=device)
    padded[::2, 1::2] = case.weight
    padded_bits = torch.full((31, 2 * bits.shape[1]), -1, dtype=torch.int32, device=device)
    padded_bits[:, ::2] = bits
    weights = (case.weight.T.contiguous().T, padded[::2, 1::2])
    adapters = (case.lora_A.T.contiguous().T, case.lora_B.T.contiguous().T)
    for weight, mask in itertools.product(weights, (bits.T.contiguous().T, padded_bits[:, ::2])):
        assert not weight.is_contiguous()
        assert not mask.is_contiguous()
        assert torch.equal(lors.merge(weight, mask, None, *adapters, case.scaling), expected)
    A = case.lora_A[:1].expand(5, 70)
    assert torch.equal(
        lors.merge(case.weight, bits, None, A, case.lora_B, 1.5),
        lors.merge(case.weight, bits, None, A.clone(), case.lora_B, 1.5),
    )
    G = torch.randn(70, 31, generator=torch.Generator().manual_seed(seed)).to(case.weight).T
    args = (case.lora_A, case.lora_B, case.scaling)
    for ours, theirs in zip(
        lors.merge_backward(G, weights[0], padded_bits[:, ::2], None, adapters[0], adapters[1], case.scaling),
        lors.merge_backward(G.contiguous(), case.weight, bits, None, *args),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_bits_beyond_the_last_column_are_not_read(device, seed):
    case = make_case(seed, 1, 13, 70, 3, device=device, explicit_mask=True)
    bits = case.bits
    noisy = bits.clone()
    noisy[:, -1] |= -1 << (70 - 64)
    args = (case.lora_A, case.lora_B, case.scaling)
    assert torch.equal(lors.merge(case.weight, noisy, None, *args), lors.merge(case.weight, bits, None, *args))


def test_the_oracle_is_the_paper_written_out():
    """reference.merge and its gradients by hand, weight by weight: the truth itself is checked once."""
    case = make_case(3, 4, 3, 5, 2, torch.float64)
    merged = reference.merge(case.weight, case.lora_A, case.lora_B, 0.75)
    for n, k in itertools.product(range(3), range(5)):
        delta = sum(float(case.lora_B[n, p]) * float(case.lora_A[p, k]) for p in range(2))
        expected = float(case.weight[n, k]) + 0.75 * delta if case.weight[n, k] != 0 else 0.0
        assert merged[n, k].item() == pytest.approx(expected, rel=1e-14)
    inputs = [case.input, case.lora_A.requires_grad_(), case.lora_B.requires_grad_()]
    output = inputs[0] @ torch.where(case.kept, case.weight + 0.75 * inputs[2] @ inputs[1], 0.0).T
    grads = torch.autograd.grad(output, inputs[1:], case.grad_output)
    exact = reference.linear_backward(
        case.grad_output, case.input, case.weight, *(t.detach() for t in inputs[1:]), 0.75, gradient="exact"
    )
    torch.testing.assert_close(exact[1], grads[0])
    torch.testing.assert_close(exact[2], grads[1])
    full = case.replace(weight=torch.full_like(case.weight, 1.5), lora_A=inputs[1].detach(), lora_B=inputs[2].detach())
    args = (full.grad_output, full.input, full.weight, full.lora_A, full.lora_B, 0.75)
    for a, b in zip(*(reference.linear_backward(*args, gradient=g) for g in ("lors", "exact")), strict=True):
        torch.testing.assert_close(a, b)  # without a zero in the weight the two gradients are one
