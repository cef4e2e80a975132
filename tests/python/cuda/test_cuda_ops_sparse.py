# SPDX-License-Identifier: Apache-2.0
"""2:4 products on the sparse tensor cores of a GPU; skipped, with the reason, where there are none.

The same without a GPU: test_sparse_products.py.
"""

from __future__ import annotations

import pytest
import torch

import lors_cuda
from cases import Case, lors, make_case
from expectations import check_linear, check_linear_backward
from lors_cuda import SparseWeight, sparse_product

T, N, K, R = 256, 512, 768, 16
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def device(gpu):
    reason = sparse_product.sparse_product_reason(gpu)
    if reason is not None:
        pytest.skip(reason)
    lors_cuda.plan_cache_clear()
    yield gpu
    lors_cuda.plan_cache_clear()


def problem(seed: int, device: torch.device, dtype: torch.dtype, *, transposable: bool = False, bias: bool = False):
    """A case, and its weight as it is stored."""
    case = make_case(seed, T, N, K, R, dtype, device=device, layout="2:4", bias=bias)
    if transposable:
        diagonals = ((torch.arange(N)[:, None] + torch.arange(K)) % 2).bool().to(device)
        case.weight = torch.where(diagonals, torch.randn(N, K, device=device).to(dtype), 0.0)
    return case, SparseWeight.from_dense(case.weight, "2:4")


def linear(case: Case, weight: SparseWeight, products: str, in_place: bool = True) -> torch.Tensor:
    adapted = (weight.values, None, weight.index, case.lora_A, case.lora_B, case.bias, case.scaling, "lors")
    metadata = weight.library_metadata if in_place else None
    return lors.linear(case.input, *adapted, None, metadata, weight.transposable, products)


def backward(case: Case, weight: SparseWeight, products: str) -> tuple[torch.Tensor, ...]:
    adapted = (weight.values, None, weight.index, case.lora_A, case.lora_B, case.bias, case.scaling, "lors")
    needs = (True, True, True)
    return lors.linear_backward(case.grad_output, case.input, *adapted, *needs, None, weight.transposable, products)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_values_stand_where_ours_do(device, seed, dtype):
    """Not documented. Where this fails, products still work, compressing at every call; then the docs must say so."""
    _, weight = problem(seed, device, dtype)
    assert weight.library_metadata is not None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(device, seed, dtype, in_place, bias):
    case, weight = problem(seed, device, dtype, bias=bias)
    for products in ("sparse", "auto", "auto", "dense"):
        check_linear(linear(case, weight, products, in_place), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_a_transposable_mask(device, seed, dtype):
    case, weight = problem(seed, device, dtype, transposable=True, bias=True)
    assert weight.transposable
    for products in ("sparse", "auto", "auto", "dense"):
        check_linear_backward(backward(case, weight, products), case, "lors")


def test_choices_are_the_faster_way_and_survive_in_a_file(device, seed, tmp_path):
    case, weight = problem(seed, device, torch.bfloat16)
    linear(case, weight, "auto")
    (choice,) = lors_cuda.plan_cache_info().choices
    assert choice.note == ""
    assert (choice.products == "sparse") == (choice.sparse_us < choice.dense_us)
    lors_cuda.save_product_choices(tmp_path / "choices.json")
    lors_cuda.plan_cache_clear()
    assert lors_cuda.load_product_choices(tmp_path / "choices.json") == 1
    check_linear(linear(case, weight, "auto"), case)
    info = lors_cuda.plan_cache_info()
    assert (info.searches, info.choices) == (0, (choice,))


def test_a_warm_product_in_a_cuda_graph(device, seed):
    case, weight = problem(seed, device, torch.bfloat16, transposable=True, bias=True)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        linear(case, weight, "sparse")
        backward(case, weight, "sparse")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        Y, grads = linear(case, weight, "sparse"), backward(case, weight, "sparse")
    other, _ = problem(seed + 1, device, torch.bfloat16)
    for name in ("input", "grad_output", "lora_A", "lora_B"):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    check_linear(Y, case)
    check_linear_backward(grads, case, "lors")


def test_many_streams_and_plans(device, seed):
    """More plans than one, on streams of their own: each result is its own product's."""
    pairs = [problem(seed + i, device, dtype) for i, dtype in enumerate(DTYPES * 2)]
    streams = [torch.cuda.Stream(device) for _ in pairs]
    torch.cuda.synchronize(device)
    results = []
    for _ in range(3):
        for stream, (case, weight) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                results.append((case, linear(case, weight, "sparse")))
    torch.cuda.synchronize(device)
    for case, Y in results:
        check_linear(Y, case)
