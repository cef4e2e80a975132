# SPDX-License-Identifier: Apache-2.0
"""torch's semi-structured tensors: CUTLASS against torch's own conversion, bit for bit; refusals; cuSPARSELt."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from interchange_cases import sparse24
from lors_cuda import (
    LoRSConfig,
    LoRSLinear,
    SparseLinear,
    SparseWeight,
    estimate_gradients,
    get_lors_model,
    lors_linear,
    merge,
)
from lors_cuda.interchange import from_torch_semi_structured, to_torch_semi_structured
from lors_cuda.linear import SparseLayer
from models import refused

CUTLASS = torch.sparse.SparseSemiStructuredTensorCUTLASS
CUSPARSELT = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")


def same(left: SparseWeight, right: SparseWeight) -> bool:
    return torch.equal(left.values, right.values) and torch.equal(left.index, right.index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), [(32, 64), (64, 128), (96, 320), (256, 64)])
def test_the_cutlass_form_is_torchs_bit_for_bit(N, K, dtype):
    dense = sparse24(N, K, dtype)
    weight = SparseWeight.from_dense(dense, "2:4")
    tensor = to_torch_semi_structured(weight)
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    assert isinstance(tensor, CUTLASS)
    assert tensor.shape == (N, K)
    assert torch.equal(tensor.packed.view(torch.int16), packed.view(torch.int16))
    assert torch.equal(tensor.meta, meta)
    assert tensor.packed.data_ptr() == weight.values.data_ptr()
    assert torch.equal(tensor.to_dense(), dense)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(tensor.packed, tensor.meta), dense)
    assert same(from_torch_semi_structured(CUTLASS(dense.shape, packed, meta, None, None, None)), weight)


@pytest.mark.parametrize("pattern", range(16))
def test_every_pattern_of_a_group(pattern):
    group = torch.tensor([float(pattern >> k & 1) * (k + 1) for k in range(4)], dtype=torch.float16)
    dense = sparse24(32, 64, torch.float16)
    dense[5, 20:24] = group
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    if pattern.bit_count() > 2:
        refused(ValueError, lambda: SparseWeight.from_dense(dense, "2:4"), "row 5, column 20")
        return
    weight = SparseWeight.from_dense(dense, "2:4")
    tensor = to_torch_semi_structured(weight)
    assert torch.equal(tensor.meta, meta)
    assert torch.equal(tensor.packed, packed)
    back = from_torch_semi_structured(tensor)
    assert same(back, weight)
    assert torch.equal(back.mask(), dense != 0)


def test_a_kept_zero_needs_its_mask():
    dense = sparse24(32, 64, torch.bfloat16)
    mask = dense != 0
    free = (mask.view(32, 16, 4).sum(-1) < 2).nonzero()[0]
    column = 4 * int(free[1]) + int((~mask.view(32, 16, 4)[free[0], free[1]]).nonzero()[0])
    mask[free[0], column] = True
    weight = SparseWeight.from_dense(dense, "2:4", mask)
    tensor = to_torch_semi_structured(weight)
    assert torch.equal(tensor.to_dense(), dense)
    assert torch.equal(from_torch_semi_structured(tensor).mask(), dense != 0)
    assert same(from_torch_semi_structured(tensor, mask), weight)
    row, col = (dense != 0).nonzero()[3].tolist()
    mask[row, col] = False
    message = refused(ValueError, lambda: from_torch_semi_structured(tensor, mask), "disagrees", "1 values outside it")
    assert f"row {row}, column {col}" in message
    refused(ValueError, lambda: from_torch_semi_structured(tensor, torch.ones_like(mask)), "not 2:4")
    refused(ValueError, lambda: from_torch_semi_structured(tensor, mask[:16]), "mask is torch.bool with shape (16, 64)")


def test_every_invalid_code_is_refused_and_named():
    tensor = to_torch_semi_structured(SparseWeight.from_dense(sparse24(64, 128, torch.bfloat16), "2:4"))
    valid = {0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110}
    for code in range(16):
        meta = tensor.meta.clone()
        # Stored at row 0, column 0 is row 0, columns 0 to 15; the third group's code is replaced.
        meta[0, 0] = (int(meta[0, 0]) & ~0x0F00) | code << 8
        damaged = CUTLASS(tensor.shape, tensor.packed, meta, None, None, None)
        if code in valid:
            assert torch.equal(
                from_torch_semi_structured(damaged).to_dense(),
                sparse_semi_structured_to_dense_cutlass(tensor.packed, meta),
            )
        else:
            refused(
                ValueError,
                lambda damaged=damaged: from_torch_semi_structured(damaged),
                "corrupted in 1 of 1024 bytes", "row 0, columns 8 to 15",
            )  # fmt: skip


def test_a_code_of_one_position_is_refused_even_where_its_slots_are_zero():
    """In our own metadata it would be a group that keeps one weight."""
    zeros = CUTLASS(torch.Size((32, 64)), torch.zeros(32, 32).half(), torch.zeros(32, 4).short(), None, None, None)
    refused(ValueError, lambda: from_torch_semi_structured(zeros), "corrupted in 256 of 256 bytes", "0x00", "row 0")


def test_refusals_of_what_torch_cannot_hold():
    def convert(N=32, K=64, dtype=torch.bfloat16, layout="2:4", backend="cutlass"):
        return lambda: to_torch_semi_structured(SparseWeight.from_dense(sparse24(N, K, dtype), layout), backend)

    refused(ValueError, convert(N=48), "(48, 64)", "multiple of 32")
    refused(ValueError, convert(K=96), "(32, 96)", "in_features of 64")
    refused(ValueError, convert(N=24, backend="cusparselt"), "cusparselt", "multiple of 16")
    refused(ValueError, convert(dtype=torch.float32), "torch.float32", "one of two", ".to(torch.bfloat16)")
    refused(ValueError, convert(dtype=torch.float64), "torch.float64")
    refused(ValueError, convert(layout="bitmap"), "layout 'bitmap'", "'2:4'")
    refused(ValueError, convert(backend="cublas"), "'cublas'", "'cutlass' or 'cusparselt'")
    refused(TypeError, lambda: to_torch_semi_structured(torch.zeros(32, 64)), "it must be a SparseWeight")
    weight = SparseWeight.from_dense(sparse24(32, 64, torch.bfloat16), "2:4")
    weight.index[3, 2] = 0x02  # first 2, second 0
    refused(ValueError, lambda: to_torch_semi_structured(weight), "corrupted")


def test_refusals_of_what_is_no_such_tensor():
    packed, meta = sparse_semi_structured_from_dense_cutlass(sparse24(32, 64, torch.bfloat16))

    def convert(packed=packed, meta=meta, shape=(32, 64)):
        return lambda: from_torch_semi_structured(CUTLASS(torch.Size(shape), packed, meta, None, None, None))

    refused(TypeError, lambda: from_torch_semi_structured(torch.zeros(32, 64)), "SparseSemiStructuredTensor")
    refused(ValueError, convert(packed=packed[:, :16].contiguous()), "packed has shape (32, 16)", "(32, 32)")
    refused(ValueError, convert(meta=None), "meta is missing")
    refused(ValueError, convert(meta=meta.to(torch.int32)), "meta is torch.int32")
    refused(ValueError, convert(meta=meta[:, :2].contiguous()), "shape (32, 2)", "(32, 4)")
    refused(ValueError, convert(packed=packed.float()), "torch.float32", "one of two")
    transposed = CUTLASS(torch.Size((64, 32)), None, None, packed, meta, None)
    refused(ValueError, lambda: from_torch_semi_structured(transposed), "transposed")


def test_cusparselt_off_cuda_is_refused():
    weight = SparseWeight.from_dense(sparse24(32, 64, torch.bfloat16), "2:4")
    refused(RuntimeError, lambda: to_torch_semi_structured(weight, "cusparselt"), "CUDA only", "backend='cutlass'")
    tensor = CUSPARSELT(torch.Size((32, 64)), weight.values, None, None, None, None)
    refused(RuntimeError, lambda: from_torch_semi_structured(tensor), "on cpu", "cuSPARSELt on CUDA")


def test_cusparselt_round_trip_through_a_stand_in(monkeypatch):
    """The steps around torch's functions, which need CUDA; here the form is the dense weight itself."""
    from lors_cuda import interchange

    compressed = []
    monkeypatch.setattr(CUSPARSELT, "_validate_device_dim_dtype_shape", classmethod(lambda cls, tensor: None))
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: compressed.append(dense) or dense.clone())
    monkeypatch.setattr(CUSPARSELT, "to_dense", lambda tensor: tensor.packed.clone())
    monkeypatch.setattr(interchange, "_require_cuda", lambda *arguments: None)
    dense = sparse24(32, 48, torch.bfloat16)
    weight = SparseWeight.from_dense(dense, "2:4")
    tensor = to_torch_semi_structured(weight, "cusparselt")
    assert isinstance(tensor, CUSPARSELT)
    assert tensor.shape == (32, 48)
    assert len(compressed) == 1
    assert torch.equal(compressed[0], dense)
    assert same(from_torch_semi_structured(tensor), weight)


