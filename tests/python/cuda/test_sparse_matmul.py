# SPDX-License-Identifier: Apache-2.0
"""The forward of 2:4 weights by torch's sparse matmul (LORS_SPARSE_PRODUCT), over stand-ins for torch's two operators.

The stand-ins hold their arguments to what torch's CUDA kernels read, and multiply on the CPU.
"""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from quantised_cases import every_grid
from test_operators import on_grid
from test_operators import problem as quantised
from test_operators import stored as stored_codes
from torch import Tensor

import cases
import fake_binding
from cases import Case, lors, make_case
from expectations import check_linear, check_linear_backward
from lors_cuda._draws import NO_DRAWS
from lors_cuda.cli import main

T, N, K, R = 24, 32, 64, 4
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def fake():
    return fake_binding.load()


@pytest.fixture
def ops(fake, monkeypatch):
    """The CUDA binding over plain loops, in the place of lors for everything that `Case` calls."""
    monkeypatch.setattr(cases, "lors", fake)
    monkeypatch.delenv("LORS_SPARSE_PRODUCT", raising=False)
    yield fake
    assert fake.fake_state().split()[:2] == ["0", "0"]


class TorchKernels:
    """Stand-ins for torch's CUDA kernels, and what they were given."""

    def __init__(self) -> None:
        self.compressed: list[Tensor] = []
        self.biases: list[Tensor | None] = []

    def compress(self, input: Tensor) -> Tensor:
        assert input.is_contiguous()
        assert (input.view(-1, 4) != 0).sum(1).max() <= 2, "no 2:4 weight"
        assert not torch.is_grad_enabled() or not input.requires_grad
        self.compressed.append(input.clone())
        return input.flatten()

    def mm(
        self, compressed_A, dense_B, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0,
        split_k=1, split_k_mode=-1,
    ) -> Tensor:  # fmt: skip
        assert (alpha, out_dtype, transpose_result, alg_id, split_k, split_k_mode) == (None, None, True, 0, 1, -1)
        assert dense_B.t().is_contiguous(), "torch reads anything else as another matrix"
        assert compressed_A.dtype == dense_B.dtype
        assert bias is None or bias.dtype == dense_B.dtype
        self.biases.append(bias)
        result = dense_B.t().float() @ compressed_A.view(-1, dense_B.shape[0]).t().float()
        return (result if bias is None else result + bias.float()).to(dense_B.dtype)


