# SPDX-License-Identifier: Apache-2.0
"""LoRSLinear: starts as the linear it wraps, trains, merges to one again, and survives what people do to modules."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from cases import FLOATS, Case, make_case
from expectations import check_linear, check_merge
from lors_cuda import LoRSLinear, lors_linear, merge
from tolerance import assert_close, assert_zero_off_mask

every_layout = pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])


def linear_of(case: Case) -> nn.Linear:
    linear = nn.Linear(case.weight.shape[1], case.weight.shape[0], bias=case.bias is not None)
    linear.weight = nn.Parameter(case.weight.clone())
    if case.bias is not None:
        linear.bias = nn.Parameter(case.bias.clone())
    return linear


def layer_of(case: Case, **options: object) -> LoRSLinear:
    """A layer with the case's weight (in its layout) and adapter, scaling 0.75."""
    r = case.lora_A.shape[0]
    layer = LoRSLinear.from_linear(
        linear_of(case), r=r, lora_alpha=0.75 * r, layout=case.layout, mask=case.mask, **options
    )
    with torch.no_grad():
        layer.lora_A.copy_(case.lora_A)
        layer.lora_B.copy_(case.lora_B)
    return layer


def adapters_as_held(case: Case, layer: LoRSLinear) -> Case:
    return case.replace(lora_A=layer.lora_A.detach(), lora_B=layer.lora_B.detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_starts_as_the_linear(device, seed, dtype, bias):
    case = make_case(seed, 17, 31, 70, 5, dtype, device=device, bias=bias)
    linear = linear_of(case)
    layer = LoRSLinear.from_linear(linear, r=5)
    assert not layer.lora_B.any()
    assert layer.lora_A.any()
    zero = case.replace(lora_A=layer.lora_A.detach(), lora_B=layer.lora_B.detach())
    check_linear(layer(case.input), zero)
    check_linear(linear(case.input), zero)  # so each is within rounding of the same numbers
    check_merge(layer.merge().weight, zero)
    assert torch.equal(layer.merge().weight, case.weight)


def test_attributes(device, seed):
    case = make_case(seed, 1, 31, 70, 5, torch.bfloat16, device=device, bias=True)
    linear = linear_of(case).eval()
    layer = LoRSLinear.from_linear(linear, r=5, lora_alpha=20, layout="dense", gradient="exact")
    assert (layer.in_features, layer.out_features, layer.r, layer.lora_alpha, layer.scaling) == (70, 31, 5, 20, 4.0)
    assert layer.gradient == "exact"
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((5, 70), (31, 5))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32  # as in PEFT
    assert torch.equal(layer.weight, case.weight)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()  # not a copy
    assert layer.sparse_weight.layout == "dense"
    assert torch.equal(layer.bias, linear.bias)
    assert not layer.training
    assert LoRSLinear.from_linear(linear.train()).training
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert linear.weight.requires_grad  # the wrapped layer is left as it was
    assert LoRSLinear.from_linear(linear_of(make_case(1, 1, 8, 8, 2, torch.float64)), r=2).lora_A.dtype == torch.float64


def test_scaling():
    linear = nn.Linear(64, 64)
    assert LoRSLinear.from_linear(linear).scaling == 1.0
    assert LoRSLinear.from_linear(linear, r=16, lora_alpha=8).scaling == 0.5
    assert LoRSLinear.from_linear(linear, r=16, lora_alpha=8, use_rslora=True).scaling == 2.0
    assert LoRSLinear.from_linear(linear, 3, 10, use_rslora=True).scaling == pytest.approx(10 / math.sqrt(3))


def test_initialisation_is_kaiming_uniform(seed):
    torch.manual_seed(seed)
    layer = LoRSLinear.from_linear(nn.Linear(400, 300), r=64, init_lora_weights=False)
    for weight, fan_in in ((layer.lora_A, 400), (layer.lora_B, 64)):
        limit = 1 / math.sqrt(fan_in)  # kaiming_uniform_ with a = sqrt(5)
        assert weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    before = layer.lora_A.clone()
    layer.reset_adapter()
    assert not torch.equal(layer.lora_A, before)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_backward_is_the_functional(device, seed, dtype, explicit, gradient):
    case = make_case(seed, 9, 31, 70, 5, dtype, device=device, explicit_mask=explicit, bias=True)
    layer = layer_of(case, gradient=gradient)
    output = layer(case.input)
    check_linear(output, adapters_as_held(case, layer))
    output.backward(case.grad_output)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    lors_linear(case.input, case.weight, A, B, 0.75, case.bias, mask=case.mask, gradient=gradient).backward(
        case.grad_output
    )
    assert torch.equal(layer.lora_A.grad, A.grad)
    assert torch.equal(layer.lora_B.grad, B.grad)
    assert layer.bias.grad is None


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_gives_a_linear_with_the_zeros_and_the_output(device, seed, dtype, explicit):
    case = make_case(seed, 17, 31, 70, 5, dtype, device=device, explicit_mask=explicit, bias=True)
    layer = layer_of(case).eval()
    held = adapters_as_held(case, layer)
    linear = layer.merge()
    assert type(linear) is nn.Linear
    assert not linear.training
    assert (linear.weight.dtype, linear.weight.device) == (dtype, case.weight.device)
    check_merge(linear.weight, held)
    assert_zero_off_mask(linear.weight, case.kept)
    # One rounding apart: both read the same merged weight, and only the order of the product's sums differs.
    X, merged = case.input.double(), linear.weight.double()
    bias = case.bias.double()
    expected, rms = X @ merged.T + bias, (X**2 @ (merged**2).T + bias**2).sqrt()
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for output in (layer(case.input), linear(case.input)):
        assert_close(output, expected, rms=rms, length=76, dtype=dtype, acc_dtype=acc_dtype)
    # Nothing is shared with the layer, and merging changed nothing.
    linear.weight.data.fill_(7.5)
    linear.bias.data.fill_(7.5)
    check_linear(layer(case.input), held)


@every_layout
def test_disabled_adapter_is_the_frozen_layer(device, seed, layout):
    case = make_case(seed, 9, 31, 72, 5, device=device, explicit_mask=True, bias=True, layout=layout)
    layer = layer_of(case)
    layer.adapter_enabled = False
    # Not torch's bits: compressed weights are multiplied by our own loops, which sum in another order.
    check_linear(layer(case.input), case.replace(lora_B=torch.zeros_like(case.lora_B)))
    layer.adapter_enabled = True
    check_linear(layer(case.input), case)


def same(a: LoRSLinear, b: LoRSLinear, x: Tensor) -> None:
    """Equal layers that share no memory."""
    assert type(a) is type(b)
    assert str(a) == str(b)
    assert list(a.state_dict()) == list(b.state_dict())
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
        assert value.data_ptr() != b.state_dict()[name].data_ptr(), name
    assert torch.equal(a(x), b(x))
    assert a.sparse_weight.fingerprint() == b.sparse_weight.fingerprint()
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]


