# SPDX-License-Identifier: Apache-2.0
"""The layouts in plain torch (lors_cuda.formats): what is stored, the C++ compressor against it, refusals."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from cases import FLOATS, floats, lors, make_case
from lors_cuda import SparseWeight
from lors_cuda.formats import kept_values, pack_mask, plain_kept_values, row_offsets, unpack_mask

# (out_features, in_features): one group, an odd number of groups, words of the mask that are not full, several vectors.
SHAPES = ((1, 4), (3, 12), (5, 36), (7, 64), (2, 68), (31, 132), (8, 1028))
FORMATS = ("sparse24_merge", "compress")


def arguments(op: str, case) -> tuple[object, ...]:
    """Positional arguments that `op` accepts."""
    if op == "compress":
        return case.weight, pack_mask(case.kept)
    values, _, metadata = case.replace(layout="2:4").stored
    return values, metadata, case.lora_A, case.lora_B, case.scaling


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("op", FORMATS)
def test_opcheck(device, seed, op, explicit):
    if op == "compress" and device.type != "cpu":
        pytest.skip("lors::compress is for the CPU")
    case = make_case(seed, 1, 6, 36, 3, device=device, explicit_mask=explicit, layout="2:4")
    torch.library.opcheck(getattr(lors, op).default, arguments(op, case))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 31), (4, 32), (5, 33), (7, 64), (31, 257), (300, 515)])
def test_masks_pack_and_unpack(device, seed, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device) < 0.4
    bits = pack_mask(mask)
    assert bits.dtype == torch.int32
    assert bits.shape == (shape[0], (shape[1] + 31) // 32)
    assert torch.equal(unpack_mask(bits, shape[1]), mask)
    # Bit k % 32 of word k // 32, and no bit beyond the last column.
    words = bits.cpu().to(torch.int64) & 0xFFFFFFFF
    for n, k in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)):
        if 0 not in shape:
            assert bool(words[n, k // 32] >> (k % 32) & 1) == bool(mask[n, k])
    assert int(sum((words >> i & 1).sum() for i in range(32))) == int(mask.sum())
    for strided in (mask.T.contiguous().T, torch.stack([mask, ~mask], dim=-1)[..., 0]):
        assert torch.equal(pack_mask(strided), bits)
    assert torch.equal(unpack_mask(bits.T.contiguous().T, shape[1]), mask)


def plain_sparse24(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """values and metadata, as docs/formats.md words it, group by group."""
    N, K = weight.shape
    values, metadata = torch.zeros(N, K // 2, dtype=weight.dtype), torch.zeros(N, (K + 7) // 8, dtype=torch.uint8)
    for n in range(N):
        for g in range(K // 4):
            at = kept[n, 4 * g : 4 * g + 4].nonzero().flatten().tolist()
            first, second = (1, 0) if not at else (at[0], at[-1])
            slots = {0: [], 1: [(1 if first == 3 else 0, first)], 2: [(0, first), (1, second)]}[len(at)]
            for slot, position in slots:
                values[n, 2 * g + slot] = weight[n, 4 * g + position] + 0.0
            metadata[n, g // 2] += (first | second << 2) << (4 * (g % 2))
    return values, metadata


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.cpu().contiguous().view(torch.uint8), expected.cpu().contiguous().view(torch.uint8))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse24_bit_by_bit(device, seed, shape, dtype, explicit):
    case = make_case(seed, 1, *shape, 2, dtype, device=device, explicit_mask=explicit, layout="2:4")
    weight, kept = case.weight.cpu(), case.kept.cpu()
    expected_values, expected_metadata = plain_sparse24(weight, kept)
    w = SparseWeight.from_dense(case.weight, "2:4", case.mask)
    assert torch.equal(w.index.cpu(), expected_metadata)
    assert same_bits(w.values, expected_values)  # -0.0 is stored as +0.0
    assert same_bits(w.to_dense(), torch.where(kept, weight, 0.0) + 0.0)
    assert torch.equal(w.mask().cpu(), kept)
    again = SparseWeight.from_sparse24(w.values, w.index)
    assert again.shape == shape


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (17, 33), (3, 1), (4, 257)], ids=str)
def test_bitmap_bit_by_bit(device, seed, shape, dtype, explicit, density):
    case = make_case(seed, 1, *shape, 1, dtype, device=device, explicit_mask=explicit, density=density)
    weight, kept = case.weight.cpu(), case.kept.cpu()
    w = SparseWeight.from_dense(case.weight, "bitmap", case.mask)
    assert torch.equal(w.mask_bits, pack_mask(case.kept))
    assert w.index.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert same_bits(w.values, weight[kept] + 0.0)
    assert same_bits(w.to_dense(), torch.where(kept, weight, 0.0) + 0.0)
    assert SparseWeight.from_bitmap(w.values, w.mask_bits, w.index, shape[1]).shape == shape


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (17, 33), (0, 7), (300, 515)], ids=str)
def test_the_compressor_is_plain_torch_bit_for_bit(device, seed, shape, dtype, density):
    """On the CPU kept_values is a C++ operator."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    for special in (-0.0, float("nan"), float("inf")):
        weight[torch.rand(shape, generator=generator) < 0.1] = special
    bits = pack_mask(torch.rand(shape, generator=generator) < density)
    weight, bits = weight.to(device), bits.to(device)
    expected = plain_kept_values(weight, bits)
    for given in (weight, weight.T.contiguous().T):
        assert same_bits(kept_values(given, bits), expected)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
