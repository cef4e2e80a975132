# SPDX-License-Identifier: Apache-2.0
"""`layer.weight`: looking at it decompresses nothing, using it gives the right values, writing to it is refused."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import numpy as np
import pytest
import torch
from test_layer import every_layout, linear_of
from torch import Tensor, nn
from torch.nn import functional as F

from cases import make_case
from lors_cuda import LoRSConfig, LoRSLinear, SparseWeight, get_lors_model
from models import prune_two_of_four, refused


def layer_of(layout: str, seed: int = 0) -> tuple[LoRSLinear, Tensor]:
    """A layer and its weight, [31, 72]."""
    case = make_case(seed, 3, 31, 72, 2, layout=layout)
    return LoRSLinear.from_linear(linear_of(case), r=2, layout=layout), case.weight


@pytest.fixture
def decompressed(monkeypatch):
    """Counts calls of SparseWeight.to_dense."""
    calls: list[SparseWeight] = []
    to_dense = SparseWeight.to_dense
    monkeypatch.setattr(SparseWeight, "to_dense", lambda self: calls.append(self) or to_dense(self))
    return calls


@every_layout
def test_looks_cost_nothing(layout, decompressed):
    layer, weight = layer_of(layout)
    view = layer.weight
    assert isinstance(view, Tensor)
    for looked_at in (
        "dtype",
        "device",
        "shape",
        "ndim",
        "layout",
        "requires_grad",
        "is_cuda",
        "is_meta",
        "nbytes",
        "grad",
    ):
        assert getattr(view, looked_at) == getattr(weight, looked_at), looked_at
        assert getattr(view.data, looked_at) == getattr(weight, looked_at), looked_at
    for called in ("size", "stride", "numel", "dim", "element_size", "is_floating_point", "is_contiguous", "__len__"):
        assert getattr(view.detach(), called)() == getattr(weight, called)(), called
    assert torch.is_floating_point(view)
    assert torch.numel(view) == weight.numel()
    view.requires_grad_(False)
    assert layer.weight_uses == 0
    assert not decompressed


USES = {
    "equal": lambda w: w,
    "data": lambda w: w.data.clone(),
    "stack": lambda w: torch.stack([w, w])[1],
    "index": lambda w: w[:],
    "out": lambda w: torch.add(w, 0, out=torch.empty(31, 72)),
    "copy_": lambda w: torch.empty(31, 72).copy_(w),
    "foreach": lambda w: torch._foreach_mul([w], 1.0)[0],
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "array": lambda w: torch.from_numpy(np.asarray(w)),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "linear": lambda w: F.linear(torch.eye(72), w).T,
    "double": lambda w: w.double().float(),
    "compiled": lambda w: torch.compile(lambda t: t * 1, backend="eager")(w),
}


@every_layout
@pytest.mark.parametrize("use", USES)
def test_uses_are_right_and_counted(layout, use):
    layer, weight = layer_of(layout)
    used = USES[use](layer.weight)
    assert torch.equal(used, weight)
    assert layer.weight_uses >= 1
    if use != "equal":
        assert type(used) is Tensor


@every_layout
def test_files_hold_a_plain_tensor(layout, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer, weight = layer_of(layout)
    safetensors.save_file({"w": layer.weight}, tmp_path / "w.safetensors")
    assert torch.equal(safetensors.load_file(tmp_path / "w.safetensors")["w"], weight)
    buffer = io.BytesIO()
    torch.save(layer.weight, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), weight)


@every_layout
def test_gradients_flow_through_a_weight_that_is_used(layout):
    layer, weight = layer_of(layout)
    x = torch.randn(3, 72, dtype=torch.float64, requires_grad=True)
    F.linear(x, layer.weight.double()).sum().backward()
    assert torch.allclose(x.grad, weight.double().sum(0).expand(3, -1))


class Matmul(torch.autograd.Function):
    """Reaches torch's operators without the tensor's own methods."""

    @staticmethod
    def forward(ctx, input, weight):
        ctx.save_for_backward(weight)
        return input @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


@every_layout
def test_a_custom_autograd_function_gets_the_values(layout):
    layer, weight = layer_of(layout)
    x = torch.randn(3, 72, requires_grad=True)
    Matmul.apply(x, layer.weight).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(3, -1), atol=1e-5)


WRITES = [
    lambda w: w.zero_(),
    lambda w: w.data.mul_(2),
    lambda w: nn.init.zeros_(w),
    lambda w: nn.init.normal_(w),
    lambda w: w.__setitem__(0, 1.0),
    lambda w: torch.add(w, 1, out=w),
    lambda w: torch._foreach_add_([w], 1.0),
    lambda w: setattr(w, "data", torch.zeros(31, 72)),
]


@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
@pytest.mark.parametrize("write", WRITES)
def test_writes_that_would_be_lost_are_refused(layout, write):
    layer, weight = layer_of(layout)
    refused(ValueError, lambda: write(layer.weight), "read-only", "weight_values", "weight.clone()")
    assert torch.equal(layer.weight, weight)


@every_layout
def test_training_the_weight_is_refused(layout):
    layer, _ = layer_of(layout)
    frozen = functools.partial(nn.Parameter, requires_grad=False)
    for attempt in (nn.Parameter, frozen, lambda w: w.requires_grad_(), lambda w: setattr(w, "requires_grad", True)):
        refused(ValueError, lambda attempt=attempt: attempt(layer.weight), "frozen", "weight.clone()")


@every_layout
def test_a_plain_linear_takes_a_copy_and_no_view(layout):
    layer, weight = layer_of(layout)
    linear = nn.Linear(72, 31, bias=False)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):  # it would take the memory, and there is none
        linear.weight.data = layer.weight
    linear.weight.data = layer.weight.clone()
    assert torch.equal(linear.weight, weight)
    linear.load_state_dict({"weight": layer.weight})
    assert torch.equal(linear.half().weight, weight.half())
    assert torch.equal(torch.func.functional_call(linear, {"weight": layer.weight}, torch.eye(72)).T, weight)


def test_a_dense_layout_is_written_in_place():
    layer, weight = layer_of("dense")
    layer.weight.data.mul_(2)
    assert torch.equal(layer.weight_values, 2 * weight)


class Looking(nn.Module):
    """As T5's feed-forward block: casts its input to the weight's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.wo = nn.Linear(72, 32)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.wo.weight, Tensor) and input.dtype != self.wo.weight.dtype:
            input = input.to(self.wo.weight.dtype)
        return self.wo(input)


@every_layout
def test_models_that_look_at_a_weight_run_without_decompressing(layout, decompressed):
    torch.manual_seed(0)
    model = prune_two_of_four(Looking())
    x = torch.randn(3, 72, dtype=torch.float64)
    expected = model(x)
    get_lors_model(model, LoRSConfig(r=2, layout=layout))
    decompressed.clear()
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert not decompressed
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-5)
    assert model.wo.weight_uses == 0