@every_layout
@pytest.mark.parametrize("explicit", [False, True])
def test_deepcopy_and_pickle(device, seed, explicit, layout):
    case = make_case(
        seed, 9, 31, 72, 5, torch.bfloat16, device=device, explicit_mask=explicit, bias=True, layout=layout
    )
    layer = layer_of(case, gradient="exact", use_rslora=False)
    layer.adapter_enabled = True
    same(copy.deepcopy(layer), layer, case.input)
    same(pickle.loads(pickle.dumps(layer)), layer, case.input)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    same(torch.load(file, weights_only=False), layer, case.input)


@every_layout
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into_explicit", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_state_dict_round_trips_strictly(device, seed, explicit, into_explicit, assign, layout):
    """Also between layers whose masks are stored differently: the state decides."""
    case = make_case(seed, 9, 31, 72, 5, device=device, explicit_mask=explicit, bias=True, layout=layout)
    layer = layer_of(case)
    assert ("weight_mask" in layer.state_dict()) == {"dense": explicit, "2:4": False, "bitmap": True}[layout]
    assert ("weight_index" in layer.state_dict()) == (layout != "dense")
    other = layer_of(
        make_case(seed + 1, 9, 31, 72, 5, device=device, explicit_mask=into_explicit, bias=True, layout=layout)
    )
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    keys = other.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    same(other, layer, case.input)
    assert torch.equal(other.sparse_weight.mask(), case.kept)


