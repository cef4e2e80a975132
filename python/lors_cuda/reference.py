# SPDX-License-Identifier: Apache-2.0
"""The mathematics of LoRS on one screen, in plain torch: every backend is tested against it.

Everything is evaluated in float64, whatever the dtypes of the inputs. Shapes: ``input`` [..., K], ``weight`` [N, K],
``mask`` bool [N, K] or None (kept where the weight is not zero), ``lora_A`` [r, K], ``lora_B`` [N, r], ``bias`` [N].
Source: Hu et al., "LoRS", arXiv 2501.08582.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kept(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mask M as bool [N, K]; -0.0 counts as zero."""
    return weight != 0 if mask is None else mask


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """W~ = W + s M o (B A), and exactly +0 where M is 0. Float64 [N, K]."""
    merged = weight.double() + scaling * (lora_B.double() @ lora_A.double())
    return torch.where(kept(weight, mask), merged, 0.0)


def linear(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Y = X W~^T + bias. Float64 [..., N]."""
    output = input.double() @ merge(weight, lora_A, lora_B, scaling, mask).T
    return output if bias is None else output + bias.double()


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    gradient: str = "lors",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dX [..., K], dA [r, K], dB [N, r], dbias [N]) in float64.

    ``gradient="exact"`` is the derivative of :func:`linear`; ``"lors"`` drops the mask from dA and dB and reorders the
    matmuls, so that no [N, K] result is formed (section 3.2 of the paper, with s included).
    """
    dY, X = grad_output.double().flatten(0, -2), input.double().flatten(0, -2)
    A, B = lora_A.double(), lora_B.double()
    grad_input = grad_output.double() @ merge(weight, lora_A, lora_B, scaling, mask)
    if gradient == "exact":
        masked = torch.where(kept(weight, mask), dY.T @ X, 0.0)
        grad_lora_B, grad_lora_A = scaling * masked @ A.T, scaling * B.T @ masked
    else:
        grad_lora_B, grad_lora_A = scaling * dY.T @ (X @ A.T), scaling * (dY @ B).T @ X
    return grad_input, grad_lora_A, grad_lora_B, dY.sum(0)
