# SPDX-License-Identifier: Apache-2.0
"""What holds for any shape, stride, dtype, density and pattern of zeros, on examples that hypothesis draws."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import Case, floats, lors, make_case, skip_unserved
from expectations import check_linear, check_linear_backward, check_merge, check_merge_backward
from lors_cuda import LoRSLinear, SparseWeight, lors_linear, merge
from lors_cuda.formats import pack_mask, unpack_mask
from tolerance import assert_zero_off_mask

# Small numbers, and those around the widths of vectors, tiles, mask words and blocks.
sides = st.one_of(st.integers(1, 40), st.sampled_from([47, 48, 63, 64, 65, 95, 96, 97, 127, 129, 255, 257, 385]))
tokens = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 97, 129]))
ranks = st.one_of(st.integers(1, 17), st.sampled_from([31, 32, 33, 64]))
densities = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1))
gradients = st.sampled_from(["lors", "exact"])


@st.composite
def cases(draw: st.DrawFn, device: torch.device) -> Case:
    """A case with everything drawn: its seed, sizes, dtypes, mask form, bias, density, -0.0 and rows of zeros."""
    dtypes = st.sampled_from(floats(device))
    adapter_dtypes = st.sampled_from((None, *floats(device)))
    explicit = draw(st.booleans())
    case = make_case(
        draw(st.integers(0, 2**32)),
        draw(tokens),
        draw(sides),
        draw(sides),
        draw(ranks),
        draw(dtypes),
        device=device,
        explicit_mask=explicit,
        bias=draw(st.booleans()),
        adapter_dtypes=(draw(adapter_dtypes), draw(adapter_dtypes)),
        density=draw(densities),
        scaling=draw(st.sampled_from([0.75, -1.25, 2.0, 0.0625])),
    )
    N, K = case.weight.shape
    for row in draw(st.lists(st.integers(0, N - 1), max_size=3)):
        if explicit:
            case.mask[row] = False
        else:
            case.weight[row] = draw(st.sampled_from([0.0, -0.0]))
    for column in draw(st.lists(st.integers(0, K - 1), max_size=2)):
        case.weight[:, column] = -0.0
    return case


@st.composite
def views(draw: st.DrawFn, t: Tensor) -> Tensor:
    """The 2-D `t` in other strides: row-major, transposed, or every second row or column of a larger matrix."""
    rows, columns = t.shape
    match draw(st.sampled_from(["as is", "transposed", "columns", "rows"])):
        case "transposed":
            return t.T.contiguous().T
        case "columns":
            wide = t.new_empty(rows, 2 * columns + 1).fill_(1)
            wide[:, 1::2] = t
            return wide[:, 1::2]
        case "rows":
            tall = t.new_empty(2 * rows, columns + 2).fill_(1)
            tall[::2, 2:] = t
            return tall[::2, 2:]
    return t


@given(data=st.data())
def test_merge_meets_the_oracle(device, data):
    case = data.draw(cases(device))
    merged = case.merge()
    check_merge(merged, case)
    G = torch.randn(merged.shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).to(merged)
    args = (*case.adapted, case.scaling)
    check_merge_backward(lors.merge_backward(G, *args), G, case)


@given(data=st.data(), gradient=gradients)
def test_linear_and_its_backward_meet_the_oracle(device, data, gradient):
    case = data.draw(cases(device))
    check_linear(case.linear(gradient), case)
    check_linear_backward(case.linear_backward(gradient), case, gradient)


@given(data=st.data(), gradient=gradients)
def test_strides_change_nothing(device, data, gradient):
    case = data.draw(cases(device))
    names = [n for n in ("input", "weight", "mask", "lora_A", "lora_B", "grad_output") if getattr(case, n) is not None]
    strided = case.replace(**{n: data.draw(views(getattr(case, n)), label=n) for n in names})
    assert torch.equal(strided.merge(), case.merge())
    # A product of torch's own, the input's gradient too, may sum in another order for other strides, so that the rest
    # meets the oracle instead.
    for a, b in zip(strided.linear_backward("lors")[1:], case.linear_backward("lors")[1:], strict=True):
        assert torch.equal(a, b)
    check_linear(strided.linear(gradient), case)
    check_linear_backward(strided.linear_backward(gradient), case, gradient)


@given(data=st.data())
def test_tokens_are_independent(device, data):
    """Row t of the output is the layer's output for row t alone: nothing leaks between tokens."""
    case = data.draw(cases(device))
    T = case.input.shape[0]
    if T == 0:
        return
    begin = data.draw(st.integers(0, T - 1))
    end = data.draw(st.integers(begin + 1, T))
    part = case.replace(input=case.input[begin:end], grad_output=case.grad_output[begin:end])
    check_linear(case.linear()[begin:end], part)
    # A row of NaN stays in its row, where torch's own product keeps it there. With AMX torch 2.13 reads a 16-bit row
    # whose length is no multiple of 16 past its end, times zero: there a finite number is lost in the row before, and
    # NaN is not.
    others = torch.arange(T, device=case.input.device) != begin
    spoiled = case.replace(input=case.input.clone())
    spoiled.input[begin] = float("nan")
    plain = spoiled.input @ case.weight.T.to(spoiled.input.dtype)
    if plain[others].isnan().any():
        spoiled.input[begin] = 1e3
    else:
        assert spoiled.linear()[begin].isnan().all()
    assert torch.equal(spoiled.linear()[others], case.linear()[others])