def test_state_dict_inside_a_model(device, seed):
    cases = [make_case(seed + i, 9, 20, 20, 2, device=device, explicit_mask=bool(i)) for i in range(2)]
    model, fresh = (nn.Sequential(*(layer_of(c) for c in cs)) for cs in (cases, cases[::-1]))
    fresh.load_state_dict(model.state_dict(), strict=True)
    for a, b in zip(fresh, model, strict=True):
        same(a, b, cases[0].input)


def test_a_state_of_another_shape_is_refused_and_changes_nothing(seed):
    case = make_case(seed, 9, 31, 70, 5, explicit_mask=True, bias=True)
    layer = layer_of(case)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    wrong = (make_case(seed, 9, 31, 33, 5, explicit_mask=True), make_case(seed, 9, 30, 70, 5))
    for other in wrong:
        state = {k: v for k, v in layer_of(other).state_dict().items() if k.startswith("weight")}
        with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
            layer.load_state_dict(state, strict=False)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    check_linear(layer(case.input), case)
    # A mask that does not belong to its weight is refused too, before anything is computed with it.
    state = {**before, "weight_mask": before["weight_mask"][:, :1]}
    with pytest.raises(RuntimeError, match="weight_mask"):
        layer.load_state_dict(state)


def test_a_state_of_another_layout_is_refused_and_changes_nothing(seed):
    cases = {name: make_case(seed, 9, 31, 72, 5, layout=name) for name in ("dense", "2:4", "bitmap")}
    for own, other in itertools.permutations(cases, 2):
        layer = layer_of(cases[own])
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        with pytest.raises(RuntimeError, match=f"of layout '{other}' and the layer one of layout '{own}'; convert"):
            layer.load_state_dict(layer_of(cases[other]).state_dict())
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        check_linear(layer(cases[own].input), cases[own])


@pytest.mark.parametrize(
    ("layout", "name", "change", "message"),
    [
        ("2:4", "weight_index", lambda t: t.__setitem__((3, 2), 0x61), "first in row 3, columns 16 to 23"),
        ("2:4", "weight_index", lambda t: t.resize_(31, 8), r"must be torch.uint8 \(31, 9\)"),
        ("2:4", "weight_values", lambda t: t.resize_(30, 36), r"must be torch.uint8 \(30, 9\)"),
        ("bitmap", "weight_index", lambda t: t.__setitem__(-1, 3), "first in that of row 31"),
        ("bitmap", "weight_index", lambda t: t.resize_(31), r"must be torch.int32 \(30, 3\)"),
        ("bitmap", "weight_mask", lambda t: t.bitwise_not_(), "corrupted in"),
        ("bitmap", "weight_values", lambda t: t.resize_(t.numel() - 1), "bits that are set"),
    ],
)
def test_a_corrupt_state_is_refused_and_changes_nothing(seed, layout, name, change, message):
    case = make_case(seed, 9, 31, 72, 5, layout=layout)
    layer = layer_of(case)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    change(state[name])
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    check_linear(layer(case.input), case)


@pytest.mark.parametrize(
    ("layout", "name", "dtype"),
    [
        ("dense", "weight_mask", torch.float32),
        ("2:4", "weight_index", torch.float32),
        ("2:4", "weight_index", torch.int32),
        ("bitmap", "weight_mask", torch.float64),
        ("bitmap", "weight_mask", torch.int64),
        ("bitmap", "weight_index", torch.float16),
        ("bitmap", "weight_index", torch.int32),
        *((layout, "weight_values", torch.int32) for layout in ("dense", "2:4", "bitmap")),
    ],
)
def test_a_state_in_another_dtype_is_called_that_and_changes_nothing(seed, layout, name, dtype):
    case = make_case(seed, 9, 31, 72, 5, layout=layout, explicit_mask=layout == "dense")
    layer = layer_of(case)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state[name] = state[name].to(dtype)
    with pytest.raises(RuntimeError, match=rf"{name} has dtype {dtype}; it must be torch\.") as caught:
        layer.load_state_dict(state)
    assert "layout=" not in str(caught.value)
    check_linear(layer(case.input), case)


