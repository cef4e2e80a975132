# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: streams, graphs, several devices, memory, how products are chosen. Skipped without one."""

from __future__ import annotations

import copy

import pytest
import torch
from test_environment import python

from cases import Case, lors, make_case
from expectations import check_linear, check_linear_backward, check_merge
from lors_cuda import LoRSConfig, LoRSLinear, get_lors_model, lors_linear, prefetch
from models import prune_two_of_four

GRADIENTS = ("lors", "exact")
# Tokens: a product with the merge inside it, and one of torch's (16-bit weights; 32 and above for float32).
TOKENS = (48, 600)


def every_op(case: Case, gradient: str) -> list[torch.Tensor]:
    grad = case.merge()
    backward = lors.merge_backward(grad, *case.adapted, case.scaling)
    return [grad, *backward, case.linear(gradient), *case.linear_backward(gradient)]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Within rounding: cuBLAS promises the same bits on one stream only."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_results_repeat_bit_for_bit(gpu, seed, tokens, gradient):
    case = make_case(seed, tokens, 257, 520, 16, torch.bfloat16, device=gpu, explicit_mask=True, bias=True)
    first = every_op(case, gradient)
    for _ in range(5):
        for a, b in zip(first, every_op(case, gradient), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_work_is_queued_on_the_current_stream(gpu, seed, tokens, gradient):
    """The arguments are written on a stream that is behind: what ran on any other stream would read NaN."""
    case = make_case(seed, tokens, 257, 520, 16, torch.bfloat16, device=gpu, explicit_mask=True, bias=True)
    expected = every_op(case, gradient)
    fields = ("input", "weight", "mask", "lora_A", "lora_B", "bias", "grad_output")
    late = case.replace(**{name: torch.zeros_like(getattr(case, name)) for name in fields})
    for name in set(fields) - {"mask"}:
        getattr(late, name).fill_(float("nan"))
    torch.cuda.synchronize(gpu)
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        every_op(case, gradient)  # takes the memory and cuBLAS's workspace, which may wait
        stream.synchronize()
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        for name in fields:
            getattr(late, name).copy_(getattr(case, name), non_blocking=True)
        actual = every_op(late, gradient)
        assert not stream.query(), "an operator waited for the device"
    stream.synchronize()
    assert_same(actual, expected)


def test_scratch_is_not_shared_between_streams(gpu, seed):
    """Two streams at once, many times: memory given back on one must not be another's."""
    case = make_case(seed, 600, 257, 520, 16, device=gpu, bias=True)
    expected = every_op(case, "exact")
    streams = [torch.cuda.Stream(gpu) for _ in range(3)]
    torch.cuda.synchronize(gpu)
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(every_op(case, "exact"))
    torch.cuda.synchronize(gpu)
    for result in results:
        assert_same(result, expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_forward_and_backward_in_a_cuda_graph(gpu, seed, tokens, gradient):
    """Captured once, replayed with other values in the same memory."""
    shape = (257, 520, 16, torch.bfloat16)
    cases = [make_case(seed + i, tokens, *shape, device=gpu, explicit_mask=True, bias=True) for i in range(2)]
    held, other = cases
    names = ("input", "lora_A", "lora_B", "bias")

    def step(case: Case) -> list[torch.Tensor]:
        leaves = {n: getattr(case, n).detach().requires_grad_() for n in names}
        args = (leaves["input"], case.weight, leaves["lora_A"], leaves["lora_B"], case.scaling, leaves["bias"])
        output = lors_linear(*args, mask=case.mask, gradient=gradient)
        return [output.detach(), *torch.autograd.grad(output, tuple(leaves.values()), case.grad_output)]

    expected = step(other)
    stream = torch.cuda.Stream(gpu)
    stream.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(stream):
        step(held)  # cuBLAS takes its workspace before the capture
    torch.cuda.current_stream(gpu).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(held)
    for name in (*names, "weight", "mask", "grad_output"):
        getattr(held, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize(gpu)
    assert_same(captured, expected)


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_prefetch_gives_the_same_training_in_two_merged_weights(gpu, layout):
    """Behind matmuls that take long, with adapters that are written between the steps."""
    torch.manual_seed(0)
    linears = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(6)))
    config = LoRSConfig(r=16, layout=layout, init_lora_weights=False)
    plain = get_lors_model(prune_two_of_four(linears.to(gpu, torch.bfloat16)), config)
    ahead = copy.deepcopy(plain)
    x = torch.randn(4096, 1024, device=gpu, dtype=torch.bfloat16)

    def train(model: torch.nn.Module) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        seen = []
        for _ in range(3):
            output = model(x)
            output.float().square().mean().backward()
            seen += [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    expected = train(plain)
    with prefetch(ahead):
        assert_same(train(ahead), expected)

    def peak() -> int:
        with torch.no_grad():
            ahead(x)
            torch.cuda.reset_peak_memory_stats(gpu)
            ahead(x)
        return torch.cuda.max_memory_allocated(gpu)

    alone = peak()
    with prefetch(ahead):
        assert peak() - alone <= 1024 * 1024 * 2 + 512  # two merged weights instead of one
    torch.cuda.synchronize(gpu)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_second_device(gpu, seed, gradient):
    """On a device that is not torch's current one, which stays so."""
    if torch.cuda.device_count() < 2:
        pytest.skip("cuda: there is one device")
    second = torch.device("cuda", (gpu.index + 1) % torch.cuda.device_count())
    case = make_case(seed, 48, 257, 520, 16, torch.bfloat16, device=second, explicit_mask=True, bias=True)
    check_merge(case.merge(), case)
    check_linear(case.linear(gradient), case)
    check_linear_backward(case.linear_backward(gradient), case, gradient)
    assert case.linear(gradient).device == second
    assert torch.cuda.current_device() == gpu.index


def test_mixed_devices_are_refused(gpu, seed):
    case = make_case(seed, 5, 6, 33, 3, device=gpu, explicit_mask=True, bias=True)
    for name in ("input", "lora_A", "lora_B", "bias"):
        with pytest.raises(RuntimeError, match=rf"lors::linear: {name} is on another device than weight; move all"):
            case.replace(**{name: getattr(case, name).cpu()}).linear()
    with pytest.raises(RuntimeError, match=r"lors::linear: lora_A is on another device than weight"):
        case.replace(weight=case.weight.cpu(), mask=case.mask.cpu()).linear()
    with pytest.raises(ValueError, match=r"lora_B is on cpu and weight on cuda"):
        lors_linear(case.input, case.weight, case.lora_A, case.lora_B.cpu(), 0.5)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "bias"])
