# SPDX-License-Identifier: Apache-2.0
# compressed-tensors' `marlin-24` (its releases up to 0.14): codes in the order in which the kernel of that name read
# them. With kept weights numbered k = 0 ... K/2 - 1 in a row n, code (n, k) of
#   n = 64 m + 16 t + 8 c + 4 b + j,   k = 16 p + 8 h + 2 i + l
# stands in row p of `weight_packed`, at place (m, t, c, i, j) and, within that, (l, b, h) for 4 bits, (b, l, h) for 8,
# the last changing fastest; 32 / bits places make a word, from its lowest bits. Scales of groups: each 8 rows of the
# weight as (2, 4) are transposed; one scale for a row: in order.
# Metadata word (n, w), the codes of columns 16 w to 16 w + 15 (formats.py: two positions, first < second), of
#   n = 64 a + 8 e + 4 f + 2 g + h,   w = 2 v + c
# stands at (v, a, g, e, h, c, f). NOTE: that is not the order of torch's semi-structured tensors.
"""One weight of ``marlin-24``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..formats import COLUMNS, FULL, translate
from ..quantization import SCALE_DTYPES
from .quantized import check, check_parts, compact, expand24, refuse, unpack_rows
from .schemes import Scheme


def decode_marlin24(parts: Mapping[str, Tensor], scheme: Scheme, name: str) -> tuple[Tensor, Tensor]:
    """int8 codes [N, K] and scales [N, K / group] of `weight_packed` int32 [K/32, N bits/2], `scale_packed`
    [K / group, N] and `meta` int16 [K/32, 2 N].

    Raises:
        ValueError: a part is missing, or its dtype, shape or metadata does not fit.
    """
    check_parts(parts, {"weight_packed", "scale_packed", "meta"}, set(), name)
    packed, scales, meta = parts["weight_packed"], parts["scale_packed"], parts["meta"]
    if packed.dim() != 2 or 0 in packed.shape or packed.shape[1] % (32 * scheme.bits):
        refuse(
            name, f"'weight_packed' has shape {tuple(packed.shape)}; its rows must hold the codes of 64 rows or more"
        )
    K, N = 32 * packed.shape[0], 2 * packed.shape[1] // scheme.bits
    check(packed, "weight_packed", torch.int32, tuple(packed.shape), name)
    check(meta, "meta", torch.int16, (K // 32, 2 * N), name)
    group = scheme.columns(K)
    if K % group:
        refuse(name, f"it has {K} columns, and groups of {group} do not divide them")
    if scales.dtype not in SCALE_DTYPES or tuple(scales.shape) != (K // group, N):
        found = f"'scale_packed' is {scales.dtype} with shape {tuple(scales.shape)}"
        refuse(name, f"{found}; it must be floating with {(K // group, N)}")
    codes = unpack_rows(packed, scheme.bits, 16 * N)
    tile = codes.view(K // 32, N // 64, 4, 2, 4, 4, 2, 2, 2)  # p, m, t, c, i, j, and three more
    last_l, last_b = (6, 7) if scheme.bits == 4 else (7, 6)  # and h
    values = tile.permute(1, 2, 3, last_b, 5, 0, 8, 4, last_l)  # m, t, c, b, j; p, h, i, l
    words = meta.reshape(K // 32, N // 64, 2, 8, 2, 2, 2).permute(1, 3, 6, 2, 4, 0, 5)  # a, e, f, g, h, v, c
    metadata = words.reshape(N, K // 16).view(torch.uint8)
    bitmask = translate(metadata, {code: COLUMNS[code] for code in FULL.values()}, K)
    if bool((bitmask < 0).any()):
        row, byte = (bitmask < 0).nonzero()[0].tolist()
        refuse(name, f"its meta has no code of two positions in row {row}, columns {8 * byte} to {8 * byte + 7}")
    dense = expand24(values.reshape(N, K // 2), bitmask.to(torch.uint8), K, name)
    if group < K // 2:  # the writer compared it with the number of kept weights
        scales = scales.view(K // group, N // 8, 4, 2).transpose(-1, -2).reshape(K // group, N)
    return dense, compact(scales.t())
