# SPDX-License-Identifier: Apache-2.0
"""What each op must return: the float64 oracle's value, and the sums that its rounding error is bounded from.

Computed where the tensors are: on a GPU the large cases would take minutes of the CPU's time."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Case
from lors_cuda import reference
from tolerance import assert_close, assert_zero_off_mask, truncations


def _float64(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double() for t in tensors]


def _acc(case: Case) -> torch.dtype:
    return torch.float64 if case.weight.dtype == torch.float64 else torch.float32


def _truncated(actual: Tensor, length: int, *factors: torch.dtype) -> int:
    return truncations(length, *factors) if actual.is_cuda else 0


def squared_merge_terms(case: Case) -> Tensor:
    """W^2 + s^2 M o (B^2 A^2): the squared terms of each merged weight, [N, K]."""
    W, A, B = _float64(case.weight, case.lora_A, case.lora_B)
    return torch.where(case.kept, W**2 + case.scaling**2 * (B**2 @ A**2), 0.0)


def merged64(case: Case) -> Tensor:
    return reference.merge(*_float64(case.weight, case.lora_A, case.lora_B), case.scaling, case.mask)


def check_merge(actual: Tensor, case: Case) -> None:
    """W~ [N, K] in the weight's dtype, and exactly +0 off the mask."""
    assert_close(
        actual,
        merged64(case),
        rms=squared_merge_terms(case).sqrt(),
        length=case.lora_A.shape[0] + 1,
        dtype=case.weight.dtype,
        acc_dtype=_acc(case),
        truncated=_truncated(actual, case.lora_A.shape[0], case.lora_A.dtype, case.lora_B.dtype),
        what="merged",
    )
    assert_zero_off_mask(actual, case.kept)


def check_linear(actual: Tensor, case: Case) -> None:
    """Y [T, N] in the input's dtype."""
    X, W, A, B = _float64(case.input, case.weight, case.lora_A, case.lora_B)
    length, factors = W.shape[1] + A.shape[0] + 1, (case.input.dtype, case.lora_A.dtype, case.lora_B.dtype)
    bias = None if case.bias is None else case.bias.detach().double()
    squared_bias = 0.0 if bias is None else bias**2
    assert_close(
        actual,
        reference.linear(X, W, A, B, case.scaling, bias, case.mask),
        rms=(X**2 @ squared_merge_terms(case).T + squared_bias).sqrt(),
        # torch's matmul on CUDA takes the bias, too, in the activations' dtype.
        mid_rms=(X**2 @ (merged64(case) ** 2).T + (squared_bias if actual.is_cuda else 0.0)).sqrt(),
        length=length,
        dtype=case.input.dtype,
        mid_dtype=case.input.dtype,
        acc_dtype=_acc(case),
        truncated=_truncated(actual, length, *factors),
        what="output",
    )


def _gradients64(case: Case, gradient: str) -> tuple[Tensor, ...]:
    dY, X, W, A, B = _float64(case.grad_output, case.input, case.weight, case.lora_A, case.lora_B)
    return reference.linear_backward(dY, X, W, A, B, case.scaling, case.mask, gradient)


def check_grad_input(actual: Tensor, case: Case) -> None:
    """dX [T, K] in the activations' dtype: exact in both gradient modes."""
    (dY,) = _float64(case.grad_output)
    length, factors = sum(case.lora_B.shape), (case.input.dtype, case.lora_A.dtype, case.lora_B.dtype)
    assert_close(
        actual,
        _gradients64(case, "exact")[0],
        rms=(dY**2 @ squared_merge_terms(case)).sqrt(),
        mid_rms=(dY**2 @ merged64(case) ** 2).sqrt(),
        length=length,
        dtype=case.input.dtype,
        mid_dtype=case.input.dtype,
        acc_dtype=_acc(case),
        truncated=_truncated(actual, length, *factors),
        what="grad_input",
    )


def check_adapter_grads(
    grad_lora_A: Tensor | None, grad_lora_B: Tensor | None, case: Case, gradient: str, inner: int | None = None
) -> None:
    """dA [r, K] and dB [N, r] in the adapters' dtypes; None is not looked at. `inner`: terms of the first stage."""
    dY, X, A, B = (t**2 for t in _float64(case.grad_output, case.input, case.lora_A, case.lora_B))
    s = abs(case.scaling)
    if gradient == "exact":
        G = torch.where(case.kept, dY.T @ X, 0.0)
        rms_A, rms_B = s * (B.T @ G).sqrt(), s * (G @ A.T).sqrt()
    else:
        rms_A, rms_B = s * ((dY @ B).T @ X).sqrt(), s * (dY.T @ (X @ A.T)).sqrt()
    _, expected_A, expected_B, _ = _gradients64(case, gradient)
    (N, K), T = case.weight.shape, case.input.shape[0] if inner is None else inner
    gradients = (
        ("grad_lora_A", grad_lora_A, expected_A, rms_A, T + N),
        ("grad_lora_B", grad_lora_B, expected_B, rms_B, T + K),
    )
    for what, actual, expected, rms, length in gradients:
        if actual is not None:
            dtype = case.lora_A.dtype if what == "grad_lora_A" else case.lora_B.dtype
            truncated = _truncated(actual, length, torch.float32)  # what the first stage gives is float32
            more = {"acc_dtype": _acc(case), "truncated": truncated, "what": what}
            assert_close(actual, expected, rms=rms, length=length, dtype=dtype, **more)


def check_grad_bias(actual: Tensor, case: Case) -> None:
    """db [N] in the bias's dtype."""
    assert case.bias is not None
    (dY,) = _float64(case.grad_output)
    rms, length = (dY**2).sum(0).sqrt(), dY.shape[0]
    assert_close(
        actual, dY.sum(0), rms=rms, length=length, dtype=case.bias.dtype, acc_dtype=_acc(case), what="grad_bias"
    )


def check_linear_backward(actual: tuple[Tensor, ...], case: Case, gradient: str) -> None:
    """(dX, dA, dB, db), all wanted; db where there is a bias."""
    grad_input, grad_lora_A, grad_lora_B, grad_bias = actual
    check_grad_input(grad_input, case)
    check_adapter_grads(grad_lora_A, grad_lora_B, case, gradient)
    if case.bias is not None:
        check_grad_bias(grad_bias, case)


def check_merge_backward(actual: tuple[Tensor, Tensor], grad_merged: Tensor, case: Case) -> None:
    """(dA, dB) of the merge: with X = I and dY = G^T the layer's exact gradients are these."""
    (G,) = _float64(grad_merged)
    eye = torch.eye(G.shape[1], dtype=torch.float64, device=G.device)
    check_adapter_grads(*actual, case.replace(input=eye, grad_output=G.T), "exact", inner=0)
