# SPDX-License-Identifier: Apache-2.0
"""Layers over quantised weights: what they compute and train, and what torch does with their tensors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from quantised_cases import GRIDS, every_grid, every_layout, make, same_codes, values_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from lors_cuda import LoRSLinear, SparseLinear, SparseWeight, merge_cache, reference
from lors_cuda.pruning import SparsityPattern, select_mask
from lors_cuda.quantization import quantize_codes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N, K, R = 48, 128, 4
SOME = (GRIDS[1], GRIDS[4], GRIDS[5])
some_grids = pytest.mark.parametrize("grid", SOME, ids=["int4", "int8", "e4m3"])
# (steps, remainder): how a layer is requantised; "none" for every kind.
REQUANTIZED = {"plain": {}, "none": {"requantize": True, "remainder": "none"}, "dither": {"requantize": True}}


def layer_of(grid, layout, seed=0, dtype=FP32, device="cpu", size=0.3, **options) -> LoRSLinear:
    """A layer whose adapter moves many codes."""
    torch.manual_seed(seed)
    weight = make(seed, N, K, grid, layout, dtype, device)
    layer = LoRSLinear(weight, torch.randn(N, device=device), r=R, lora_alpha=R, **options)
    with torch.no_grad():
        scale = values_of(weight).float().abs().mean() * size
        layer.lora_A.normal_()
        layer.lora_B.normal_().mul_(scale)
    return layer


def input_of(dtype=FP32, device="cpu", seed=1):
    return torch.randn(17, K, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def expected_codes(layer: LoRSLinear):
    """q' by the reference, from its own float64 merge."""
    weight, (steps, dither_seed) = layer.sparse_weight, layer.requantization
    grid = weight.quantization
    merged = reference.merge(values_of(weight), layer.lora_A, layer.lora_B, layer.scaling, weight.mask())
    dither_seed = None if dither_seed < 0 else dither_seed
    args = (grid.scales.cpu(), grid.zero_points, weight.mask(), grid.kind, steps, dither_seed)
    return reference.requantize(merged, *args)


def ties(one, two):
    """Codes that differ where another order of summation may make them."""
    return int((one.view(torch.int8).int() - two.view(torch.int8).int()).ne(0).sum())


# ---- what is computed -----------------------------------------------------------------------------------------------


@every_layout
@every_grid
@pytest.mark.parametrize("how", REQUANTIZED)
def test_forward_is_the_product_with_the_merged_weight(device, seed, grid, layout, how):
    options = REQUANTIZED[how]
    if how == "dither" and grid[0] != "int4":
        options = {**options, "remainder": "dither"} if grid[0] == "int8" else REQUANTIZED["none"]
    layer = layer_of(grid, layout, seed, device=device, **options)
    for dtype in (FP32, BF16, FP16):
        x = input_of(dtype, device)
        merged = layer.merged_sparse_weight()
        dense = merged.to_dense(dtype) if merged.quantization is not None else None
        if dense is None:
            dense = reference.merge(
                values_of(layer.sparse_weight), layer.lora_A, layer.lora_B, layer.scaling, layer.sparse_weight.mask()
            ).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        wanted = x.double() @ dense.double().T + layer.bias.double()
        limit = {FP32: 1e-5, BF16: 2.0**-7, FP16: 2.0**-10}[dtype]
        assert float((y.double() - wanted).norm() / wanted.norm()) < limit


@every_layout
@every_grid
def test_requantised_codes_are_the_references(device, seed, grid, layout):
    layer = layer_of(grid, layout, seed, device=device, requantize=True)
    stored = layer.merged_sparse_weight()
    codes = stored.codes()
    wanted = expected_codes(layer)
    assert ties(codes.cpu(), wanted) <= 1
    moved = codes.view(torch.int8) != layer.sparse_weight.codes().view(torch.int8)
    assert bool(moved.any())
    assert not bool(moved[~stored.mask()].any())
    assert stored.fingerprint() == layer.sparse_weight.fingerprint()
    assert torch.equal(stored.quantization.scales, layer.weight_scales)
    # A kept weight whose code is that of zero may move again.
    zero = layer.sparse_weight.to_dense() == 0
    assert bool(moved[zero & stored.mask()].any())


