# SPDX-License-Identifier: Apache-2.0
"""SparseWeight: what goes in comes out, the mask never changes, and the sizes told are the sizes held."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from cases import FLOATS, lors, make_case
from expectations import check_merge
from lors_cuda import SparseWeight
from lors_cuda.sparse import check_layout
from tolerance import assert_zero_off_mask


def stored(case) -> SparseWeight:
    return SparseWeight.from_dense(case.weight, mask=case.mask)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_round_trip(device, seed, dtype, explicit):
    case = make_case(seed, 1, 31, 70, 3, dtype, device=device, explicit_mask=explicit)
    w = stored(case)
    assert (w.layout, w.shape, w.dtype, w.device) == ("dense", (31, 70), dtype, case.weight.device)
    assert torch.equal(w.mask(), case.kept)
    dense = w.to_dense()
    assert torch.equal(dense, torch.where(case.kept, case.weight, 0.0))
    assert_zero_off_mask(dense, dense != 0)  # -0.0 comes back as +0.0
    assert dense.data_ptr() != w.values.data_ptr()
    assert w.density == pytest.approx(case.kept.double().mean().item(), abs=1e-12)
    assert w.nbytes == 31 * 70 * case.weight.element_size() + (31 * 3 * 4 if explicit else 0)


@pytest.mark.parametrize("layout", ["auto", "dense"])
def test_layouts_of_this_version(device, seed, layout):
    case = make_case(seed, 1, 4, 8, 2, device=device)
    assert SparseWeight.from_dense(case.weight, layout).layout == "dense"
    assert SparseWeight.from_dense(case.weight, layout=layout, mask=case.kept).layout == "dense"


@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
def test_layouts_to_come_are_refused_by_name(layout):
    for refuse in (check_layout, lambda name: SparseWeight.from_dense(torch.randn(4, 8), name)):
        with pytest.raises(ValueError, match=f"layout '{layout}' is not available in this version.*layout='auto'"):
            refuse(layout)


@pytest.mark.parametrize("layout", ["24", "csr", "", "Dense", None])
def test_unknown_layouts_are_refused(layout):
    with pytest.raises(ValueError, match=r"layout is .*it must be one of 'auto', 'dense', '2:4', 'bitmap'"):
        SparseWeight.from_dense(torch.randn(4, 8), layout)


def test_the_weight_is_referenced_where_it_needs_no_change(device, seed):
    case = make_case(seed, 1, 31, 70, 3, device=device)
    assert SparseWeight.from_dense(case.weight).values.data_ptr() == case.weight.data_ptr()
    strided = SparseWeight.from_dense(case.weight.T.contiguous().T)
    assert strided.values.is_contiguous()
    assert torch.equal(strided.values, case.weight)
    parameter = torch.nn.Parameter(case.weight.clone())
    assert not SparseWeight.from_dense(parameter).values.requires_grad


def test_garbage_off_an_explicit_mask_becomes_zero(device, seed):
    case = make_case(seed, 1, 13, 70, 3, device=device, explicit_mask=True)
    case.weight[~case.mask] = float("nan")
    w = stored(case)
    assert_zero_off_mask(w.values, case.mask)
    assert_zero_off_mask(w.to_dense(), case.mask)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge(device, seed, dtype, explicit):
    case = make_case(seed, 1, 31, 70, 3, dtype, device=device, explicit_mask=explicit)
    before = stored(case)
    mask = before.mask()
    after = before.merge(case.lora_A.requires_grad_(), case.lora_B, case.scaling)
    check_merge(after.to_dense(), case)
    assert torch.equal(after.mask(), mask)
    assert not after.values.requires_grad
    assert after.fingerprint() == before.fingerprint()
    assert torch.equal(before.to_dense(), stored(case).to_dense())  # untouched


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_merged_value_that_rounds_to_zero_stays_kept(device, dtype):
    weight = torch.tensor([[0.5, 0.0, -1.5, 2.0]], dtype=dtype, device=device)
    w = SparseWeight.from_dense(weight)
    A, B = torch.tensor([[-0.5, 3.0, 1.0, 0.25]], device=device), torch.tensor([[1.0]], device=device)
    once = w.merge(A, B, 1.0)
    assert once.to_dense().tolist() == [[0.0, 0.0, -0.5, 2.25]]
    assert once.mask().tolist() == [[True, False, True, True]]
    assert once.fingerprint() == w.fingerprint()
    twice = once.merge(A, B, 1.0)  # and moves again
    assert twice.to_dense().tolist() == [[-0.5, 0.0, 0.5, 2.5]]


@pytest.mark.parametrize("target", FLOATS)
def test_conversion_keeps_the_mask(device, seed, target):
    case = make_case(seed, 1, 13, 70, 3, torch.float64, device=device)
    case.weight[3, 5] = 1e-60  # nothing in any smaller type
    w = SparseWeight.from_dense(case.weight)
    for converted in (w.to(target), SparseWeight.from_dense(case.weight, mask=case.kept).to(target)):
        assert converted.dtype == target
        assert torch.equal(converted.mask(), case.kept)
        assert torch.equal(converted.to_dense(), w.to_dense().to(target))
        assert converted.fingerprint() == w.fingerprint()
    assert w.dtype == torch.float64


def test_moving_keeps_everything(device, seed):
    case = make_case(seed, 1, 13, 70, 3, device=device, explicit_mask=True)
    w = stored(case)
    for moved in (w.to("cpu"), w.to(torch.device("cpu"))):
        assert moved.device.type == "cpu"
        assert moved.fingerprint() == w.fingerprint()
        assert torch.equal(moved.to_dense(), w.to_dense().cpu())


def test_conversion_to_what_no_kernel_takes_is_refused():
    w = SparseWeight.from_dense(torch.randn(4, 8))
    for dtype in (torch.int8, torch.bool, torch.complex64):
        with pytest.raises((TypeError, ValueError), match="float32, bfloat16, float16 or float64"):
            w.to(dtype)
    with pytest.raises(RuntimeError, match="there are no kernels for xpu devices"):
        w.to("xpu")


def test_fingerprint_tells_masks_apart(device, seed):
    case = make_case(seed, 1, 13, 70, 3, device=device)
    w = SparseWeight.from_dense(case.weight)
    assert len(w.fingerprint()) == 64
    # Of the mask, not of the values or of how the mask is stored.
    assert SparseWeight.from_dense(-3 * case.weight).fingerprint() == w.fingerprint()
    assert SparseWeight.from_dense(case.weight, mask=case.kept).fingerprint() == w.fingerprint()
    assert SparseWeight.from_dense(case.weight.bfloat16(), mask=case.kept).fingerprint() == w.fingerprint()
    seen = {w.fingerprint()}
    for n, k in ((0, 0), (5, 31), (5, 32), (12, 69)):
        flipped = case.kept.clone()
        flipped[n, k] ^= True
        seen.add(SparseWeight.from_dense(case.weight, mask=flipped).fingerprint())
    assert len(seen) == 5
    # The same bits in another shape are another mask.
    tall, wide = torch.full((4, 2), 1.5, device=device), torch.full((4, 3), 1.5, device=device)
    narrow = wide.clone()
    narrow[:, 2] = 0.0
    assert SparseWeight.from_dense(tall).fingerprint() != SparseWeight.from_dense(narrow).fingerprint()


def test_fingerprint_is_of_known_bytes():
    # The format is part of saved adapters: SHA-256 of "NxK:" and the packed mask, little-endian words.
    weight = torch.tensor([[0.5, 0.0, -1.5], [0.0, 2.5, 0.0]])
    import hashlib

    expected = hashlib.sha256(b"2x3:" + bytes([0b101, 0, 0, 0, 0b010, 0, 0, 0])).hexdigest()
    assert SparseWeight.from_dense(weight).fingerprint() == expected


@pytest.mark.parametrize("explicit", [False, True])
def test_copies_and_pickles(device, seed, explicit):
    w = stored(make_case(seed, 1, 13, 70, 3, torch.bfloat16, device=device, explicit_mask=explicit))
    for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert twin.values.data_ptr() != w.values.data_ptr()
        assert torch.equal(twin.values, w.values)
        assert torch.equal(twin.mask(), w.mask())
        assert twin.fingerprint() == w.fingerprint()


def test_repr_says_what_it_is(seed):
    w = stored(make_case(seed, 1, 13, 70, 3, torch.bfloat16))
    assert repr(w) == (
        f"SparseWeight(layout='dense', shape=(13, 70), dtype=torch.bfloat16, device='cpu', density={w.density:.3f})"
    )


def test_repr_of_a_weight_without_values():
    shell = SparseWeight.from_dense(torch.randn(13, 70, device="meta"))
    assert "shape=(13, 70)" in repr(shell)


def test_packed_masks_are_what_the_ops_take(device, seed):
    case = make_case(seed, 1, 13, 70, 3, device=device, explicit_mask=True)
    w = stored(case)
    assert torch.equal(w.mask_bits, lors.mask_pack(case.mask))
    assert SparseWeight.from_dense(case.weight).mask_bits is None


@pytest.mark.parametrize(
    ("weight", "mask", "error", "message"),
    [
        ([[1.5]], None, TypeError, "weight is a list; it must be a torch.Tensor"),
        (torch.randn(4), None, ValueError, "weight has shape (4,); it must be [out_features, in_features]"),
        (torch.randn(2, 4, 4), None, ValueError, "weight has shape (2, 4, 4)"),
        (torch.randn(0, 4), None, ValueError, "both at least 1"),
        (torch.ones(4, 4, dtype=torch.int8), None, ValueError, "weight has dtype torch.int8; it must be float32"),
        (torch.randn(4, 8), torch.ones(4, 8), ValueError, "mask is torch.float32 with shape (4, 8); it must be bool"),
        (torch.randn(4, 8), torch.ones(8, 4, dtype=torch.bool), ValueError, "the weight's shape (4, 8)"),
        (torch.randn(4, 8), [[True]], TypeError, "mask is a list; it must be a torch.Tensor"),
        (torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool, device="meta"), ValueError, "mask is on meta"),
    ],
)
def test_what_cannot_be_stored_is_refused(weight, mask, error, message):
    with pytest.raises(error) as caught:
        SparseWeight.from_dense(weight, mask=mask)
    assert message in str(caught.value)


def test_merge_refuses_adapters_that_do_not_fit():
    w = SparseWeight.from_dense(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"lora_A has shape \(2, 7\); it must be \[r, 8\]"):
        w.merge(torch.randn(2, 7), torch.randn(4, 2), 0.5)
    with pytest.raises(ValueError, match=r"lora_B has shape \(4, 3\); it must be \(4, 2\)"):
        w.merge(torch.randn(2, 8), torch.randn(4, 3), 0.5)
