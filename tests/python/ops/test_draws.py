# SPDX-License-Identifier: Apache-2.0
"""What a merge draws: rounding by chance and noise, bit for bit those of reference.py, in every layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from cases import FLOATS, lors, make_case
from lors_cuda import SparseWeight, _autograd, lors_linear, merge, reference
from lors_cuda.formats import pack_mask
from tolerance import assert_close, assert_zero_off_mask

LAYOUTS = ("dense", "2:4", "bitmap")
HALVES = (torch.bfloat16, torch.float16)
SHAPES = ((1, 4), (7, 36), (40, 264), (50, 1028), (3, 2048))
SEED, NOISE_SEED = 2**62 + 12345, 77


def case_of(seed, shape, dtype, layout, device, **more):
    adapters = None if dtype == torch.float64 else torch.float32
    # Kept weights far below and far above the update, so that some are not moved and some are subnormal in float16.
    case = make_case(
        seed, 5, *shape, 3, dtype, layout=layout, device=device, adapter_dtypes=(adapters, adapters), **more
    )
    size = torch.logspace(-9, 0, shape[1], device=device).to(dtype)
    return case.replace(weight=case.weight * size, lora_A=case.lora_A * 1e-3)


def drawn(case, *draws):
    return lors.merge(*case.adapted, case.scaling, *draws)


def unrounded(case):
    """The merge in float32: what is drawn from."""
    values, mask, index = case.stored
    if index is None and mask is None:
        mask = SparseWeight(values).packed_mask()  # float32 holds what float16 cannot
    return lors.merge(values.float(), mask, index, case.lora_A, case.lora_B, case.scaling)


def same_bits(one, two):
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_known_words():
    words = {seed: reference.random_words(seed, (2, 4096)) for seed in (0, 1, 0x0123456789ABCDEF)}
    known = {
        0: (0x9BEAC78F, 0x96934AEB, 0x10A12FEA, 0x93E72D61, 0xB70FEEAB, 0x6A1F3254),
        1: (0xCD15EC7B, 0x92E71E68, 0x12FBDE81, 0x69F9F1E6, 0x406438C2, 0x067E184F),
        0x0123456789ABCDEF: (0x010FCDF3, 0x4B409996, 0xBBF7FD4E, 0xBC2BF825, 0x4497AFBD, 0xF0C1AA1D),
    }
    for seed, expected in known.items():
        assert tuple(int(words[seed][n, k]) for n in (0, 1) for k in (0, 1, 4095)) == expected
    assert int(words[0].min()) >= 0
    assert int(words[0].max()) < 2**32


def test_numbers_are_standard_normal_and_independent():
    z, u = reference.random_normal(5, (1000, 1000)), reference.random_words(5, (1000, 1000)) / 2.0**32
    assert abs(float(z.mean())) < 5e-3
    assert abs(float(z.var()) - 1) < 5e-3
    assert abs(float((z**4).mean() / z.var() ** 2) - 3) < 0.2
    assert abs(float(u.mean()) - 0.5) < 2e-3

    def correlated(one, two):
        return abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]))

    for lag, x in itertools.product((1, 2, 16, 64), (z, u)):
        assert correlated(x[:, :-lag], x[:, lag:]) < 5e-3
        assert correlated(x[:-lag], x[lag:]) < 5e-3
    for step in (1, 2, 1 << 32, 1 << 40):
        assert correlated(z, reference.random_normal(5 + step, (1000, 1000))) < 5e-3
        assert correlated(u, reference.random_words(5 + step, (1000, 1000)) / 2.0**32) < 5e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_merge_draws_what_the_reference_draws(device, seed, shape, dtype, layout):
    for explicit in (False, True):
        case = case_of(seed, shape, dtype, layout, device, explicit_mask=explicit)
        exact, kept = unrounded(case).cpu(), case.kept.cpu()
        deviation = torch.linspace(0, 1e-3, shape[0])
        noisy = (exact.double() + reference.noise(deviation, NOISE_SEED, kept)).float()
        noise = (deviation.to(device), NOISE_SEED)
        for merged, expected in (
            (drawn(case, SEED), reference.round_by_chance(exact, SEED, dtype)),
            (drawn(case, None, *noise), noisy.to(dtype)),
            (drawn(case, SEED, *noise), reference.round_by_chance(noisy, SEED, dtype)),
        ):
            assert same_bits(merged.cpu(), expected)
            assert_zero_off_mask(merged, case.kept)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wider_results_have_nothing_to_round_and_take_noise(device, seed, layout):
    for dtype in (torch.float32, torch.float64):
        case = case_of(seed, (40, 264), dtype, layout, device)
        assert same_bits(drawn(case, SEED), case.merge())
        deviation = torch.rand(40, device=device)
        merged = drawn(case, SEED, deviation, NOISE_SEED)
        expected = case.merge().double() + reference.noise(deviation, NOISE_SEED, case.kept)
        assert same_bits(merged, expected.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
def test_the_mean_of_many_draws_is_the_value(device, dtype):
    """Each draw is one of the two neighbours; over the seeds their mean is the value, within 5 standard errors."""
    limits, rows, seeds = torch.finfo(dtype), 64, 24
    smallest, step = limits.smallest_normal, limits.eps
    tiny = [smallest * (1 + step / 3), smallest * 0.7503, -smallest * step * 0.3]
    values = torch.tensor([1.001, -1.003, 3e-3, 0.9999, 255.9, 1.0, 0.0, -2.0, limits.max * (1 - step / 8), *tiny])
    near = values.to(dtype)
    toward = torch.where(near.float() < values, torch.inf, -torch.inf).to(dtype)
    other = torch.where(near.float() == values, near, torch.nextafter(near, toward))
    weight = near.expand(rows, -1).contiguous().to(device)
    mask = pack_mask(torch.ones_like(weight, dtype=torch.bool))
    update, ones = (values - near.float()).unsqueeze(0).to(device), torch.ones(rows, 1, device=device)
    total = torch.zeros(len(values), dtype=torch.float64)
    for seed in range(seeds):
        result = lors.merge(weight, mask, None, update, ones, 1.0, seed).cpu()
        assert bool(((result == near) | (result == other)).all())
        total += result.double().sum(0)
    gap = (near.double() - other.double()).abs()
    share = ((values.double() - near.double()).abs() / gap).nan_to_num()
    error = gap * (share * (1 - share) / (seeds * rows)).sqrt()
    assert int((share > 0).sum()) >= 8
    assert bool(((total / (seeds * rows) - values.double()).abs() <= 5 * error).all())


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
def test_every_number_goes_to_a_neighbour_by_its_distance(dtype):
    """reference.round_by_chance against torch's own numbers, over the whole range of the type and beyond."""
    bits = torch.randint(0, 1 << 31, (300, 1000), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    exponents = torch.linspace(60 if dtype == torch.float16 else 0, 255, 300).int().unsqueeze(1)
    x = ((bits & 0x7FFFFF) | exponents << 23).view(torch.float32)
    x[:, ::2] *= -1
    draws = [reference.round_by_chance(x, seed, dtype).float() for seed in range(40)]
    inside = x.abs() <= torch.finfo(dtype).max
    for one in draws:
        assert torch.equal(one[~inside].nan_to_num(0.5), x[~inside].to(dtype).float().nan_to_num(0.5))
    near = x.to(dtype)
    toward = torch.where(near.float() < x, torch.inf, -torch.inf).to(dtype)
    other = torch.where(near.float() == x, near, torch.nextafter(near, toward)).float()
    for one in draws:
        assert bool(((one == near.float()) | (one == other))[inside].all())
    share = ((near.double() - x) / (near.double() - other)).nan_to_num()  # of the draws that are not the nearest
    taken = torch.stack([one != near.float() for one in draws]).double().mean(0)
    for row in range(0, 300, 30):
        part = inside[row : row + 30] & (share[row : row + 30] > 0)
        p, found = share[row : row + 30][part], taken[row : row + 30][part]
        if part.any():
            assert (
                abs(float((found - p).mean())) < 5 * float((p * (1 - p) / 40).mean().sqrt() / p.numel() ** 0.5) + 1e-9
            )


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_forward_and_backward_use_one_weight(device, seed, dtype, layout, tokens):
    case = case_of(seed, (40, 264), dtype, layout, device)
    X, dY = (torch.randn(tokens, n, dtype=dtype, device=device) for n in (264, 40))
    draws = (SEED, torch.full((40,), 0.1, device=device), NOISE_SEED)
    operand = lors.merged_operand(*case.adapted, case.scaling, dtype, tokens, *draws)
    assert same_bits(operand.to(dtype), drawn(case, *draws))
    forward = (*case.adapted, None, case.scaling, "lors")
    needs = (True, True, True)
    fresh = lors.linear_backward(dY, X, *forward, *needs, None, *draws)
    weight = operand.double()
    for result, one, two in (
        (lors.linear(X, *forward, None, *draws), X.double(), weight.T),
        (lors.linear(X, *forward, operand, *draws), X.double(), weight.T),
        (fresh[0], dY.double(), weight),
    ):
        rms = (one.square() @ two.square()).sqrt()
        assert_close(result, one @ two, rms=rms, length=two.shape[0], dtype=dtype, what="matmul")
    plain = lors.linear_backward(dY, X, *forward, *needs)
    assert not torch.equal(fresh[0], plain[0])  # dX sees the drawn weight,
    for one, two in zip(fresh[1:], plain[1:], strict=True):  # the adapters' gradients do not depend on it
        assert same_bits(one, two)


@pytest.mark.parametrize("gradient", ["lors", "exact"])
def test_noise_is_differentiated_at_the_perturbed_weight(seed, gradient):
    case = case_of(seed, (6, 12), torch.float64, "dense", "cpu")
    deviation = torch.full((6,), 0.3)

    def run(X, A, B):
        return _autograd.linear(X, case.weight, None, None, A, B, None, 0.5, "exact", None, None, deviation, NOISE_SEED)

    leaves = [t.clone().requires_grad_() for t in (case.input, case.lora_A, case.lora_B)]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, check_backward_ad=False)
    # By hand, also of "lors", whose adapters' gradients leave out the mask.
    output = _autograd.linear(
        leaves[0], case.weight, None, None, *leaves[1:], None, 0.5, gradient, None, None, deviation, NOISE_SEED
    )
    dX, dA, dB = torch.autograd.grad(output, leaves, case.grad_output)
    noise = reference.noise(deviation, NOISE_SEED, case.kept)
    merged = reference.merge(case.weight, case.lora_A, case.lora_B, 0.5) + noise
    torch.testing.assert_close(output, case.input @ merged.T)
    torch.testing.assert_close(dX, case.grad_output @ merged)
    wanted = reference.linear_backward(
        case.grad_output, case.input, case.weight, case.lora_A, case.lora_B, 0.5, gradient=gradient
    )
    torch.testing.assert_close(dA, wanted[1])
    torch.testing.assert_close(dB, wanted[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_public_functions(device, seed, layout):
    case = case_of(seed, (40, 264), torch.bfloat16, layout, device)
    weight = SparseWeight.from_dense(case.weight, layout)
    adapters = (case.lora_A, case.lora_B, case.scaling)
    expected = drawn(case, 7)
    dense = torch.where(case.kept, case.weight, 0.0)
    for given in (weight, dense):
        assert same_bits(merge(given, *adapters, rounding="stochastic", seed=7), expected)
    stored = weight.merge(*adapters, rounding="stochastic", seed=7)
    assert stored.layout == layout
    assert torch.equal(stored.mask(), weight.mask())
    assert same_bits(stored.to_dense(), expected + 0.0)
    X = case.input
    adapted = lors_linear(X, weight, *adapters, rounding="stochastic", seed=7)
    assert same_bits(adapted, lors_linear(X, expected, *adapters[:1], torch.zeros_like(case.lora_B), 1.0))
    assert not torch.equal(adapted, lors_linear(X, weight, *adapters, rounding="stochastic", seed=8))
    assert same_bits(lors_linear(X, weight, *adapters), lors_linear(X, weight, *adapters, rounding="nearest"))


def test_a_weight_that_is_merged_by_panels_is_drawn_whole(device):
    case = make_case(0, 40, 9000, 264, 3, torch.bfloat16, device=device)
    operand = lors.merged_operand(*case.adapted, case.scaling, torch.bfloat16, 40, SEED)
    forward = (case.input, *case.adapted, None, case.scaling, "lors")
    rms = (case.input.double().square() @ operand.double().square().T).sqrt()
    expected = case.input.double() @ operand.double().T
    output = lors.linear(*forward, None, SEED)
    assert_close(output, expected, rms=rms, length=264, dtype=torch.bfloat16, what="matmul")


def test_refusals(device):
    case = case_of(0, (4, 8), torch.bfloat16, "dense", device)
    args = (case.weight, case.lora_A, case.lora_B, 1.0)
    for rounding, seed, sentence in (
        ("up", None, "rounding is 'up'; it must be 'nearest' or 'stochastic'"),
        ("stochastic", None, "there is no seed; give one"),
        ("nearest", 3, "seed is 3 and rounding is 'nearest', which needs none"),
        ("stochastic", -1, "seed is -1; it must be a whole number from 0 to 2\\^63 - 1"),
        ("stochastic", 2**63, "it must be a whole number from 0"),
        ("stochastic", True, "seed is True"),
        ("stochastic", 1.5, "seed is 1.5"),
    ):
        for call in (merge, lambda *a, **k: lors_linear(case.input, *a, **k)):
            with pytest.raises(ValueError, match=sentence):
                call(*args, rounding=rounding, seed=seed)
    for noise in (torch.ones(5), torch.ones(4, 1), torch.ones(4, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"noise has shape .*; it must be float32 \[4\]"):
            lors.merge(*case.adapted, 1.0, None, noise.to(device), 1)