def test_what_is_not_finite_is_kept(device, layout, special):
    for dtype in floats(device):
        weight = torch.zeros(2, 8, dtype=dtype, device=device)
        weight[1, 6] = special
        w = SparseWeight.from_dense(weight, layout)
        assert torch.equal(w.to_dense().nan_to_num(), weight.nan_to_num())
        assert w.packed_mask().tolist() == [[0], [1 << 6]]


@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
def test_a_stored_minus_zero_is_plus_zero_in_dense(device, layout):
    """Other programs' files may hold one."""
    for dtype in floats(device):
        w = SparseWeight.from_dense(torch.ones(3, 8, dtype=dtype, device=device).tril_(), "bitmap")
        if layout == "2:4":
            w = SparseWeight.from_dense(torch.eye(3, 8, dtype=dtype, device=device), "2:4")
        w.values.fill_(-0.0)
        assert not w.to_dense().signbit().any()


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_not_2_4_is_counted_and_named(device, seed, shape, explicit):
    N, K = shape
    case = make_case(seed, 1, N, K, 1, device=device, explicit_mask=explicit, density=0.6)
    offending = case.kept.cpu().view(N, K // 4, 4).sum(-1) > 2
    if not offending.any():
        assert SparseWeight.from_dense(case.weight, "2:4", case.mask).layout == "2:4"
        return
    row, group = offending.nonzero()[0].tolist()
    said = (
        f"{int(offending.sum())} of {N * K // 4} aligned groups of four keep more than two weights, the first at row "
        f"{row}, column {4 * group}."
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        SparseWeight.from_dense(case.weight, "2:4", case.mask)


# ---- untrusted bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", range(16))
@pytest.mark.parametrize("group", [0, 1, 2, 6])
def test_every_code_is_told_apart(device, code, group):
    """Seven groups: the last byte holds one, and its other half must be 0."""
    metadata = torch.full((1, 4), 0x11, dtype=torch.uint8)
    metadata[0, 3] = 0x01
    shift = 4 * (group % 2)
    metadata[0, group // 2] = (int(metadata[0, group // 2]) & ~(15 << shift)) | code << shift
    values, metadata = torch.zeros(1, 14, device=device), metadata.to(device)
    if (code & 3) <= code >> 2 or code == 1:
        SparseWeight.from_sparse24(values, metadata)
        return
    columns = f"first in row 0, columns {8 * (group // 2)} to {min(8 * (group // 2) + 8, 28) - 1}: the byte is 0x"
    with pytest.raises(ValueError, match=f"corrupted in 1 of 4 bytes of its metadata, {columns}"):
        SparseWeight.from_sparse24(values, metadata)


@pytest.mark.parametrize("group", range(7))
@pytest.mark.parametrize("code", [code for code in range(16) if (code & 3) <= code >> 2 or code == 1])
def test_a_slot_without_a_weight_holds_plus_zero(device, code, group):
    first, second = code & 3, code >> 2
    held = {0: first < second or (first == second != 3), 1: first < second or first == second == 3}
    for dtype in floats(device):
        for slot, value in ((0, 1.0), (1, 1.0), (0, -0.0), (1, -0.0), (1, float("nan"))):
            metadata = torch.full((2, 4), 0x11, dtype=torch.uint8)
            metadata[:, 3] = 0x01
            shift = 4 * (group % 2)
            metadata[1, group // 2] = (int(metadata[1, group // 2]) & ~(15 << shift)) | code << shift
            values = torch.zeros(2, 14, dtype=dtype)
            values[1, 2 * group + slot] = value
            given = values.to(device), metadata.to(device)
            if held[slot]:
                SparseWeight.from_sparse24(*given)
                continue
            said = f"corrupted in 1 of its values, first in row 1, columns {4 * group} to {4 * group + 3}"
            with pytest.raises(ValueError, match=said):
                SparseWeight.from_sparse24(*given)


def test_bits_beyond_the_last_group_are_corrupt(device):
    metadata = torch.tensor([[0x11], [0x11]], dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="corrupted in 2 of 2 bytes of its metadata, first in row 0, columns 0 to 3"):
        SparseWeight.from_sparse24(torch.zeros(2, 2, device=device), metadata)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b, o: b[1].__setitem__(0, int(b[1, 0]) ^ 4), "row offsets, first in that of row 2"),
        (lambda b, o: b[2].__setitem__(1, int(b[2, 1]) | 1 << 20), "in 1 rows, first in row 2: bits beyond the last"),
        (
            lambda b, o: b[2].__setitem__(1, int(b[2, 1]) | -(1 << 31)),
            "in 1 rows, first in row 2: bits beyond the last",
        ),
        (lambda b, o: o.__setitem__(2, int(o[2]) + 1), "corrupted in 1 of 5 row offsets, first in that of row 2"),
        (lambda b, o: o.__setitem__(0, -1), "corrupted in 1 of 5 row offsets, first in that of row 0: it is -1, and 0"),
        (lambda b, o: o.__setitem__(4, int(o[4]) + 1), "corrupted in 1 of 5 row offsets, first in that of row 4"),
        (lambda b, o: o.add_(1), "corrupted in 5 of 5 row offsets, first in that of row 0: it is 1"),
        (lambda b, o: o.__setitem__(2, 2**62), "corrupted in 1 of 5 row offsets, first in that of row 2"),
        (lambda b, o: o.__setitem__(2, -(2**63)), "corrupted in 1 of 5 row offsets, first in that of row 2"),
    ],
)
def test_bits_and_offsets_that_disagree(device, seed, change, said):
    bits = pack_mask(make_case(seed, 1, 4, 50, 1).kept)
    offsets = row_offsets(bits)
    values = torch.zeros(int(offsets[-1]))
    change(bits, offsets)
    args = values.to(device), bits.to(device), offsets.to(device)
    with pytest.raises(ValueError, match=said):
        SparseWeight.from_bitmap(*args, 50)
    if device.type == "cpu":  # the operators, which trust what was checked, look at what leads outside once more
        w = SparseWeight(*args, in_features=50)
        with pytest.raises(RuntimeError, match="pass the tensors of one SparseWeight"):
            w.to_dense()


def test_a_value_too_many_or_too_few(device, seed):
    bits = pack_mask(make_case(seed, 1, 4, 50, 1, device=device).kept)
    count = int(row_offsets(bits)[-1])
    for more in (-1, 1):
        with pytest.raises(ValueError, match=f"it has {count + more} values, and {count} by the bits that are set"):
            SparseWeight.from_bitmap(torch.zeros(count + more, device=device), bits, row_offsets(bits), 50)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 4), (5, 36), (31, 132), (100, 516), (8, 2052)], ids=str)