@every_layout
def test_a_stored_remainder_gives_int4_codes(seed, layout):
    weight = make(seed, N, K, ("int4", 32, False), layout)
    dense = weight.to_dense() + torch.where(weight.mask(), 0.2 * weight.quantization.by_column()[0], 0.0)
    fine = weight.quantization.finer()
    base = SparseWeight.from_quantized(quantize_codes(dense, weight.mask(), fine), fine, weight.mask(), layout)
    layer = LoRSLinear(base, r=R, requantize=True, remainder="stored")
    merged = layer.merged_sparse_weight()
    assert merged.quantization.kind == "int4"
    assert torch.equal(merged.quantization.scales, weight.quantization.scales)
    # At the start: the base's own rounding to int4, of what is nearer to the dense weight than int4 is.
    assert same_codes(merged.codes(), weight.codes()) or ties(merged.codes(), weight.codes()) < 0.01 * N * K
    with torch.no_grad():
        layer.lora_B.normal_()
    assert ties(layer.merged_sparse_weight().codes(), expected_codes(layer)) <= 1
    assert layer.merged_sparse_weight().layout == layout
    y = layer(input_of())
    assert torch.allclose(y, input_of() @ layer.merged_sparse_weight().to_dense().T, atol=1e-4)


@every_layout
@every_grid
def test_what_is_trained_is_what_is_exported_bit_for_bit(device, seed, grid, layout):
    layer = layer_of(grid, layout, seed, BF16, device, requantize=True)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.01)
    start = layer.sparse_weight.fingerprint()
    for step in range(3):
        optimizer.zero_grad()
        layer(input_of(BF16, device, step)).float().square().mean().backward()
        optimizer.step()
    exported = layer.merged_sparse_weight()
    assert exported.fingerprint() == layer.sparse_weight.fingerprint() == start
    merged = layer.merge()
    assert torch.equal(merged.weight, exported.to_dense())
    assert torch.equal(merged.weight, values_of(exported).to(BF16))
    served = SparseLinear(exported, layer.bias)
    x = input_of(BF16, device, 9)
    assert torch.equal(layer(x), served(x))
    assert not bool(exported.to_dense()[~exported.mask()].any())


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("how", ["plain", "none"])
@every_layout
@some_grids
def test_gradients_pass_straight_through(device, seed, grid, layout, how, gradient):
    layer = layer_of(grid, layout, seed, device=device, gradient=gradient, **REQUANTIZED[how])
    x = input_of(device=device).requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(device)
    y.backward(grad)
    weight = layer.sparse_weight
    dense = values_of(weight)
    _, dA, dB, _ = reference.linear_backward(
        grad, x.detach(), dense, layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling, weight.mask(), gradient
    )
    merged = layer.merged_dense().double()
    for ours, wanted in ((x.grad, grad.double() @ merged), (layer.lora_A.grad, dA), (layer.lora_B.grad, dB)):
        assert float((ours.double() - wanted).norm() / wanted.norm()) < 1e-5


@every_layout
@some_grids
def test_a_disabled_adapter_is_the_frozen_layer(seed, grid, layout):
    layer = layer_of(grid, layout, seed)
    layer.adapter_enabled = False
    frozen = SparseLinear(layer.sparse_weight, layer.bias)
    assert torch.equal(layer(input_of()), frozen(input_of()))
    wanted = input_of() @ values_of(layer.sparse_weight).T + layer.bias
    assert torch.allclose(layer(input_of()), wanted, atol=1e-4)
    assert torch.equal(frozen.to_linear().weight, layer.sparse_weight.to_dense())


# ---- what torch does with it ----------------------------------------------------------------------------------------

CONVERSIONS = {
    "half": lambda m: m.half(), "bfloat16": lambda m: m.bfloat16(), "float": lambda m: m.float(),
    "to": lambda m: m.to(BF16), "to device": lambda m: m.to("cpu", FP16),
}  # fmt: skip


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@every_layout
@every_grid
def test_nothing_converts_codes_and_scales(seed, grid, layout, convert):
    layer = layer_of(grid, layout, seed)
    before = copy.deepcopy(layer.sparse_weight)
    convert(layer)
    after = layer.sparse_weight
    assert same_codes(after.codes(), before.codes())
    assert after.quantization.scales.dtype == FP32
    assert torch.equal(after.quantization.scales, before.quantization.scales)
    assert layer.weight.dtype == layer.bias.dtype == layer.to_linear().weight.dtype == layer.merge().weight.dtype
    assert torch.equal(layer.weight[:], values_of(after).to(layer.bias.dtype))
    layer(input_of(layer.bias.dtype))


def test_the_plain_layer_is_rounded_once_to_the_models_dtype():
    layer = layer_of(GRIDS[4], "2:4", dtype=FP16)
    twin = SparseLinear(layer.sparse_weight, layer.bias.to(BF16), dtype=BF16)
    assert twin.weight.dtype == BF16
    assert torch.equal(twin.to_linear().weight, values_of(layer.sparse_weight).to(BF16))
    adapted = LoRSLinear.from_linear(twin, r=R, requantize=True)
    with torch.no_grad():
        adapted.lora_B.copy_(layer.lora_B)
    merged = adapted.merge()
    assert merged.weight.dtype == merged.bias.dtype == BF16
    x = input_of(BF16)
    assert torch.equal(merged.weight, values_of(adapted.merged_sparse_weight()).to(BF16))
    assert torch.allclose(merged(x), adapted(x), atol=0.05)
    assert copy.deepcopy(twin).half().weight.dtype == FP16
    assert twin.float().to_linear().weight.dtype == FP32