def test_float64_is_refused(gpu, seed, name):
    case = make_case(seed, 5, 6, 33, 3, device=gpu, bias=True)
    case = case.replace(**{name: getattr(case, name).double()})
    message = rf"lors::linear: {name} is float64, which is computed on the CPU only; convert it to float32"
    if name == "weight":
        case = case.replace(input=case.input.double())
    with pytest.raises(RuntimeError, match=message):
        case.linear()
    if name != "bias":
        with pytest.raises(RuntimeError, match=message.replace("linear", "merge")):
            case.merge()


def test_running_out_of_memory_says_so_and_leaks_nothing(gpu, seed):
    case = make_case(seed, 5, 64, 64, 4, device=gpu)
    torch.cuda.synchronize(gpu)
    before = torch.cuda.memory_allocated(gpu)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"torch failed inside an operator of lors_cuda"):
            case.replace(input=case.input[:1].expand(1 << 42, 64)).linear()
    assert torch.cuda.memory_allocated(gpu) == before
    check_linear(case.linear(), case)


@pytest.mark.parametrize("tokens", TOKENS)
def test_nothing_is_left_allocated(gpu, seed, tokens):
    """The merged weight and all scratch are gone when an operator returns."""
    case = make_case(seed, tokens, 512, 1024, 16, torch.bfloat16, device=gpu, bias=True)
    every_op(case, "exact")
    before = torch.cuda.memory_allocated(gpu)
    outputs = every_op(case, "exact")
    # The allocator counts in blocks of 512 bytes.
    assert torch.cuda.memory_allocated(gpu) - before <= sum(t.nbytes + 512 for t in outputs)


def test_autograd_runs_on_threads_of_its_own(gpu, seed):
    """backward() calls the operators on a thread that has set no device yet."""
    case = make_case(seed, 48, 31, 70, 5, device=gpu)
    layer = LoRSLinear.from_linear(torch.nn.Linear(70, 31).to(gpu), r=5)
    layer(case.input).backward(case.grad_output)
    assert layer.lora_B.grad.isfinite().all()
    assert layer.lora_B.grad.any()


FUSED = """
import sys
import torch
from cases import make_case
from expectations import check_linear, check_linear_backward
from test_linear_op import combinations

done = 0
for i, parameters in enumerate(combinations()):
    shape, dtype, explicit, gradient, bias, adapter_dtypes = parameters.values
    if torch.float64 in (dtype, *adapter_dtypes):
        continue
    case = make_case(
        i, *shape, dtype, device="cuda", explicit_mask=explicit, bias=bias, adapter_dtypes=adapter_dtypes
    )
    if bias and sys.argv[1] == "never":  # a product of torch's takes its bias in its own dtype
        case.bias = case.bias.to(dtype)
    check_linear(case.linear(gradient), case)
    check_linear_backward(case.linear_backward(gradient), case, gradient)
    done += 1
print(done)
"""


@pytest.mark.parametrize("fused", ["always", "never"])
def test_merging_inside_the_product_and_before_it(gpu, fused):
    assert int(python(FUSED, fused, LORS_CUDA_FUSED=fused)) > 50


def test_an_unknown_choice_of_product_is_refused(gpu):
    program = """
import torch, lors_cuda
try:
    lors_cuda.lors_linear(*(torch.rand(2, 2, device="cuda") for _ in range(4)), 0.5)
except RuntimeError as error:
    print(error)
"""
    expected = "LORS_CUDA_FUSED is 'yes'; set it to always or never, or leave it unset."
    assert python(program, LORS_CUDA_FUSED="yes").strip() == expected