@pytest.mark.parametrize("r", [1, 16])
def test_merges_from_compressed_are_the_dense_merge_bit_for_bit(device, seed, shape, dtype, explicit, r):
    case = make_case(seed, 1, *shape, r, dtype, device=device, explicit_mask=explicit, layout="2:4")
    bits = pack_mask(case.kept)
    dense = lors.merge(torch.where(case.kept, case.weight, 0.0), bits, None, case.lora_A, case.lora_B, case.scaling)
    assert torch.equal(case.merge(), dense)
    assert torch.equal(case.replace(layout="bitmap").merge(), dense)
    values, _, metadata = case.stored
    merged_values = lors.sparse24_merge(values, metadata, case.lora_A, case.lora_B, case.scaling)
    assert torch.equal(merged_values, SparseWeight.from_dense(dense, "2:4", case.kept).values)


def refusals() -> list:
    f, u8, i32, i64 = torch.zeros, torch.uint8, torch.int32, torch.int64
    values, metadata, A, B = f(6, 18), f(6, 5, dtype=u8), f(3, 36), f(6, 3)
    bits, offsets = f(6, 2, dtype=i32), f(7, dtype=i64)
    return [
        ("sparse24_merge", (values, metadata, f(3, 40), B, 1.0), "lora_A has shape [3, 40]; it must be [r, 36]"),
        ("sparse24_merge", (values, metadata, A, f(5, 3), 1.0), "lora_B has shape [5, 3]; it must be [6, 3]"),
        ("merge", (values, bits, metadata, A, B, 1.0), "a 2:4 weight was given with a mask"),
        ("merge", (f(0), None, offsets, A, B, 1.0), "a bitmap weight was given without its bits"),
        ("sparse24_merge", (f(6, 17), metadata, A, B, 1.0), "an even number in each row"),
        ("sparse24_merge", (values, metadata[:5], A, B, 1.0), "it must be uint8 [6, 5] for values of shape [6, 18]"),
        ("sparse24_merge", (values.int(), metadata, A, B, 1.0), "values has a dtype that is not supported"),
        ("merge", (f(3), bits, offsets, A, B, 1.0), "the mask keeps 0 values and 3 are given"),
        ("merge", (f(0), bits, offsets[1:], A, B, 1.0), "it must be int32 [5, 2]"),
        ("merge", (f(1, 0), bits, offsets, A, B, 1.0), "must be one-dimensional"),
        ("compress", (f(36), bits), "weight has shape [36]; it must be [out_features, in_features]"),
        ("compress", (f(6, 36).int(), bits), "weight has a dtype that is not supported"),
        ("compress", (f(6, 36), bits[1:]), "it must be int32 [6, 2]"),
        ("compress", (f(6, 36), bits - 1), "the mask has bits beyond column 36 in row 0"),
    ]


@pytest.mark.parametrize(("op", "args", "message"), refusals(), ids=lambda v: v if isinstance(v, str) else "")
def test_refusals(op, args, message):
    with pytest.raises(RuntimeError) as caught:
        getattr(lors, op)(*args)
    assert f"lors::{op}: " in str(caught.value)
    assert message in str(caught.value)