@every_layout
@every_grid
def test_copies_and_states(seed, grid, layout):
    layer = layer_of(grid, layout, seed, requantize=True)
    y = layer(input_of())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(input_of()), y)
        assert twin.requantization == layer.requantization
    state = layer.state_dict()
    named = {"weight_values", "weight_scales", "mask_digest", "bias", "lora_A", "lora_B"}
    named |= {"dense": {"weight_mask"}, "2:4": {"weight_index"}, "bitmap": {"weight_mask", "weight_index"}}[layout]
    assert set(state) == named | (set() if grid[2] else {"weight_zero_points"})
    other = layer_of(grid, layout, seed + 1, requantize=True)
    other.dither_seed = layer.dither_seed
    for assign in (False, True):
        twin = copy.deepcopy(other)
        twin.load_state_dict(copy.deepcopy(state), assign=assign)
        assert torch.equal(twin(input_of()), y)
        twin.check_mask(always=True)


@some_grids
def test_a_state_brings_its_group_and_the_scales_dtype(grid):
    kind, _, symmetric = grid
    layer, source = layer_of(grid, "2:4"), layer_of((kind, 64, symmetric), "2:4", 1, BF16)
    layer.load_state_dict(source.state_dict())
    assert layer.weight_scales.dtype == BF16
    assert layer.sparse_weight.quantization.group == 64
    assert torch.equal(layer(input_of()), source(input_of()))


def test_states_of_other_weights_are_refused_and_change_nothing():
    layer = layer_of(GRIDS[0], "2:4")
    plain = LoRSLinear(SparseWeight.from_dense(values_of(layer.sparse_weight), "2:4"), layer.bias, r=R)
    before = layer.state_dict()
    pairs = [
        (layer, plain.state_dict(), "the state has a weight of values and the layer one of int4 codes"),
        (plain, before, "the state has a weight of codes with scales and the layer one of values"),
        (layer, layer_of(GRIDS[4], "2:4").state_dict(), "weight_values has dtype torch.int8; it must be torch.uint8"),
        (layer, layer_of(GRIDS[5], "2:4").state_dict(), "int4 codes of layout '2:4'"),
        (layer, {**before, "weight_scales": -before["weight_scales"]}, "scales are out of range"),
        (layer, {**before, "weight_scales": 2 * before["weight_scales"]}, "its digest is another one"),
        (layer, {**before, "weight_values": before["weight_values"].float()}, "weight_values has dtype torch.float32"),
        (layer, {**before, "weight_scales": before["weight_scales"].double()}, "weight_scales has dtype torch.float64"),
    ]
    for target, state, message in pairs:
        kept = copy.deepcopy(target.state_dict())
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(state)
        assert all(torch.equal(kept[name], tensor) for name, tensor in target.state_dict().items())


@some_grids
def test_what_an_average_makes_of_codes_is_refused(grid):
    layer = layer_of(grid, "2:4")
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    average.update_parameters(layer)
    average.update_parameters(layer)
    if torch.equal(average.module.weight_values, layer.weight_values):
        assert torch.equal(average(input_of()), layer(input_of()))
    else:
        with pytest.raises(ValueError, match="Masks are not numbers, nor are codes"):
            average(input_of())
    layer.weight_values.data = layer.weight_values + 1
    with pytest.raises(ValueError, match="Masks are not numbers"):
        layer.check_mask(always=True)