# ---- as the weight of a layer ----


def semi_structured_net() -> tuple[nn.Sequential, torch.Tensor]:
    """One linear whose weight is torch's semi-structured tensor, and that weight."""
    dense = sparse24(64, 128, torch.bfloat16)
    net = nn.Sequential(nn.Linear(128, 64, bias=False, dtype=torch.bfloat16))
    tensor = to_torch_semi_structured(SparseWeight.from_dense(dense, "2:4"))
    net[0].weight = nn.Parameter(tensor, requires_grad=False)
    return net, dense


def peft_model(net: nn.Module, layout: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    from lors_cuda.peft import LoRSLoraConfig

    return peft.get_peft_model(net, LoRSLoraConfig(r=2, layout=layout, target_modules=["0"]))


DOORS = {
    "LoRSLinear": lambda net, layout: LoRSLinear.from_linear(net[0], r=2, layout=layout),
    "SparseLinear": lambda net, layout: SparseLinear.compress(net[0], layout),
    "get_lors_model": lambda net, layout: get_lors_model(net, LoRSConfig(r=2, layout=layout)),
    "peft": peft_model,
}


@pytest.mark.parametrize("layout", ["auto", "dense", "2:4", "bitmap"])
@pytest.mark.parametrize("door", DOORS)
def test_layers_take_a_semi_structured_weight_over(door, layout):
    net, dense = semi_structured_net()
    assert torch.equal(SparseWeight.from_dense(net[0].weight, layout).to_dense(), dense)
    converted = DOORS[door](net, layout)
    layer = next(module for module in converted.modules() if isinstance(module, SparseLayer))
    assert torch.equal(layer.sparse_weight.to_dense(), dense)
    expected = "2:4" if layout == "auto" else layout
    assert layer.sparse_weight.layout == expected
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(converted(x), SparseLinear(SparseWeight.from_dense(dense, expected))(x))


def test_a_transposed_semi_structured_weight_is_refused():
    net, _ = semi_structured_net()
    refused(ValueError, lambda: SparseWeight.from_dense(net[0].weight.t()), "cannot decompress", "to_sparse_semi")


class Packed(torch.Tensor):
    """A stand-in for torchao's quantized tensors: a class that supports no operation but detach."""

    @staticmethod
    def __new__(cls, dense):
        return torch.Tensor._make_wrapper_subclass(cls, dense.shape, dtype=dense.dtype)

    def __init__(self, dense):
        self.inner = dense

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Packed(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{func} is not supported")


@pytest.mark.parametrize("layout", ["auto", "dense", "2:4", "bitmap"])
def test_other_packed_weights_are_refused_in_a_sentence(layout):
    def net():
        linear = nn.Linear(128, 64, bias=False)
        linear.weight = nn.Parameter(Packed(sparse24(64, 128, torch.float32)), requires_grad=False)
        return nn.Sequential(linear)

    x, A, B = torch.ones(1, 128), torch.ones(2, 128), torch.ones(64, 2)
    doors = [
        *(lambda door=door: door(net(), layout) for door in DOORS.values()),
        lambda: SparseWeight.from_dense(net()[0].weight, layout),
        lambda: lors_linear(x, net()[0].weight, A, B, 1.0),
        lambda: merge(net()[0].weight, A, B, 1.0),
    ]
    for door in doors:
        refused(ValueError, door, "class Packed", "dequantize()")
    estimate = lambda: estimate_gradients(net(), [{"input": x}], loss_fn=lambda model, b: model(**b).sum())  # noqa: E731
    refused(ValueError, estimate, "'0'", "class Packed", "dequantize()")


def test_the_functional_form_names_the_way_for_a_semi_structured_weight():
    net, _ = semi_structured_net()
    weight = net[0].weight
    refused(
        ValueError,
        lambda: lors_linear(torch.ones(1, 128).bfloat16(), weight, torch.ones(2, 128), torch.ones(64, 2), 1.0),
        "SparseWeight.from_dense",
    )
