# SPDX-License-Identifier: Apache-2.0
"""The CPU's scratch memory lives on: no page faults from the second call on, bounded, never part of a result."""

from __future__ import annotations

import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from cases import make_case
from lors_cuda import LoRSLinear, SparseWeight, lors_linear, merge, release_scratch

N = K = 2048  # the merged weight in float32: 16 MiB, 4096 pages
MANY = 1040  # tokens: too many for matmuls with the merge inside, which have no scratch of the weight's size


def minor_faults(call: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# Beyond 32 MiB the C library maps fresh pages for every allocation, so that one per call cannot hide in its heap. The
# outputs, which are torch's, stay far below.
@pytest.mark.parametrize(
    ("dtype", "shape", "tokens"),
    [(torch.float32, (1024, 9216), MANY), (torch.bfloat16, (9216, 2048), 16)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(
    ("layout", "gradient"), [("dense", "exact"), ("2:4", "lors"), ("2:4", "exact"), ("bitmap", "lors")]
)
def test_a_second_step_meets_no_new_pages(
    dtype: torch.dtype, shape: tuple[int, int], tokens: int, layout: str, gradient: str
) -> None:
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    linear.weight.detach().view(shape[0], -1, 4)[..., ::2] = 0
    layer = LoRSLinear.from_linear(linear, r=4, layout=layout, gradient=gradient)
    input = torch.ones(tokens, shape[1], dtype=dtype, requires_grad=tokens < MANY)

    def step() -> None:
        layer(input).sum().backward()

    step()
    step()
    # The C library may take pages for the small tensors around it; the merged weight alone has 9216 of them.
    assert minor_faults(step) < 2500


def test_releasing_frees_what_the_largest_call_needed() -> None:
    release_scratch()
    layer = LoRSLinear.from_linear(torch.nn.Linear(K, N), r=4, layout="bitmap")
    for _ in range(3):
        layer(torch.ones(MANY, K, requires_grad=True)).sum().backward()
    assert N * K * 4 <= release_scratch() < 1.5 * N * K * 4
    assert release_scratch() == 0
    layer(torch.ones(MANY, K))  # allocates again
    assert release_scratch() > 0


def test_a_forward_needs_a_panel_of_the_weight_for_each_thread() -> None:
    release_scratch()
    layer = LoRSLinear.from_linear(torch.nn.Linear(K, N), r=4, layout="bitmap")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layer(torch.ones(MANY, K))
    finally:
        torch.set_num_threads(threads)
    assert 0 < release_scratch() < N * K * 4 / 4


def test_a_smaller_call_uses_the_block_of_a_larger_one() -> None:
    release_scratch()
    small = LoRSLinear.from_linear(torch.nn.Linear(K // 2, N), r=4, layout="bitmap")
    large = LoRSLinear.from_linear(torch.nn.Linear(K, N), r=4, layout="bitmap")
    for _ in range(3):
        small(torch.ones(MANY, K // 2))
        large(torch.ones(MANY, K))
    assert release_scratch() < 1.5 * N * K * 4


def test_results_are_not_scratch() -> None:
    case = make_case(2, 16, 512, 1024, 4, layout="bitmap")
    weight = SparseWeight.from_dense(case.weight, "bitmap")
    arguments = (weight, case.lora_A, case.lora_B, 0.5)
    results: list[Tensor] = [merge(*arguments), lors_linear(case.input, *arguments)]
    copies = [t.clone() for t in results]
    for _ in range(3):
        lors_linear(-case.input, weight, 3 * case.lora_A, case.lora_B, 0.5)
        merge(weight, 3 * case.lora_A, case.lora_B, 0.5)
    release_scratch()
    for result, copy in zip(results, copies, strict=True):
        assert torch.equal(result, copy)


def test_threads_do_not_share_scratch() -> None:
    case = make_case(3, 64, 512, 1024, 4, layout="2:4")
    weight = SparseWeight.from_dense(case.weight, "2:4")
    factors = [float(i + 1) for i in range(4)]

    def linear(factor: float) -> Tensor:
        return lors_linear(case.input, weight, case.lora_A, factor * case.lora_B, 0.5)

    wanted = [linear(factor) for factor in factors]
    with ThreadPoolExecutor(len(factors)) as pool:
        for _ in range(20):
            for got, want in zip(pool.map(linear, factors), wanted, strict=True):
                assert torch.equal(got, want)
            release_scratch()  # also while others compute