@every_layout
@some_grids
@pytest.mark.parametrize("how", ["plain", "none"])
def test_compiled_exported_checkpointed_functional(seed, grid, layout, how):
    torch.compiler.reset()
    layer = layer_of(grid, layout, seed, **REQUANTIZED[how])
    x = input_of().requires_grad_()

    def step(run):
        layer.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        return [t.clone() for t in (y, x.grad, layer.lora_A.grad, layer.lora_B.grad)]

    eager = step(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for other in (step(compiled), step(lambda x: checkpoint(layer, x, use_reentrant=False))):
        assert all(torch.equal(one, two) for one, two in zip(eager, other, strict=True))
    exported = torch.export.export(layer, (x.detach(),)).module()
    assert torch.equal(exported(x.detach()), eager[0])
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert torch.equal(torch.func.functional_call(layer, state, (x.detach(),)), eager[0])
    with merge_cache(layer):
        for _ in range(2):
            assert torch.allclose(layer(x), eager[0], atol=1e-4)
        with torch.no_grad():
            layer.weight_scales.mul_(1.0)  # counted: merged anew, and found to be the same
            layer.lora_B.mul_(2)
        doubled = layer(x)
    assert torch.allclose(doubled, layer(x), atol=1e-4)
    assert not torch.allclose(doubled, eager[0], atol=1e-4)

    def loss(A):
        return torch.func.functional_call(layer, {"lora_A": A}, (x.detach(),)).square().sum()

    layer.zero_grad()
    layer(x).square().sum().backward()
    assert torch.allclose(torch.func.grad(loss)(layer.lora_A.detach()), layer.lora_A.grad, rtol=1e-4, atol=1e-3)


def test_a_kept_merge_is_that_of_the_requantising_in_force():
    layer = layer_of(GRIDS[0], "2:4", requantize=True)
    x = input_of()
    with torch.no_grad(), merge_cache(layer):
        dithered = layer(x)
        for options in ((True, "none", 0), (True, "dither", 9), (False, None, 0)):
            layer.set_requantization(*options)
            other = layer(x)
            assert not torch.equal(other, dithered)
            layer.merged_weight.clear()
            assert torch.equal(layer(x), other)


@some_grids
def test_autocast_and_input_dtypes(grid):
    layer = layer_of(grid, "2:4")
    with torch.autocast("cpu", BF16):
        assert torch.equal(layer(input_of()), layer(input_of(BF16)))
    for bad in (torch.float64, torch.int64):
        with pytest.raises(ValueError, match="of a quantised weight it must be float32, bfloat16 or float16"):
            layer(input_of().to(bad))


@every_layout
@some_grids
def test_on_the_meta_device_and_back(seed, grid, layout):
    layer = layer_of(grid, layout, seed)
    state = copy.deepcopy(layer.state_dict())
    if layout != "bitmap":
        assert layer.to("meta")(torch.empty(3, K, device="meta")).shape == (3, N)
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert torch.equal(layer(input_of()), layer_of(grid, layout, seed)(input_of()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requantize": 1}, "requantize must be True or False"),
        ({"remainder": "dither"}, "Leave remainder='dither' out, or set requantize=True"),
        ({"requantize": True, "remainder": "most"}, "remainder is 'most'"),
        ({"requantize": True, "rounding": "stochastic"}, "rounded by chance"),
        ({"requantize": True, "dither_seed": -1}, "dither_seed is -1"),
        ({"requantize": True, "remainder": "stored"}, "remainder is 'stored', and the weight is no int8 one"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        layer_of(GRIDS[0], "2:4", **options)


def test_defaults_and_repr():
    assert layer_of(GRIDS[0], "2:4", requantize=True, dither_seed=7).requantization == (1, 7)
    assert layer_of(GRIDS[4], "2:4", requantize=True, dither_seed=7).requantization == (1, -1)
    assert layer_of(GRIDS[5], "2:4", requantize=True).requantization == (1, -1)
    assert layer_of(GRIDS[0], "2:4").requantization == (0, -1)
    assert "kind='int4', r=4, lora_alpha=4, gradient='lors', requantize=True, remainder='dither'" in repr(
        layer_of(GRIDS[0], "2:4", requantize=True)
    )
    with pytest.raises(ValueError, match="holds values"):
        LoRSLinear.from_linear(nn.Linear(8, 8), r=2, requantize=True)


# ---- the dead zone --------------------------------------------------------------------------------------------------


def repaired(remainder, seed):
    """The loss after training an int4 layer towards a masked update of a tenth of a step, which few input directions
    and few sums of outputs see: small changes of many weights count, and what single weights are rounded by does not.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    dense = random(96, 96)
    dense = torch.where(select_mask(dense.abs(), SparsityPattern.parse("2:4")), dense, 0.0)
    coarse = SparseWeight.quantize(dense, None, "int4")
    mask, step = coarse.mask(), coarse.quantization.scales.mean()
    base = coarse
    if remainder == "stored":
        finer = coarse.quantization.finer()
        base = SparseWeight.from_quantized(quantize_codes(dense, mask, finer), finer, mask)
    update = random(96, 8) @ random(8, 96)
    target = torch.where(mask, dense + 0.1 * step * update / update.std(), 0.0)
    x, sums = random(256, 4) @ random(4, 96), random(96, 4)
    torch.manual_seed(0)
    layer = LoRSLinear(base, r=8, lora_alpha=8, requantize=True, remainder=remainder)
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=1e-3)
    for _ in range(150):
        loss = ((layer(x) - x @ target.T) @ sums).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_updates_below_half_a_step_are_lost_without_a_remainder():
    lost, dithered, stored = (sum(repaired(how, seed) for seed in (0, 2)) for how in ("none", "dither", "stored"))
    assert dithered < lost / 4
    assert stored < lost / 4
