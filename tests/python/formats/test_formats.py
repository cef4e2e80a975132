# SPDX-License-Identifier: Apache-2.0
"""The operators on the compressed layouts: what they store bit by bit, and that nothing corrupt gets past them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import FLOATS, floats, lors, make_case

# (out_features, in_features): one group, an odd number of groups, words of the mask cut short, several vectors.
SHAPES = ((1, 4), (3, 12), (5, 36), (7, 64), (2, 68), (31, 132), (8, 1028))
FORMATS = (
    "mask_nonzero",
    "sparse24_inspect",
    "sparse24_compress",
    "sparse24_decompress",
    "sparse24_mask",
    "sparse24_validate",
    "sparse24_merge",
    "bitmap_offsets",
    "bitmap_compress",
    "bitmap_decompress",
    "bitmap_validate",
)


def bits_of(case) -> Tensor:
    return lors.mask_pack(case.kept)


def arguments(op: str, case) -> tuple[object, ...]:
    """Positional arguments that `op` accepts."""
    K = case.weight.shape[1]
    bits = bits_of(case)
    offsets = lors.bitmap_offsets(bits, K)
    values, metadata = lors.sparse24_compress(case.weight, case.bits)
    packed = lors.bitmap_compress(case.weight, bits, offsets, int(offsets[-1]))
    return {
        "mask_nonzero": (case.weight,),
        "sparse24_inspect": (case.weight, case.bits),
        "sparse24_compress": (case.weight, case.bits),
        "sparse24_decompress": (values, metadata),
        "sparse24_mask": (metadata, K),
        "sparse24_validate": (values, metadata),
        "sparse24_merge": (values, metadata, case.lora_A, case.lora_B, case.scaling),
        "bitmap_offsets": (bits, K),
        "bitmap_compress": (case.weight, bits, offsets, int(offsets[-1])),
        "bitmap_decompress": (packed, bits, offsets, K),
        "bitmap_validate": (packed, bits, offsets, K),
    }[op]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("op", FORMATS)
def test_opcheck(device, seed, op, explicit):
    case = make_case(seed, 1, 6, 36, 3, device=device, explicit_mask=explicit, layout="2:4")
    torch.library.opcheck(getattr(lors, op).default, arguments(op, case))


def plain_sparse24(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """values and metadata, as csrc/core/include/lors/sparse24.h words it, group by group."""
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


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse24_bit_by_bit(device, seed, shape, dtype, explicit):
    case = make_case(seed, 1, *shape, 2, dtype, device=device, explicit_mask=explicit, layout="2:4")
    weight, kept = case.weight.cpu(), case.kept.cpu()
    expected_values, expected_metadata = plain_sparse24(weight, kept)
    values, metadata = (t.cpu() for t in lors.sparse24_compress(case.weight, case.bits))
    assert torch.equal(metadata, expected_metadata)
    assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))  # -0.0 is stored as +0.0
    stored = values.to(device), metadata.to(device)
    dense = lors.sparse24_decompress(*stored).cpu()
    assert torch.equal(dense.view(torch.uint8), (torch.where(kept, weight, 0.0) + 0.0).view(torch.uint8))
    assert torch.equal(lors.mask_unpack(lors.sparse24_mask(stored[1], shape[1]), shape[1]).cpu(), kept)
    assert lors.sparse24_validate(*stored).tolist() == [0, 2**63 - 1]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (17, 33), (3, 1), (4, 257)], ids=str)
def test_bitmap_bit_by_bit(device, seed, shape, dtype, explicit, density):
    case = make_case(seed, 1, *shape, 1, dtype, device=device, explicit_mask=explicit, density=density)
    K, bits, kept = shape[1], bits_of(case), case.kept.cpu()
    if not explicit:
        assert torch.equal(lors.mask_nonzero(case.weight), bits)
    offsets = lors.bitmap_offsets(bits, K)
    assert offsets.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    values = lors.bitmap_compress(case.weight, bits, offsets, int(offsets[-1]))
    weight = case.weight.cpu()
    assert torch.equal(values.cpu().view(torch.uint8), (weight[kept] + 0.0).view(torch.uint8))
    dense = lors.bitmap_decompress(values, bits, offsets, K).cpu()
    assert torch.equal(dense.view(torch.uint8), (torch.where(kept, weight, 0.0) + 0.0).view(torch.uint8))
    assert lors.bitmap_validate(values, bits, offsets, K).tolist() == [0, 2**63 - 1]


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_kept(device, special):
    for dtype in floats(device):
        weight = torch.zeros(2, 8, dtype=dtype, device=device)
        weight[1, 6] = special
        back = lors.sparse24_decompress(*lors.sparse24_compress(weight, None))
        assert torch.equal(back.nan_to_num(), weight.nan_to_num())
        assert lors.mask_nonzero(weight).tolist() == [[0], [1 << 6]]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inspection_finds_what_a_loop_finds(device, seed, shape, explicit):
    N, K = shape
    case = make_case(seed, 1, N, K, 1, device=device, explicit_mask=explicit, density=0.6)
    kept = case.kept.cpu().long()
    along_k = kept.view(N, K // 4, 4).sum(-1).flatten() > 2
    along_n = torch.nn.functional.pad(kept.T, (0, -N % 4)).reshape(K, -1, 4).sum(-1) > 2
    first = int(along_k.nonzero()[0]) if along_k.any() else 2**63 - 1
    report = lors.sparse24_inspect(case.weight, case.bits).tolist()
    assert report == [int(along_k.sum()), first, int(along_n.sum())]


@pytest.mark.parametrize("code", range(16))
@pytest.mark.parametrize("group", [0, 1, 2, 6])
def test_every_code_is_told_apart(device, code, group):
    """Seven groups: the last byte holds one, and its other half must be 0."""
    metadata = torch.full((1, 4), 0x11, dtype=torch.uint8)
    metadata[0, 3] = 0x01
    shift = 4 * (group % 2)
    metadata[0, group // 2] = (int(metadata[0, group // 2]) & ~(15 << shift)) | code << shift
    values = torch.zeros(1, 14)
    good = (code & 3) <= code >> 2 or code == 1
    count, first = lors.sparse24_validate(values.to(device), metadata.to(device)).tolist()
    assert (count, first) == ((0, 2**63 - 1) if good else (1, group // 2))


def test_a_filler_that_is_not_zero_is_corrupt(device):
    for dtype in floats(device):
        for code, filler in ((0b0000, 1), (0b0101, 1), (0b1010, 1), (0b1111, 0), (0b0001, 0), (0b0001, 1)):
            values = torch.zeros(2, 4, dtype=dtype)
            values[1, 2 + filler] = 1e-7 if dtype in (torch.float32, torch.float64) else 1.0
            metadata = torch.tensor([[0x11], [0x01 | code << 4]], dtype=torch.uint8)
            assert lors.sparse24_validate(values.to(device), metadata.to(device)).tolist() == [1, 1]


def test_bits_beyond_the_last_group_are_corrupt(device):
    metadata = torch.tensor([[0x11], [0x11]], dtype=torch.uint8, device=device)
    assert lors.sparse24_validate(torch.zeros(2, 2, device=device), metadata).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("change", "rows", "first"),
    [
        (lambda b, o: b[1].__setitem__(0, int(b[1, 0]) ^ 4), 1, 1),  # a bit more or less than the offsets say
        (lambda b, o: b[2].__setitem__(1, int(b[2, 1]) | 1 << 20), 1, 2),  # a bit beyond in_features
        (lambda b, o: o.__setitem__(2, int(o[2]) + 1), 2, 1),
        (lambda b, o: o.__setitem__(0, -1), 1, 0),
        (lambda b, o: o.__setitem__(4, int(o[4]) + 1), 1, 3),
        (lambda b, o: o.add_(1), 2, 0),  # every length is right, and all are shifted
        (lambda b, o: o.__setitem__(2, 2**62), 2, 1),
        (lambda b, o: o.__setitem__(2, -(2**63)), 2, 1),
    ],
)
def test_bits_and_offsets_that_disagree(device, seed, change, rows, first):
    case = make_case(seed, 1, 4, 50, 1)
    bits = bits_of(case)
    offsets = lors.bitmap_offsets(bits, 50)
    values = torch.zeros(int(offsets[-1]))
    change(bits, offsets)
    args = (values.to(device), bits.to(device), offsets.to(device), 50)
    assert lors.bitmap_validate(*args).tolist() == [rows, first]
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=rf"disagrees with the bits in {rows} rows, first in row {first}"):
            lors.bitmap_decompress(*args)


def test_a_value_too_many_or_too_few(device, seed):
    case = make_case(seed, 1, 4, 50, 1, device=device)
    offsets = lors.bitmap_offsets(bits_of(case), 50)
    for more in (-1, 1):
        values = torch.zeros(int(offsets[-1]) + more, device=device)
        assert lors.bitmap_validate(values, bits_of(case), offsets, 50).tolist() == [1, 3]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 4), (5, 36), (31, 132), (100, 516), (8, 2052)], ids=str)
@pytest.mark.parametrize("r", [1, 16])
def test_merges_from_compressed_are_the_dense_merge_bit_for_bit(device, seed, shape, dtype, explicit, r):
    case = make_case(seed, 1, *shape, r, dtype, device=device, explicit_mask=explicit, layout="2:4")
    bits = bits_of(case)
    dense = lors.merge(torch.where(case.kept, case.weight, 0.0), bits, None, case.lora_A, case.lora_B, case.scaling)
    assert torch.equal(case.merge(), dense)
    assert torch.equal(case.replace(layout="bitmap").merge(), dense)
    values, _, metadata = case.stored
    merged_values = lors.sparse24_merge(values, metadata, case.lora_A, case.lora_B, case.scaling)
    assert torch.equal(merged_values, lors.sparse24_compress(dense, bits)[0])


def refusals() -> list:
    f, u8, i32, i64 = torch.zeros, torch.uint8, torch.int32, torch.int64
    values, metadata, A, B = f(6, 18), f(6, 5, dtype=u8), f(3, 36), f(6, 3)
    bits, offsets = f(6, 2, dtype=i32), f(7, dtype=i64)
    return [
        ("mask_nonzero", (f(4),), "weight has shape [4]; it must be [out_features, in_features]"),
        ("mask_nonzero", (f(4, 4, dtype=i32),), "weight has a dtype that is not supported"),
        ("sparse24_inspect", (f(4, 6), None), "2:4 needs in_features to be a multiple of 4"),
        ("sparse24_compress", (f(4, 6), None), "2:4 needs in_features to be a multiple of 4"),
        ("sparse24_compress", (f(4, 8), bits), "it must be int32 [4, 1]"),
        ("sparse24_decompress", (f(6, 17), metadata), "an even number in each row"),
        ("sparse24_decompress", (values, metadata[:5]), "it must be uint8 [6, 5] for values of shape [6, 18]"),
        ("sparse24_decompress", (values, metadata.int()), "it must be uint8 [6, 5]"),
        ("sparse24_decompress", (values.int(), metadata), "values has a dtype that is not supported"),
        ("sparse24_mask", (metadata, 44), "it must be uint8 [out_features, 6] for in_features = 44"),
        ("sparse24_mask", (metadata, 38), "in_features = 38, a multiple of 4"),
        ("sparse24_validate", (values, metadata[:, :4]), "it must be uint8 [6, 5]"),
        ("sparse24_merge", (values, metadata, f(3, 40), B, 1.0), "lora_A has shape [3, 40]; it must be [r, 36]"),
        ("sparse24_merge", (values, metadata, A, f(5, 3), 1.0), "lora_B has shape [5, 3]; it must be [6, 3]"),
        ("bitmap_offsets", (bits, 32), "it must be int32 [6, 1]"),
        ("bitmap_compress", (f(6, 36), bits, offsets[1:], 3), "row_offsets has shape [6]; it must be int64 [7]"),
        ("bitmap_compress", (f(6, 36), bits, offsets, 217), "count is 217; it must be row_offsets[-1]"),
        ("bitmap_compress", (f(6, 36), bits[1:], offsets, 0), "it must be int32 [6, 2]"),
        ("bitmap_decompress", (f(0), bits, offsets[1:], 36), "it must be int32 [5, 2]"),
        ("bitmap_decompress", (f(1, 0), bits, offsets, 36), "must be one-dimensional"),
        ("bitmap_validate", (f(0), bits, offsets, 65), "it must be int32 [6, 3]"),
        ("merge", (values, bits, metadata, A, B, 1.0), "a 2:4 weight was given with a mask"),
        ("merge", (f(0), None, offsets, A, B, 1.0), "a bitmap weight was given without its bits"),
        ("merge", (f(3), bits, offsets, A, B, 1.0), "row_offsets disagrees with the bits in 1 rows, first in row 5"),
    ]


@pytest.mark.parametrize(("op", "args", "message"), refusals(), ids=lambda v: v if isinstance(v, str) else "")
def test_refusals(op, args, message):
    with pytest.raises(RuntimeError) as caught:
        getattr(lors, op)(*args)
    assert f"lors::{op}: " in str(caught.value)
    assert message in str(caught.value)
