# SPDX-License-Identifier: Apache-2.0
"""2:4 products on the sparse tensor cores without a GPU: the CUDA operators over a cuSPARSELt that computes on the CPU.

Both ways must give the oracle's result; which one ran is told by the library's calls. Plans, versions and failures by
themselves are tests/cpp/test_sparse_product.cpp and test_product_choice.cpp.
"""

from __future__ import annotations

import pytest
import torch

import lors_cuda
from cases import make_case
from expectations import check_linear, check_linear_backward
from sparse_product_cases import DTYPES, Calls, K, N, R, T, backward, linear, problem, stored

pytest_plugins = ["sparse_product_fixtures"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_in_place_and_recompressed_meets_the_oracle(served, seed, dtype, explicit, bias):
    """Groups with none, one and two kept weights, kept zeros, an adapter as large as the weight."""
    case = problem(seed, dtype, explicit_mask=explicit, bias=bias)
    weight = stored(case)
    assert weight.library_metadata.nbytes == N * K // 8
    with Calls() as calls:
        in_place = linear(served, case, metadata=weight.library_metadata)
        again = linear(served, case, metadata=weight.library_metadata)
    assert calls.counts == {"Matmul": 2, "MatmulSearch": 1, "SpMMACompress2": 0}
    with Calls() as calls:
        recompressed = linear(served, case)
    assert calls.SpMMACompress2 > 0
    assert calls.MatmulSearch == 0, "the plan is the same"
    for Y in (in_place, again, recompressed):
        check_linear(Y, case)
    assert torch.equal(in_place, recompressed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_gradient_of_a_transposable_mask(served, seed, dtype):
    case = problem(seed, dtype, transposable=True, bias=True)
    assert stored(case).transposable
    with Calls() as calls:
        grads = backward(served, case)
    assert calls.Matmul > 0
    check_linear_backward(grads, case, "lors")


def test_any_other_mask_has_the_dense_input_gradient_whatever_is_asked_for(served, seed):
    case = problem(seed, torch.bfloat16)
    assert not stored(case).transposable
    with Calls() as calls:
        grads = backward(served, case, "sparse", transposable=False)
    assert calls.counts == {"Matmul": 0, "MatmulSearch": 0, "SpMMACompress2": 0}
    check_linear_backward(grads, case, "lors")


def test_a_weight_that_the_library_does_not_take_goes_without_its_metadata(served, seed, monkeypatch):
    case = problem(seed, torch.bfloat16)
    monkeypatch.setenv("FAKE_CUSPARSELT_FAIL", "SpMMACompress2")
    with pytest.warns(UserWarning, match=f"weight of {N} x {K} goes without cuSPARSELt's metadata: .*Compress"):
        weight = stored(case)
    assert weight.library_metadata is None
    assert torch.equal(weight.to_dense(), case.weight)


def test_a_float32_weight_under_16_bit_activations_is_recompressed(served, seed):
    case = problem(seed, torch.float32)
    case.input = case.input.bfloat16()
    assert stored(case).library_metadata is None, "the library's metadata belongs to 16-bit values"
    with Calls() as calls:
        check_linear(linear(served, case), case)
    assert calls.SpMMACompress2 > 0


def test_a_16_bit_weight_under_activations_of_the_other_16_bits_is_recompressed(served, seed):
    """Its metadata is there, but its values would be merged in its own type."""
    case = problem(seed, torch.float16)
    case.input = case.input.bfloat16()
    metadata = stored(case).library_metadata
    with Calls() as calls:
        check_linear(linear(served, case, metadata=metadata), case)
    assert calls.SpMMACompress2 > 0


def test_strided_activations(served, seed):
    case = problem(seed, torch.bfloat16, bias=True)
    other = case.replace(input=case.input.T.contiguous().T)
    assert not other.input.is_contiguous()
    assert torch.equal(linear(served, other), linear(served, case))


def test_a_merged_weight_that_is_there_is_multiplied_densely(served, seed):
    case = problem(seed, torch.bfloat16)
    merged = served.merged_operand(*case.adapted, case.scaling, torch.bfloat16)
    with Calls() as calls:
        Y = served.linear(case.input, *case.adapted, None, case.scaling, "lors", merged, None, False, "sparse")
    assert calls.Matmul == 0
    check_linear(Y, case)


@pytest.mark.parametrize("layout", ["metadata_first", "tiled"])
def test_where_the_values_do_not_come_first_there_is_no_writing_in_place(served, seed, monkeypatch, layout):
    monkeypatch.setenv("FAKE_CUSPARSELT_LAYOUT", layout)
    case = problem(seed, torch.bfloat16)
    assert stored(case).library_metadata is None
    check_linear(linear(served, case), case)


def test_metadata_of_a_weight_as_it_is_would_be_wrong_and_is_noticed(served, seed):
    """Where a group keeps one weight, the library puts it where it likes; that is why a full pattern is compressed."""
    case = problem(seed, torch.bfloat16)
    compressed = served.sparse_product_compress(case.weight)
    wrong = compressed[N * K :].clone()
    assert not torch.equal(wrong, stored(case).library_metadata)
    with pytest.raises(RuntimeError, match="differs from the dense one by more than rounding"):
        linear(served, case, metadata=wrong)
    served.sparse_product_clear(0)
    for _ in range(2):
        check_linear(linear(served, case, "auto", wrong), case)
    (choice,) = lors_cuda.plan_cache_info().choices
    assert choice.products == "dense"
    assert "more than rounding" in choice.note


def test_auto_measures_once_and_takes_the_faster_way(served, seed, monkeypatch):
    case = problem(seed, torch.bfloat16, transposable=True)
    metadata = stored(case).library_metadata
    for milliseconds, taken in ((1.0, "sparse"), (0.25, "dense")):  # the library's products take half a millisecond
        served.sparse_product_clear(0)
        served.fake_set(False, milliseconds)
        check_linear(linear(served, case, "auto", metadata), case)
        check_linear_backward(backward(served, case, "auto"), case, "lors")
        with Calls() as calls:
            for _ in range(3):
                check_linear(linear(served, case, "auto", metadata), case)
                check_linear_backward(backward(served, case, "auto"), case, "lors")
        assert calls.Matmul == (6 if taken == "sparse" else 0)
        assert calls.MatmulSearch == 0
        info = lors_cuda.plan_cache_info()
        assert (info.searches, info.size, info.library_version, info.maximum) == (2, 2, "0.8.1", 256)
        assert {(c.operation, c.in_place, c.products) for c in info.choices} == {
            ("forward", True, taken),
            ("input_gradient", False, taken),
        }
        assert all((c.dense_us, c.sparse_us) == (1000 * milliseconds, 500) for c in info.choices)


def test_a_captured_graph_gets_what_is_warm(served, seed):
    case = problem(seed, torch.bfloat16)
    metadata = stored(case).library_metadata
    served.fake_set(True, 1.0)
    with Calls() as calls:
        check_linear(linear(served, case, "auto", metadata), case)
    assert calls.counts == {"Matmul": 0, "MatmulSearch": 0, "SpMMACompress2": 0}
    with pytest.raises(RuntimeError, match=r"a CUDA graph is being captured .* run it once before the capture"):
        linear(served, case, "sparse", metadata)
    served.fake_set(False, 1.0)
    linear(served, case, "auto", metadata)
    served.fake_set(True, 1.0)
    with Calls() as calls:
        check_linear(linear(served, case, "auto", metadata), case)
    assert calls.Matmul == 1
    served.fake_set(False, 1.0)
    lors_cuda.plan_cache_clear()
    assert lors_cuda.plan_cache_info().size == 1, "the graph holds its plan"


def test_what_is_not_served_is_dense_and_says_why_where_sparse_is_asked_for(ops, seed):
    for shape, dtype, why in (
        ((T, N, K), torch.float32, "bfloat16 and float16 only"),
        ((T, N, K + 4), torch.bfloat16, "in_features in multiples of 16, and it is 68"),
        ((T, N + 1, K), torch.bfloat16, "out_features in multiples of 16, and it is 33"),
        ((T + 1, N, K), torch.bfloat16, "the number of tokens in multiples of 8, and it is 25"),
    ):
        case = make_case(seed, *shape, R, dtype, layout="2:4")
        check_linear(linear(ops, case, "auto"), case)
        with pytest.raises(RuntimeError, match=f"products is 'sparse', but .*{why}"):
            linear(ops, case, "sparse")
        check_linear(linear(ops, case, "dense"), case)


def test_the_environment_says_what_auto_is(served, seed, monkeypatch):
    case = problem(seed, torch.bfloat16)
    for word, sparse in (("dense", False), ("sparse", True)):
        monkeypatch.setenv("LORS_SPARSE_PRODUCT", word)
        with Calls() as calls:
            check_linear(linear(served, case, "auto"), case)
        assert (calls.Matmul > 0) == sparse
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "yes")
    with pytest.raises(RuntimeError, match="LORS_SPARSE_PRODUCT is 'yes'; it must be auto, dense or sparse"):
        linear(served, case, "auto")


def test_refusals_of_the_operators(fake, seed):
    """On the CPU too, where the arguments change nothing."""
    case = problem(seed, torch.bfloat16)
    for ops in (fake, torch.ops.lors):
        with pytest.raises(RuntimeError, match="products is 'fast'; it must be 'auto', 'dense' or 'sparse'"):
            linear(ops, case, "fast")
        with pytest.raises(RuntimeError, match=r"library_metadata has shape \[2, 3\]; it must be uint8"):
            linear(ops, case, "auto", torch.zeros(2, 3, dtype=torch.uint8))
        dense = case.replace(layout="dense")
        with pytest.raises(RuntimeError, match="library_metadata was given with a weight that is not 2:4"):
            linear(ops, dense, "auto", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"library_metadata has 5 bytes; cuSPARSELt 0\.8\.1 makes 256"):
        linear(fake, case, "sparse", torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="merged has shape"):
        fake.sparse_product_compress(torch.zeros(16, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="in_features in multiples of 16"):
        fake.sparse_product_compress(torch.zeros(16, 20, dtype=torch.bfloat16))


@pytest.mark.parametrize("products", ["auto", "dense", "sparse"])
def test_opcheck(seed, products):
    """The schema, fake and autograd halves take the arguments too; on the CPU they change nothing."""
    case = problem(seed, torch.float32, transposable=True, bias=True)
    args = (*case.adapted, case.bias, case.scaling, "lors")
    metadata = torch.zeros(7, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.lors.linear, (case.input, *args, None, metadata, True, products))
    given = (case.grad_output, case.input, *args, True, True, True, None, True, products)
    torch.library.opcheck(torch.ops.lors.linear_backward, given)
    for tensor in (case.input, case.lora_A, case.lora_B, case.bias):
        tensor.requires_grad_()
    Y = torch.ops.lors.linear(case.input, *args, None, metadata, True, products)
    grads = torch.autograd.grad(Y, (case.input, case.lora_A, case.lora_B, case.bias), case.grad_output)
    check_linear_backward(tuple(g.detach() for g in grads), case, "lors")
