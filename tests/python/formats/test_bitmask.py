# SPDX-License-Identifier: Apache-2.0
"""One weight in compressed-tensors' formats: round trips, the bits by hand, every refusal."""

from __future__ import annotations

import pytest
import torch

from interchange_cases import raw, sparse24
from lors_cuda.compressed_tensors.bitmask import BITMASK, FORMATS, SPARSE24_BITMASK, decode_weight, encode_weight
from models import refused

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(1, 4), (3, 12), (5, 32), (7, 100), (64, 256)])
def test_round_trips_are_exact(N, K, format, dtype):
    dense = sparse24(N, K, dtype)
    decoded = decode_weight(encode_weight(dense, format), format)
    assert decoded.dtype == dtype
    assert raw(decoded) == raw(dense)


@pytest.mark.parametrize("K", [1, 7, 8, 9, 31, 33, 65])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_bitmask_holds_any_pattern(K, density):
    dense = torch.randn(6, K) * (torch.rand(6, K) < density) + 0.0
    parts = encode_weight(dense, BITMASK)
    assert parts["compressed"].shape == (int((dense != 0).sum()),)
    assert parts["bitmask"].shape == (6, (K + 7) // 8)
    assert raw(decode_weight(parts, BITMASK)) == raw(dense)


def test_the_bits_by_hand():
    dense = torch.tensor([[0, 5, 0, 6, 7, 0, 0, 0, 0, 0, 8, 9], [0] * 12], dtype=torch.float32)
    parts = encode_weight(dense, BITMASK)
    assert parts["bitmask"].tolist() == [[0b00011010, 0b1100], [0, 0]]
    assert parts["compressed"].tolist() == [5, 6, 7, 8, 9]
    assert parts["row_offsets"].tolist() == [0, 5]
    assert parts["shape"].tolist() == [2, 12]
    parts = encode_weight(dense, SPARSE24_BITMASK)
    # A group with one weight in column 0 keeps column 2 too, one with none keeps columns 2 and 3.
    assert parts["bitmask"].tolist() == [[0b01011010, 0b1100], [0b11001100, 0b1100]]
    assert parts["compressed"].tolist() == [[5, 6, 7, 0, 8, 9], [0] * 6]
    assert parts["shape"].tolist() == [[2], [12]]


def test_negative_zeros_and_fillers_in_any_place_become_zeros():
    parts = {
        "compressed": torch.tensor([[-0.0, 3.0, 0.0, -0.0]]),
        "bitmask": torch.tensor([[0b10010011]], dtype=torch.uint8),
        "shape": torch.tensor([[1], [8]]),
    }
    decoded = decode_weight(parts, SPARSE24_BITMASK)
    assert decoded.tolist() == [[0, 3, 0, 0, 0, 0, 0, 0]]
    assert not decoded.signbit().any()


def test_one_dimensional_weights_of_old_releases():
    dense = torch.tensor([0.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 5.0])
    parts = {
        "compressed": torch.tensor([2.0, 3.0, 4.0, 5.0]),
        "bitmask": torch.tensor([0b00011010, 0b10], dtype=torch.uint8),
        "shape": torch.tensor([10]),
        "row_offsets": torch.tensor(0),
    }
    assert torch.equal(decode_weight(parts, BITMASK), dense)
    parts["row_offsets"] = torch.tensor(1)
    refused(
        ValueError,
        lambda: decode_weight(parts, BITMASK),
        "corrupted in 1 of 2 row offsets, first in that of row 0: it is 1",
    )


def test_values_that_are_no_numbers_are_kept():
    dense = torch.tensor([[float("nan"), 0.0, float("inf"), 0.0]])
    for format in FORMATS:
        assert raw(decode_weight(encode_weight(dense, format), format)) == raw(dense)


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_parts_are_refused_with_the_weights_name(format):
    whole = encode_weight(sparse24(4, 24), format)

    def refuse(*fragments, **changed):
        parts = {name: part for name, part in {**whole, **changed}.items() if part is not None}
        refused(ValueError, lambda: decode_weight(parts, format, "layers.0.q"), "'layers.0.q'", *fragments)

    refuse("'bitmask' is missing", bitmask=None)
    refuse("'shape' is missing", shape=None)
    refuse("'scale' is missing or too much", scale=torch.ones(1))
    refuse("'bitmask' is torch.int8", bitmask=whole["bitmask"].to(torch.int8))
    refuse("(4, 2)", "(4, 3)", bitmask=whole["bitmask"][:, :2])
    refuse("(3, 3)", bitmask=whole["bitmask"][:3])
    refuse("'shape' is torch.int32", shape=whole["shape"].int())
    refuse("with 3 numbers", shape=torch.tensor([4, 24, 1]))
    refuse("its shape is (0, 24)", shape=torch.tensor([0, 24]))
    refuse("its shape is (4, -24)", shape=torch.tensor([4, -24]))
    refuse("must be torch.uint8 (4611686018427387904, 3)", shape=torch.tensor([2**62, 24]))
    refuse("torch.int8", "quantized", compressed=whole["compressed"].to(torch.int8))
    refuse("float8", "quantized", compressed=whole["compressed"].to(torch.float8_e4m3fn))
    refuse("corrupted", compressed=whole["compressed"][..., :-1])
    refuse("corrupted", compressed=whole["compressed"].reshape(1, 1, -1))
    bitmask = whole["bitmask"].clone()
    bitmask[2, 1] ^= 0b1
    bitmask[3, 0] ^= 0b1000
    if format == SPARSE24_BITMASK:
        byte = f"0x{int(bitmask[2, 1]):02x}"
        refuse("2 of 12 bytes", "two of every four", "row 2, columns 8 to 15", byte, bitmask=bitmask)
        refuse("multiple of 4", shape=torch.tensor([[4], [22]]))
    else:
        refuse("row offsets, first in that of row 3", bitmask=bitmask)
        refuse("'row_offsets' is missing", row_offsets=None)
        refuse("'row_offsets' is torch.int32", row_offsets=whole["row_offsets"].int())
        refuse("(3,)", row_offsets=whole["row_offsets"][:3])
        refuse("first in that of row 2", row_offsets=whole["row_offsets"] + torch.tensor([0, 0, 1, 0]))
        refuse("corrupted in 4 of 5 row offsets", row_offsets=-whole["row_offsets"] - 1)


def test_bits_beyond_the_last_column_are_refused():
    for format, K in ((SPARSE24_BITMASK, 12), (BITMASK, 13)):
        parts = encode_weight(sparse24(2, 12) if K == 12 else torch.ones(2, K), format)
        parts["bitmask"][1, -1] |= 0x80
        refused(ValueError, lambda parts=parts, format=format: decode_weight(parts, format), "row 1")


def test_what_cannot_be_encoded_is_refused():
    refused(ValueError, lambda: encode_weight(torch.ones(2, 8), SPARSE24_BITMASK), "not 2:4", "4 of 4")
    refused(ValueError, lambda: encode_weight(torch.ones(8), BITMASK), "shape (8,)")
    refused(ValueError, lambda: encode_weight(torch.ones(2, 8), "marlin-24"), "'marlin-24'", "'sparse-bitmask'")
    refused(ValueError, lambda: decode_weight({}, "dense"), "'dense'")
    refused(TypeError, lambda: encode_weight([[1.0]], BITMASK), "torch.Tensor")