def test_a_bitmap_of_another_count_loads(device, seed):
    """How many weights are kept is the stored weight's to say, as its mask is."""
    case, other = (
        make_case(seed + i, 9, 31, 72, 5, device=device, layout="bitmap", density=d) for i, d in enumerate((0.5, 0.3))
    )
    layer, into = layer_of(case), layer_of(other)
    into.load_state_dict(layer.state_dict())
    same(into, layer, case.input)


CONVERSIONS = [
    (lambda m: m.half(), torch.float16),
    (lambda m: m.bfloat16(), torch.bfloat16),
    (lambda m: m.double(), torch.float64),
    (lambda m: m.float(), torch.float32),
    (lambda m: m.to(torch.float16), torch.float16),
    (lambda m: m.to(next(m.parameters()).device, torch.bfloat16), torch.bfloat16),
]


@every_layout
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(("convert", "dtype"), CONVERSIONS)
def test_conversions_keep_the_mask(device, seed, convert, dtype, explicit, layout):
    case = make_case(seed, 9, 31, 72, 5, device=device, explicit_mask=explicit, bias=True, layout=layout)
    row, column = case.kept.nonzero()[3].tolist()
    case.weight[row, column] = 1e-9  # zero in float16
    layer = layer_of(case)
    fingerprint, mask = layer.sparse_weight.fingerprint(), layer.sparse_weight.mask()
    converted = convert(nn.Sequential(layer))[0]
    assert converted is layer
    assert converted.weight.dtype == converted.lora_A.dtype == converted.lora_B.dtype == dtype
    assert torch.equal(converted.sparse_weight.mask(), mask)
    assert converted.sparse_weight.fingerprint() == fingerprint
    assert converted.weight_mask is None or converted.weight_mask.dtype == torch.int32
    held = case.replace(
        input=case.input.to(dtype),
        weight=layer.weight,
        mask=mask,
        bias=layer.bias,
        lora_A=layer.lora_A,
        lora_B=layer.lora_B,
    )
    check_linear(converted(held.input), held)
    merged = converted.merge().weight
    check_merge(merged, held)
    assert merged[row, column] != 0  # still kept, and its delta is not lost


@every_layout
def test_moving_to_the_meta_device_and_back(device, seed, layout):
    case = make_case(seed, 9, 31, 72, 5, device=device, explicit_mask=True, layout=layout)
    layer = layer_of(case)
    shell = copy.deepcopy(layer).to("meta")
    assert shell.weight.is_meta
    assert shell(case.input.to("meta")).shape == (9, 31)
    shell = shell.to_empty(device=device)
    shell.load_state_dict(layer.state_dict())
    same(shell, layer, case.input)


def test_repr(seed):
    layer = layer_of(make_case(seed, 1, 31, 70, 5, bias=True), gradient="exact")
    assert repr(layer) == (
        "LoRSLinear(in_features=70, out_features=31, bias=True, layout='dense', r=5, lora_alpha=3.75, gradient='exact')"
    )


def test_thirty_steps_lower_the_loss_and_keep_the_zeros(device, seed):
    case = make_case(seed, 64, 31, 70, 5, device=device, bias=True)
    for gradient in ("lors", "exact"):
        torch.manual_seed(seed)
        layer = LoRSLinear.from_linear(linear_of(case), r=5, gradient=gradient)
        before = layer.weight.clone()
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(30):
            loss = (layer(case.input) - case.grad_output).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]
        assert torch.equal(layer.weight, before)
        assert_zero_off_mask(layer.merge().weight, case.kept)