@contextlib.contextmanager
def registered(compress, mm):
    """As aten's kernels on the CPU, where torch has none, until the end of the block."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cslt_compress", compress, "CPU")
        library.impl("_cslt_sparse_mm", mm, "CPU")
        yield


@pytest.fixture
def kernels():
    made = TorchKernels()
    with registered(made.compress, made.mm):
        yield made
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_cslt_compress", "CPU")


def problem(seed: int, dtype: torch.dtype = torch.bfloat16, *, layout: str = "2:4", **fields) -> Case:
    case = make_case(seed, T, N, K, R, dtype, layout=layout, **fields)
    assert case.stored[2] is None or (case.stored[2].dtype == torch.uint8) == (layout == "2:4")
    return case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_sparse_matmul_meets_the_oracle(ops, kernels, monkeypatch, seed, dtype, bias):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    case = problem(seed, dtype, bias=bias)
    check_linear(case.linear(), case)
    (merged,) = kernels.compressed
    assert torch.equal(merged, ops.merge(*case.adapted, case.scaling))
    assert [b is not None for b in kernels.biases] == [bias]


def test_a_weight_without_an_adapter_too(ops, kernels, monkeypatch, seed):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    case = problem(seed)
    case.replace(lora_A=case.lora_A[:0], lora_B=case.lora_B[:, :0]).linear()
    (merged,) = kernels.compressed
    assert torch.equal(merged, case.weight)


def test_strided_tokens_and_a_bias_in_another_dtype(ops, kernels, monkeypatch, seed):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    case = problem(seed, bias=True)
    strided = case.replace(input=case.input.T.contiguous().T, bias=case.bias.float())
    assert torch.equal(strided.linear(), case.linear())
    assert len(kernels.compressed) == 2


def test_a_weight_stored_in_float32_is_merged_in_the_dtype_of_the_tokens(ops, kernels, monkeypatch, seed):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    case = problem(seed, torch.float32)
    case.input = case.input.half()
    case.linear()
    (merged,) = kernels.compressed
    assert merged.dtype == torch.float16


def test_a_kept_merged_weight_is_compressed_as_it_is(ops, kernels, monkeypatch, seed):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    case = problem(seed)
    kept = ops.merged_operand(*case.adapted, case.scaling, torch.bfloat16, 16)
    before = ops.fake_state()
    output = ops.linear(case.input, *case.adapted, None, case.scaling, "lors", kept)
    assert ops.fake_state() == before, "merged again"
    check_linear(output, case)
    assert torch.equal(kernels.compressed[0], kept)


@every_grid
@pytest.mark.parametrize("requantises", [False, True])
def test_quantised_codes_are_merged_and_then_compressed(ops, kernels, monkeypatch, seed, grid, requantises):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    weight, case = quantised(seed, grid, "2:4", (T, N, K, R), torch.bfloat16)
    case.bias = case.bias.bfloat16()
    arguments = on_grid(weight) if requantises else weight.quantization.arguments()
    adapted = (*stored_codes(weight), case.lora_A, case.lora_B)
    output = ops.linear(case.input, *adapted, case.bias, case.scaling, "lors", None, *NO_DRAWS, *arguments)
    (compressed,) = kernels.compressed
    merged = ops.merge(*adapted, case.scaling, *NO_DRAWS, *arguments)
    assert torch.equal(compressed, merged.bfloat16())
    if requantises:
        case = case.replace(weight=merged, lora_B=torch.zeros_like(case.lora_B))
    check_linear(output, case)
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "auto")
    ops.linear(case.input, *adapted, case.bias, case.scaling, "lors", None, *NO_DRAWS, *arguments)
    assert len(kernels.compressed) == 1, "no record is of quantised weights"


@pytest.mark.parametrize("value", [None, "", "dense", "auto"])
def test_dense_is_the_default_and_what_auto_takes_without_measurements(ops, kernels, monkeypatch, seed, value):
    if value is not None:
        monkeypatch.setenv("LORS_SPARSE_PRODUCT", value)
    case = problem(seed, bias=True)
    check_linear(case.linear(), case)
    assert not kernels.compressed


@pytest.mark.parametrize("layout", ["dense", "bitmap"])
def test_other_layouts_are_dense(ops, kernels, monkeypatch, seed, layout):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    case = problem(seed, layout=layout)
    check_linear(case.linear(), case)
    assert not kernels.compressed


def test_float32_and_no_tokens_and_gradients_are_dense(ops, kernels, monkeypatch, seed):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    case = problem(seed, torch.float32)
    check_linear(case.linear(), case)
    case = problem(seed)
    assert case.replace(input=case.input[:0]).linear().shape == (0, N)
    check_linear_backward(case.linear_backward("lors"), case, "lors")
    assert not kernels.compressed


def test_what_torch_refuses_is_said_in_its_words(ops, monkeypatch, seed):
    def refuse(input: Tensor) -> Tensor:
        raise RuntimeError("cuSPARSELt not supported on your machine.")

    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    with registered(refuse, refuse), pytest.raises(RuntimeError) as caught:
        problem(seed).linear()
    message = str(caught.value)
    assert "LORS_SPARSE_PRODUCT is 'sparse', and torch's sparse matmul of 24 tokens" in message
    assert "a 2:4 weight of shape [32, 64] failed" in message
    assert message.endswith("Set LORS_SPARSE_PRODUCT=dense for the dense matmul.")
    known = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    assert ("cuSPARSELt not supported on your machine." if known else "is on stderr") in message


def test_another_value_is_refused_by_the_forward_and_by_the_command_line(ops, kernels, monkeypatch, seed, capsys):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "spares")
    sentence = "LORS_SPARSE_PRODUCT is 'spares'; set it to dense, sparse or auto, or leave it unset."
    with pytest.raises(RuntimeError) as caught:
        problem(seed).linear()
    assert str(caught.value) == sentence
    assert main(["info"]) == 1
    assert capsys.readouterr().err == f"lors-cuda: error: {sentence}\n"


@pytest.mark.parametrize("value", ["dense", "sparse", "auto"])
def test_info_shows_the_value(monkeypatch, capsys, value):
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", value)
    assert main(["info", "--json"]) == 0
    cuda = json.loads(capsys.readouterr().out)["cuda"]
    assert cuda["sparse_product"] == value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_on_a_gpu(gpu, monkeypatch, seed, dtype, bias):
    """Eager and replayed from a CUDA graph with other values."""
    if not torch.backends.cusparselt.is_available():
        pytest.skip("this torch finds no cuSPARSELt")
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "sparse")
    case = make_case(seed, 64, 128, 256, 16, dtype, layout="2:4", device=gpu, bias=bias)
    args = (*case.adapted, case.bias, case.scaling, "lors")
    check_linear(lors.linear(case.input, *args), case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = lors.linear(case.input, *args)
    case.input.mul_(-1).add_(0.5)
    case.lora_A.mul_(2)
    graph.replay()
    check_linear(output, case)
