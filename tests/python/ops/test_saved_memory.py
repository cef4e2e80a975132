# SPDX-License-Identifier: Apache-2.0
"""What a step holds between forward and backward: the input and the parameters themselves, never a merged weight.

Each measurement is also taken on a formula that does save its merged weight, and must see it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from cases import Case, make_case
from lors_cuda import LoRSLinear, lors_linear

N, K, R, T = 96, 160, 4, 8
GRADIENTS = ("lors", "exact")


def leaf_case(seed: int, device: torch.device, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    case = make_case(seed, T, N, K, R, dtype, device=device, bias=True, **options)
    for t in (case.input, case.lora_A, case.lora_B, case.bias):
        t.requires_grad_()
    return case


def saving(case: Case) -> Tensor:
    """The masked formula under plain autograd, which saves the merged weight (and the mask)."""
    W, A, B = (t.to(case.input.dtype) for t in (case.weight, case.lora_A, case.lora_B))
    return F.linear(case.input, torch.where(case.kept, W + case.scaling * (B @ A), 0.0), case.bias.to(case.input.dtype))


def ours(case: Case, gradient: str = "lors") -> Tensor:
    args = (case.input, case.weight, case.lora_A, case.lora_B, case.scaling, case.bias)
    return lors_linear(*args, mask=case.mask, gradient=gradient)


def saved_bytes(forward: Callable[[], Tensor], *known: Tensor | None) -> int:
    """Bytes of the storages that the graph of `forward()` saves, those of `known` tensors apart."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    assert output.requires_grad
    for t in known:
        if t is not None:
            storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def parameters(case: Case) -> tuple[Tensor | None, ...]:
    return case.input, case.weight, case.lora_A, case.lora_B, case.bias


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_but_input_and_parameters_is_saved(device, seed, dtype, gradient):
    case = leaf_case(seed, device, dtype, adapter_dtypes=(torch.float32, torch.float32))
    assert saved_bytes(lambda: ours(case, gradient), *parameters(case)) == 0
    merged_bytes = N * K * case.weight.element_size()
    assert saved_bytes(lambda: saving(case), *parameters(case)) >= merged_bytes


def test_an_explicit_mask_costs_one_bit_per_weight(device, seed):
    case = leaf_case(seed, device, explicit_mask=True)
    assert saved_bytes(lambda: ours(case), *parameters(case)) == N * K // 8


def test_the_input_is_not_saved_for_a_frozen_adapter(device, seed):
    case = leaf_case(seed, device)
    case.lora_A.requires_grad_(False)
    case.lora_B.requires_grad_(False)
    weights = (case.weight, case.lora_A, case.lora_B, case.bias)
    assert saved_bytes(lambda: ours(case), *weights) == 0
    case.input = case.input * 2
    input, output = weakref.ref(case.input), ours(case)
    case.input = None
    assert output.requires_grad
    assert input() is None  # nor is it kept for forward mode, which no hook would tell


def test_the_input_is_saved_for_one_adapter(device, seed):
    case = leaf_case(seed, device)
    case.lora_B.requires_grad_(False)
    assert saved_bytes(lambda: ours(case), case.weight, case.lora_A, case.lora_B, case.bias) == case.input.nbytes


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_saves_no_cast_copy_of_a_parameter(device, seed, weight_dtype):
    case = leaf_case(seed, device, weight_dtype, adapter_dtypes=(torch.float32, torch.float32))
    case.input = case.input.detach().float().requires_grad_()

    def under_autocast(forward: Callable[[Case], Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(case)

    # Autocast's 16-bit copy of the input is what the product reads, as in nn.Linear; it is all there is.
    input_copy = case.input.numel() * 2
    assert saved_bytes(lambda: under_autocast(ours), *parameters(case)) <= input_copy
    assert saved_bytes(lambda: under_autocast(saving), *parameters(case)) >= N * K * 2


def live_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of torch's CPU memory that `forward()` leaves allocated while its result and graph live."""
    forward()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        output = forward()
    assert output is not None
    return sum(e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_merged_weight_is_gone_after_forward(seed, dtype, gradient):
    case = leaf_case(seed, torch.device("cpu"), dtype)
    output_bytes, merged_bytes = T * N * case.input.element_size(), N * K * case.input.element_size()
    assert live_bytes(lambda: ours(case, gradient)) <= output_bytes + 1024
    assert live_bytes(lambda: saving(case)) >= output_bytes + merged_bytes


def test_backward_leaves_the_gradients_and_nothing_else(seed):
    case = leaf_case(seed, torch.device("cpu"))
    leaves = (case.input, case.lora_A, case.lora_B, case.bias)
    for gradient in GRADIENTS:

        def step(gradient: str = gradient) -> tuple[Tensor, ...]:
            return torch.autograd.grad(ours(case, gradient), leaves, case.grad_output)

        assert live_bytes(step) <= sum(t.nbytes for t in leaves) + 1024


def test_a_layer_in_a_network_holds_one_activation_per_layer(device, seed):
    torch.manual_seed(seed)
    layers = [LoRSLinear.from_linear(nn.Linear(K, K).to(device), r=R) for _ in range(3)]
    net, x = nn.Sequential(*layers), torch.randn(T, K, device=device)
    known = (*net.parameters(), *net.buffers(), x)
    assert saved_bytes(lambda: net(x), *known) == 2 * T * K * 4  # the inputs of the second and third layer
