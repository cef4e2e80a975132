# SPDX-License-Identifier: Apache-2.0
"""bfloat16 matmuls inside the operators: any size, exact where the instruction flushes, the same bits on every path."""

from __future__ import annotations

import pytest
import torch

from cases import make_case
from expectations import check_adapter_grads, check_merge

BF16 = torch.bfloat16
INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1), (5, 33), (7, 64), (13, 257), (48, 132), (300, 515)]
RANKS = [1, 2, 3, 16, 64, 256]


def adapted(seed, device, N, K, r, dtype=BF16, **options):
    return make_case(seed, 9, N, K, r, dtype, device=device, adapter_dtypes=(BF16, BF16), **options)


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_merge_of_bfloat16_adapters(device, seed, shape, r, dtype):
    for explicit in (False, True):
        case = adapted(seed, device, *shape, r, dtype, explicit_mask=explicit, scaling=-1.375)
        check_merge(case.merge(), case)


# 2^-56 is where the pairs end; products below 2^-126, and adapters below it, are what the instruction takes for 0.
@pytest.mark.parametrize("exponent_A", [-54, -58, -70, -131, 50, 58, 90])
@pytest.mark.parametrize("exponent_B", [-54, -58, -70, -131, 30])
def test_merge_of_tiny_and_large_adapters(device, seed, exponent_A, exponent_B):
    case = adapted(seed, device, 7, 70, 16)
    case.weight *= 2.0 ** (exponent_A + exponent_B) if exponent_A + exponent_B > -130 else 0.0
    case.mask = torch.ones(7, 70, dtype=torch.bool, device=device)
    case.lora_A *= 2.0**exponent_A
    case.lora_B *= 2.0**exponent_B
    check_merge(case.merge(), case)


def test_one_tiny_number_among_ordinary_ones(device, seed):
    case = adapted(seed, device, 7, 70, 16)
    case.weight[:, 3] = 2.0**-130
    case.lora_A[:, 3] = 0
    case.lora_A[5, 3] = 2.0**-128
    case.lora_B[:, 5] = 1
    check_merge(case.merge(), case)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_what_is_not_finite_stays_in_its_row_and_column(device, seed, bad):
    case = adapted(seed, device, 7, 70, 16, density=1.0)
    case.lora_A[3, 40] = bad
    case.lora_B[5, 2] = bad
    merged, expected = case.merge(), case.weight + (case.lora_B.float() @ case.lora_A.float()) * case.scaling
    assert torch.equal(merged.isnan(), expected.isnan())
    assert torch.equal(merged[merged.isinf()], expected[merged.isinf()].to(BF16))
    assert merged.isfinite().sum() == 6 * 69


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
@pytest.mark.parametrize("r", [3, 16, 64])
def test_every_path_multiplies_by_the_same_merged_weight(device, seed, r, layout):
    """Y and dX of rows of the identity are the merged weight, bit for bit."""
    N, K = 45, 132
    case = adapted(seed, device, N, K, r, layout=layout)
    merged = case.merge()
    for tokens in (1, 8, 9, K):
        output = case.replace(input=torch.eye(K, dtype=BF16, device=device)[:tokens]).linear()
        assert torch.equal(output, merged.T[:tokens])
    for tokens in (1, 8, 9, N):
        rows = torch.eye(N, dtype=BF16, device=device)[:tokens]
        backward = case.replace(grad_output=rows, input=case.input[:1].expand(tokens, -1)).linear_backward("lors")
        assert torch.equal(backward[0], merged[:tokens])


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("exponent", [0, -40, -58, -120])
@pytest.mark.parametrize("shape", [(1, 5, 6, 4), (2, 8, 64, 2), (17, 33, 70, 3), (64, 130, 258, 16), (129, 31, 71, 64)])
def test_adapter_gradients_of_tiny_activations(device, seed, shape, exponent, gradient):
    for adapters in (BF16, torch.float32):
        case = make_case(seed, *shape, BF16, device=device, adapter_dtypes=(adapters, adapters), scaling=-1.375)
        case.grad_output *= 2.0**exponent
        _, *grads, _ = case.linear_backward(gradient)
        check_adapter_grads(*grads, case, gradient)
