# SPDX-License-Identifier: Apache-2.0
# The plain linears that can be adapted: nn.Linear, and transformers' Conv1D (GPT-2), which stores its weight as
# [in, out]. Everything else in the package sees [out, in]; here is the way there and back.
"""Plain linear layers: what they are, their weight as [N, K], and how one is made."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from ._checks import LAYOUTS, check_choice, check_weight
from ._distributed import original_forward
from .dense_view import DenseView
from .formats import check_sparse24_mask, pack_mask

if TYPE_CHECKING:
    from .weight import SparseWeight

CONV1D_MODULE = "transformers.pytorch_utils"


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D; transformers is not imported for it."""
    kind = getattr(sys.modules.get(CONV1D_MODULE), "Conv1D", None)
    return kind is not None and isinstance(module, kind)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is an nn.Linear or a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as [N, K]; of a Conv1D a view."""
    weight: Any = linear.weight
    return weight.t() if is_conv1d(linear) else weight


def make_linear(weight: Tensor, bias: Tensor | None, conv1d: bool = False) -> nn.Linear:
    """A plain layer of ``weight`` [N, K], which it takes (a Conv1D copies), and ``bias`` [N], which it copies."""
    N, K = weight.shape
    linear: Any
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            linear = Conv1D(N, K)
        linear.weight = nn.Parameter(weight.t().contiguous())
    else:
        linear = nn.utils.skip_init(nn.Linear, K, N, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def computes_linear(module: nn.Module) -> bool:
    """Whether the module's forward is ``X W^T + bias`` and nothing else: that of nn.Linear or Conv1D, or one that gives
    the same on a copy with a small weight, in training and in evaluation (Falcon's linears)."""
    forward = original_forward(module)
    transposed = is_conv1d(module)
    if forward is nn.Linear.forward or (transposed and forward is sys.modules[CONV1D_MODULE].Conv1D.forward):
        return True
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    if forward is None or names - {"weight", "bias"}:
        return False
    N, K = 3, 5
    weight = torch.arange(N * K, dtype=torch.float64, device="cpu").view(N, K).sin()
    input = torch.arange(4 * K, dtype=torch.float64, device="cpu").view(2, 2, K).cos()
    bias = None if module.bias is None else torch.ones(N, dtype=torch.float64, device="cpu") / 3
    probe: Any = copy.copy(module)
    vars(probe)["_parameters"] = {
        "weight": nn.Parameter(weight.t() if transposed else weight),
        "bias": None if bias is None else nn.Parameter(bias),
    }
    vars(probe).update({"nx": K, "nf": N} if transposed else {"in_features": K, "out_features": N})
    expected = nn.functional.linear(input, weight, bias)
    try:
        with torch.no_grad():
            for training in (True, False):
                vars(probe)["training"] = training
                output = forward(probe, input)
                if not isinstance(output, Tensor) or output.dtype != expected.dtype:
                    return False
                if output.shape != expected.shape or not torch.allclose(output, expected, rtol=1e-9, atol=1e-12):
                    return False
    except Exception:
        return False
    return True


def plain(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor without a gradient: a layer's ``weight`` and torch's semi-structured tensors are
    decompressed. What else is no ordinary tensor comes back as it is, for `check_weight` to refuse.

    Raises:
        ValueError: a semi-structured tensor that is transposed, or that torch cannot read where it is.
    """
    if isinstance(weight, DenseView):
        return weight[:]
    if not isinstance(weight, torch.sparse.SparseSemiStructuredTensor):
        return weight.detach() if isinstance(weight, Tensor) else weight
    try:
        return weight.detach().to_dense()
    except Exception as error:  # assertions, and what cuSPARSELt raises
        raise ValueError(
            f"weight is a {type(weight).__name__} that torch cannot decompress here ({error}). Give the tensor that "
            "to_sparse_semi_structured returned, on the device it was made on, or the dense weight."
        ) from error


def check_fits(weight: Tensor, layout: str) -> None:
    """Refuse what ``SparseWeight.from_dense(weight, layout)`` would refuse, without compressing anything."""
    check_choice("layout", layout, LAYOUTS)
    weight = plain(weight)
    check_weight(weight)
    if layout == "2:4":
        check_sparse24_mask(pack_mask(weight != 0), weight.shape[1])


def check_stored_layout(weight: SparseWeight, layout: str) -> None:
    """Refuse to store anew what is stored in another layout."""
    if layout not in ("auto", weight.layout):
        raise ValueError(
            f"it is stored in layout '{weight.layout}' and layout='{layout}' was asked for. Leave layout at 'auto', or "
            "compress the model so."
        )


def stored_form(linear: nn.Module) -> Tensor:
    """The weight [N, K] of a plain layer, contiguous: that of a Conv1D is copied.

    Raises:
        TypeError: it is no nn.Linear and no Conv1D.
    """
    if not is_linear(linear):
        raise TypeError(f"linear is a {type(linear).__name__}; it must be a torch.nn.Linear.")
    weight = weight_of(linear).detach()
    return weight.contiguous() if is_conv1d(linear) else weight