@given(data=st.data())
def test_masks_round_trip(device, data):
    rows, columns = data.draw(st.integers(0, 40)), data.draw(st.one_of(st.integers(0, 70), st.sampled_from([255, 257])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    mask = (torch.rand(rows, columns, generator=generator) < data.draw(densities)).to(device)
    bits = pack_mask(data.draw(views(mask)))
    assert torch.equal(unpack_mask(bits, columns), mask)
    assert torch.equal(unpack_mask(data.draw(views(bits)), columns), mask)


@given(data=st.data())
def test_merging_again_and_again_keeps_the_mask(device, data):
    case = data.draw(cases(device))
    w = SparseWeight.from_dense(case.weight, mask=case.mask)
    mask, fingerprint = w.mask(), w.fingerprint()
    for _ in range(3):
        w = w.merge(case.lora_A, case.lora_B, case.scaling)
        assert_zero_off_mask(w.to_dense(), mask)
        assert torch.equal(w.mask(), mask)
    assert w.fingerprint() == fingerprint


@given(data=st.data())
def test_delta_and_its_negative_cancel(device, data):
    """In float64, merging s and then -s gives the weight back, and a zero adapter gives it exactly."""
    skip_unserved(device, torch.float64)
    case = data.draw(cases(device))
    W = torch.where(case.kept, case.weight, 0.0)
    assert torch.equal(merge(case.weight, case.lora_A, torch.zeros_like(case.lora_B), 0.75, mask=case.mask), W)
    A, B, W = case.lora_A.double(), case.lora_B.double(), W.double()
    there = merge(W, A, B, case.scaling, mask=case.kept)
    back = merge(there, A, B, -case.scaling, mask=case.kept)
    torch.testing.assert_close(back, W, rtol=0, atol=1e-13 * A.shape[0])


@given(data=st.data(), gradient=gradients)
def test_with_nothing_pruned_both_gradients_agree(device, data, gradient):
    case = data.draw(cases(device))
    dense = case.replace(mask=torch.ones_like(case.kept))
    check_linear_backward(dense.linear_backward(gradient), dense, "lors")
    check_linear_backward(dense.linear_backward(gradient), dense, "exact")


@given(data=st.data(), gradient=gradients)
def test_the_layer_is_the_functional_and_merges_to_the_same_numbers(device, data, gradient):
    case = data.draw(cases(device))
    N, K = case.weight.shape
    linear = nn.Linear(K, N, bias=False, dtype=case.weight.dtype, device=device)
    linear.weight = nn.Parameter(case.weight)
    r = min(case.lora_A.shape[0], N, K)
    layer = LoRSLinear.from_linear(linear, r=r, lora_alpha=0.75 * r, layout="dense", mask=case.mask, gradient=gradient)
    with torch.no_grad():
        layer.lora_B.copy_(case.lora_B[:, :r])
    stored = torch.where(case.kept, case.weight, 0.0)
    A, B = layer.lora_A, layer.lora_B
    expected = lors_linear(case.input, stored, A, B, 0.75, mask=case.mask, gradient=gradient)
    assert torch.equal(layer(case.input), expected)
    merged = layer.merge().weight
    assert torch.equal(merged, merge(case.weight, A, B, 0.75, mask=case.mask))
    assert_zero_off_mask(merged, case.kept)
