# SPDX-License-Identifier: Apache-2.0
"""SparseWeight: what goes in comes out, the mask never changes, and the sizes told are the sizes held."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch

from cases import FLOATS, make_case
from expectations import check_merge
from lors_cuda import SparseWeight
from lors_cuda.formats import pack_mask
from tolerance import assert_zero_off_mask

LAYOUTS = ("dense", "2:4", "bitmap")
SMALL, LARGE = (13, 68), (31, 132)
N, K = LARGE

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def stored(case) -> SparseWeight:
    return SparseWeight.from_dense(case.weight, case.layout, case.mask)


def bytes_held(w: SparseWeight) -> int:
    return sum(t.untyped_storage().nbytes() for t in vars(w).values() if isinstance(t, torch.Tensor))


@every_layout
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_round_trip(device, seed, dtype, explicit, layout):
    case = make_case(seed, 1, N, K, 3, dtype, device=device, explicit_mask=explicit, layout=layout)
    w = stored(case)
    assert (w.layout, w.shape, w.dtype, w.device) == (layout, (N, K), dtype, case.weight.device)
    assert torch.equal(w.mask(), case.kept)
    assert torch.equal(w.packed_mask(), pack_mask(case.kept))
    dense = w.to_dense()
    assert torch.equal(dense, torch.where(case.kept, case.weight, 0.0))
    assert_zero_off_mask(dense, dense != 0)  # -0.0 comes back as +0.0
    assert dense.data_ptr() != w.values.data_ptr()
    assert w.density == pytest.approx(case.kept.double().mean().item(), abs=1e-12)
    size, words = case.weight.element_size(), N * ((K + 31) // 32) * 4
    assert (
        w.nbytes
        == {
            "dense": N * K * size + (words if explicit else 0),
            "2:4": N * K // 2 * size + N * ((K + 7) // 8),
            "bitmap": int(case.kept.sum()) * size + words + 8 * (N + 1),
        }[layout]
    )
    if layout != "dense":
        assert bytes_held(w) == w.nbytes


def test_bytes_at_16_bits(device, seed):
    """What the layouts promise: 0.5625 x the dense bytes, and density + 1/16."""
    case = make_case(seed, 1, 256, 1024, 1, torch.bfloat16, device=device, layout="2:4")
    dense = case.weight.nbytes
    assert SparseWeight.from_dense(case.weight, "2:4").nbytes == 0.5625 * dense
    w = SparseWeight.from_dense(case.weight, "bitmap")
    assert w.nbytes == pytest.approx((w.density + 1 / 16) * dense, rel=0.01)


def test_auto_takes_the_smallest_layout(device, seed):
    def layout(density: float, pattern: str = "dense", columns: int = 68, **options: object) -> str:
        case = make_case(seed, 1, 31, columns, 2, torch.bfloat16, device=device, density=density, layout=pattern)
        return SparseWeight.from_dense(case.weight, **options).layout

    assert layout(0.5, "2:4") == "2:4"
    assert layout(0.5) == "bitmap"
    assert layout(0.5, columns=33) == "bitmap"
    assert layout(1.0) == "dense"
    assert layout(0.97) == "dense"  # its bits would take more than its zeros
    # With a mask the mask decides, not what stands off it.
    case = make_case(seed, 1, 31, 68, 2, device=device, explicit_mask=True, layout="2:4")
    assert SparseWeight.from_dense(case.weight, mask=case.mask).layout == "2:4"
    assert SparseWeight.from_dense(torch.randn(4, 8, device="meta")).layout == "dense"


@pytest.mark.parametrize(
    ("weight", "layout", "message"),
    [
        (torch.ones(4, 6), "2:4", "weight has shape (4, 6); layout '2:4' needs in_features to be a multiple of 4"),
        (torch.ones(4, 6, device="meta"), "2:4", "in_features to be a multiple of 4"),
        (
            torch.ones(4, 8),
            "2:4",
            "8 of 8 aligned groups of four keep more than two weights, the first at row 0",
        ),
        (
            torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, float("nan"), -0.0]]),
            "2:4",
            "weight of shape (2, 8) is not 2:4: 1 of 4 aligned groups of four keep more than two weights, the first at "
            "row 1, column 4. Prune it to 2:4",
        ),
        (torch.ones(4, 8, device="meta"), "bitmap", "on the meta device, where it has no values to compress"),
    ],
)
def test_a_weight_that_does_not_fit_the_layout(weight, layout, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseWeight.from_dense(weight, layout)


def test_the_mask_decides_whether_it_is_2_4(device):
    weight, mask = torch.ones(2, 8, device=device), torch.zeros(2, 8, dtype=torch.bool, device=device)
    mask[:, ::2] = True
    w = SparseWeight.from_dense(weight, "2:4", mask)
    assert torch.equal(w.mask(), mask)
    mask[1, 5] = True
    with pytest.raises(
        ValueError, match="1 of 4 aligned groups of four keep more than two weights, the first at row 1, column 4"
    ):
        SparseWeight.from_dense(weight, "2:4", mask)


@every_layout
def test_kept_zeros_stay_kept(device, layout):
    weight = torch.zeros(1, 8, device=device)
    mask = torch.tensor([[False, True, False, True, False, False, False, False]], device=device)
    w = SparseWeight.from_dense(weight, layout, mask)
    assert torch.equal(w.mask(), mask)
    merged = w.merge(torch.ones(1, 8, device=device), torch.full((1, 1), 2.0, device=device), 1.0)
    assert merged.layout == layout
    assert merged.to_dense().tolist() == [[0, 2, 0, 2, 0, 0, 0, 0]]


@pytest.mark.parametrize("layout", ["24", "csr", "", "Dense", None])
def test_unknown_layouts_are_refused(layout):
    with pytest.raises(ValueError, match=r"layout is .*it must be 'auto', 'dense', '2:4' or 'bitmap'"):
        SparseWeight.from_dense(torch.randn(4, 8), layout)


def test_the_weight_is_referenced_where_it_needs_no_change(device, seed):
    case = make_case(seed, 1, 31, 70, 3, device=device)
    assert SparseWeight.from_dense(case.weight, "dense").values.data_ptr() == case.weight.data_ptr()
    strided = SparseWeight.from_dense(case.weight.T.contiguous().T, "dense")
    assert strided.values.is_contiguous()
    assert torch.equal(strided.values, case.weight)
    parameter = torch.nn.Parameter(case.weight.clone())
    assert not SparseWeight.from_dense(parameter, "dense").values.requires_grad


@every_layout
def test_garbage_off_an_explicit_mask_becomes_zero(device, seed, layout):
    case = make_case(seed, 1, *SMALL, 3, device=device, explicit_mask=True, layout=layout)
    case.weight[~case.mask] = float("nan")
    w = stored(case)
    if layout == "dense":
        assert_zero_off_mask(w.values, case.mask)
    assert_zero_off_mask(w.to_dense(), case.mask)


@every_layout
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge(device, seed, dtype, explicit, layout):
    case = make_case(seed, 1, N, K, 3, dtype, device=device, explicit_mask=explicit, layout=layout)
    before = stored(case)
    mask = before.mask()
    after = before.merge(case.lora_A.requires_grad_(), case.lora_B, case.scaling)
    check_merge(after.to_dense(), case)
    assert after.layout == layout
    assert torch.equal(after.mask(), mask)
    assert not after.values.requires_grad
    assert after.fingerprint() == before.fingerprint()
    assert torch.equal(before.to_dense(), stored(case).to_dense())  # untouched


@every_layout
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_merged_value_that_rounds_to_zero_stays_kept(device, dtype, layout):
    weight = torch.tensor([[0.5, 0.0, -1.5, 0.0]], dtype=dtype, device=device)
    w = SparseWeight.from_dense(weight, layout)
    A, B = torch.tensor([[-0.5, 3.0, 1.0, 0.25]], device=device), torch.tensor([[1.0]], device=device)
    once = w.merge(A, B, 1.0)
    assert once.to_dense().tolist() == [[0.0, 0.0, -0.5, 0.0]]
    assert once.mask().tolist() == [[True, False, True, False]]
    assert once.fingerprint() == w.fingerprint()
    twice = once.merge(A, B, 1.0)  # and moves again
    assert twice.to_dense().tolist() == [[-0.5, 0.0, 0.5, 0.0]]


@every_layout
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_takes_large_values_and_refuses_infinite_ones(device, dtype, layout):
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 9, dtype=dtype, device=device) * torch.finfo(dtype).max / 2
    A, B = torch.ones(1, 4, device=device), torch.ones(9, 1, device=device)
    merged = SparseWeight.from_dense(weight, layout).merge(A, B, 1.0)  # values whose sum overflows
    assert torch.equal(merged.to_dense(), weight + (weight != 0))
    for bad in (float("inf"), float("-inf"), float("nan")):
        weight[3, 1] = bad
        with pytest.raises(ValueError, match=r"weight\[3, 1\] is "):
            SparseWeight.from_dense(weight, layout).merge(A, B, 1.0)


@every_layout
@pytest.mark.parametrize("target", FLOATS)
def test_conversion_keeps_the_mask(device, seed, target, layout):
    case = make_case(seed, 1, *SMALL, 3, torch.float64, device=device, layout=layout)
    row, column = case.kept.nonzero()[100].tolist()
    case.weight[row, column] = 1e-60  # nothing in any smaller type
    w = SparseWeight.from_dense(case.weight, layout)
    for converted in (w.to(target), SparseWeight.from_dense(case.weight, layout, case.kept).to(target)):
        assert converted.layout == layout
        assert converted.dtype == target
        assert torch.equal(converted.mask(), case.kept)
        assert torch.equal(converted.to_dense(), w.to_dense().to(target))
        assert converted.fingerprint() == w.fingerprint()
    assert w.dtype == torch.float64


@every_layout
def test_moving_keeps_everything(device, seed, layout):
    case = make_case(seed, 1, *SMALL, 3, device=device, explicit_mask=True, layout=layout)
    w = stored(case)
    for moved in (w.to("cpu"), w.to(torch.device("cpu"))):
        assert (moved.layout, moved.device.type) == (layout, "cpu")
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
    assert SparseWeight.from_dense(case.weight, "bitmap").fingerprint() == w.fingerprint()
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
    padded = torch.nn.functional.pad(weight, (0, 1))
    expected = hashlib.sha256(b"2x4:" + bytes([0b101, 0, 0, 0, 0b010, 0, 0, 0])).hexdigest()
    for layout in LAYOUTS:
        assert SparseWeight.from_dense(padded, layout).fingerprint() == expected


@every_layout
@pytest.mark.parametrize("explicit", [False, True])
def test_copies_and_pickles(device, seed, explicit, layout):
    w = stored(make_case(seed, 1, *SMALL, 3, torch.bfloat16, device=device, explicit_mask=explicit, layout=layout))
    for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert twin.values.data_ptr() != w.values.data_ptr()
        assert torch.equal(twin.values, w.values)
        assert torch.equal(twin.mask(), w.mask())
        assert twin.fingerprint() == w.fingerprint()


@every_layout
def test_repr_says_what_it_is(seed, layout):
    w = stored(make_case(seed, 1, *SMALL, 3, torch.bfloat16, layout=layout))
    assert repr(w) == (
        f"SparseWeight(layout='{layout}', shape=(13, 68), dtype=torch.bfloat16, device='cpu', density={w.density:.3f})"
    )


def test_repr_of_a_weight_without_values():
    shell = SparseWeight.from_dense(torch.randn(13, 70, device="meta"))
    assert "shape=(13, 70)" in repr(shell)


def test_packed_masks_are_what_the_ops_take(device, seed):
    case = make_case(seed, 1, 13, 70, 3, device=device, explicit_mask=True)
    w = stored(case)
    assert torch.equal(w.mask_bits, pack_mask(case.mask))
    assert SparseWeight.from_dense(case.weight, "dense").mask_bits is None


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


@pytest.mark.parametrize("explicit", [False, True])
def test_compressed_tensors_come_back_in(device, seed, explicit):
    case = make_case(seed, 1, N, K, 3, torch.float16, device=device, explicit_mask=explicit, layout="2:4")
    w = stored(case)
    again = SparseWeight.from_sparse24(w.values, w.index)
    assert torch.equal(again.to_dense(), w.to_dense())
    w = stored(case.replace(layout="bitmap"))
    again = SparseWeight.from_bitmap(w.values, w.mask_bits, w.index, K)
    assert (again.shape, again.layout) == ((N, K), "bitmap")
    assert torch.equal(again.to_dense(), w.to_dense())


def corrupt() -> list:
    i32, u8 = torch.int32, torch.uint8
    values, metadata = torch.zeros(2, 6), torch.tensor([[0x11, 0x01], [0x11, 0x01]], dtype=u8)
    sparse24, bitmap = SparseWeight.from_sparse24, SparseWeight.from_bitmap
    bits, offsets = torch.tensor([[0b101], [0b10]], dtype=i32), torch.tensor([0, 2, 3])
    wrong = metadata.clone()
    wrong[1, 0] = 0x61  # group 1: first 2, second 1
    filled = values.clone()
    filled[0, 5] = 1.0
    return [
        (sparse24, (values[0], metadata), "values have shape (6,); they must be [out_features, in_features / 2]"),
        (sparse24, (torch.zeros(2, 5), metadata), "2:4 has an even number in each row"),
        (sparse24, (values.int(), metadata), "values have dtype torch.int32"),
        (
            sparse24,
            (values, metadata[:, :1]),
            "with shape (2, 1); it must be torch.uint8 (2, 2)",
        ),
        (sparse24, (values, metadata.int()), "metadata is torch.int32"),
        (
            sparse24,
            (values, wrong),
            "is corrupted in 1 of 4 bytes of its metadata, first in row 1, columns 0 to 7",
        ),
        (sparse24, (values, wrong), "the byte is 0x61"),
        (sparse24, (filled, metadata), "first in row 0, columns 8 to 11"),
        (bitmap, (torch.zeros(3, 1), bits, offsets, 12), "values have shape (3, 1); they must be one-dimensional"),
        (bitmap, (torch.zeros(3), bits, offsets.int(), 12), "row_offsets is torch.int32"),
        (bitmap, (torch.zeros(3), bits, offsets, 33), "mask_bits is torch.int32 with shape (2, 1); it must be"),
        (bitmap, (torch.zeros(3), bits.long(), offsets, 12), "mask_bits is torch.int64"),
        (bitmap, (torch.zeros(3), bits, offsets[:1], 12), "row_offsets has shape (1,) and in_features is 12"),
        (bitmap, (torch.zeros(3), bits, offsets, 0), "in_features is 0"),
        (
            bitmap,
            (torch.zeros(4), bits, offsets, 12),
            "it has 4 values, and 3 by the bits that are set",
        ),
        (
            bitmap,
            (torch.zeros(3), bits, torch.tensor([0, 1, 3]), 12),
            "first in that of row 1: it is 1, and 2 by the bits that are set in the rows before",
        ),
        (
            bitmap,
            (torch.zeros(3), bits, torch.tensor([0, 2, 2**62]), 12),
            "corrupted in 1 of 3 row offsets, first in that of row 2",
        ),
        (bitmap, (torch.zeros(3), bits | 1 << 12, offsets, 12), "corrupted in 2 rows"),
    ]


@pytest.mark.parametrize(("make", "args", "message"), corrupt())
def test_corrupt_tensors_are_refused(make, args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(*args)