@every_layout
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_merge_refuses_what_is_not_finite_and_names_the_place(seed, name, bad, layout):
    case = make_case(seed, 1, 31, 72, 5, layout=layout, density=1.0)  # so that [3, 4] and [4, 1] are kept
    for row, column in ((3, 4), (4, 1)):
        if name == "weight":
            case.weight[row, column] = bad
    layer = layer_of(case)
    with torch.no_grad():
        for row, column in ((3, 4), (4, 1)):
            if name != "weight":
                getattr(layer, name)[row, column] = bad
    with pytest.raises(ValueError, match=rf"{name}\[3, 4\] is {bad}; merging would spread it") as caught:
        layer.merge()
    assert "merge again" in str(caught.value)


def overflowing(dtype, layout):
    """A layer [4, 8] of large finite values, whose merged [1, 4] alone is beyond the dtype's range."""
    largest = torch.finfo(dtype).max
    linear = nn.Linear(8, 4, bias=False, dtype=dtype)
    linear.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, -1.0] * 2] * 4, dtype=dtype) * largest * 0.75)
    layer = LoRSLinear.from_linear(linear, r=1, lora_alpha=2.0, layout=layout)
    with torch.no_grad():
        layer.lora_A.fill_(0.0)[0, 4] = 1.0
        layer.lora_B.fill_(0.0)[1, 0] = largest * 0.25
    return layer


@every_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_merge_beyond_the_dtypes_range_is_refused_in_every_door(dtype, layout):
    layer = overflowing(dtype, layout)
    pair = layer.lora_A.detach(), layer.lora_B.detach()
    for refused_merge in (layer.merge, lambda: layer.sparse_weight.merge(*pair, layer.scaling)):
        with pytest.raises(ValueError, match=r"merged\[1, 4\] would be") as caught:
            refused_merge()
        assert str(dtype) in str(caught.value)
        value = float(str(caught.value).partition("would be ")[2].partition(",")[0])
        assert value == pytest.approx(1.25 * torch.finfo(dtype).max, rel=0.01)
    propagated = merge(layer.sparse_weight, *pair, layer.scaling)
    assert torch.isinf(propagated).nonzero().tolist() == [[1, 4]]
    with torch.no_grad():
        layer.lora_B *= 0.5  # just within it
    assert torch.isfinite(layer.merge().weight).all()
    assert torch.isfinite(layer.sparse_weight.merge(*pair, layer.scaling).values).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r is 0; for a layer of 6 x 9 the rank must be between 1 and 6"),
        ({"r": 7}, ValueError, "r is 7; for a layer of 6 x 9 the rank must be between 1 and 6"),
        ({"r": -1}, ValueError, "r is -1"),
        ({"r": 2.0}, TypeError, "r is 2.0; the rank must be an integer"),
        ({"r": True}, TypeError, "r is True; the rank must be an integer"),
        ({"r": 2, "lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite, but is nan"),
        ({"r": 2, "lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite, but is inf"),
        ({"r": 2, "gradient": "true"}, ValueError, "gradient is 'true'; it must be 'lors' or 'exact'"),
        ({"r": 2, "gradient": None}, ValueError, "gradient is None"),
        ({"r": 2, "layout": "3:4"}, ValueError, "layout is '3:4'; it must be 'auto'"),
        ({"r": 2, "layout": "2:4"}, ValueError, "layout '2:4' needs in_features to be a multiple of 4"),
        ({"r": 2, "mask": torch.ones(6, 9)}, ValueError, "mask is torch.float32 with shape (6, 9); it must be bool"),
        ({"r": 2, "mask": torch.ones(9, 6, dtype=torch.bool)}, ValueError, "the weight's shape (6, 9)"),
    ],
)
def test_from_linear_refuses(options, error, message):
    linear = nn.Linear(9, 6)
    before = copy.deepcopy(linear.state_dict())
    with pytest.raises(error) as caught:
        LoRSLinear.from_linear(linear, **options)
    assert message in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in linear.state_dict().items())


@pytest.mark.parametrize("other", [nn.Conv1d(3, 3, 1), nn.Bilinear(3, 3, 3), torch.randn(3, 3), None])
def test_from_linear_wants_a_linear(other):
    with pytest.raises(TypeError, match=rf"linear is a {type(other).__name__}; it must be a torch\.nn\.Linear"):
        LoRSLinear.from_linear(other)
