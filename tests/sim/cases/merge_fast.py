# SPDX-License-Identifier: Apache-2.0
"""Small calls of the merge's fast path, in every layout, for the mutants: see merge.py."""

from __future__ import annotations

from typing import Any

import codes
import numpy as np
from bits import SIZE, Adapters, loaded, stored

from merge import compress, held, patterns

# (out_features, in_features, r), dtypes of the weight and the adapters. The second has several panels of rows; the last
# ends inside a warp's rows.
CALLS = [
    ((64, 136, 16), "bfloat16", "bfloat16"),
    ((310, 520, 5), "float16", "bfloat16"),
    ((41, 264, 20), "bfloat16", "float32"),
]
PATHS = ("dense", "mask", "2:4", "2:4 values", "bitmap")

PLANTED = [
    ("merge_fast.cuh", "a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]", "a[i / 2][i % 2 * 2 + 1], a[i / 2][i % 2 * 2]"),
    ("merge_fast.cuh", "from_B += 2 * block.step * (16 + kMergePad);", "from_B += 2 * (16 + kMergePad);"),
    (
        "merge_fast.cuh",
        "result.write(block.below[c], 8 * h, h, c, make_uint4",
        "result.write(block.below[c], 7 * h, h, c, make_uint4",
    ),
    (
        "merge_fast.cuh",
        "source.load(block.below[c], block.step + 8 * h, h, c);",
        "source.load(block.below[c], 8 * h, h, c);",
    ),
    ("merge_fast_source.cuh", "column + (Lanes::kTransposed ? 0 : 32 * c) < p.in_features", "column < p.in_features"),
    ("merge_fast_source.cuh", "__hneu2_mask(two, Two(0.f, 0.f))", "0xffffffffu"),
    ("merge_fast_source.cuh", "halves(bits >> 2)", "halves(bits >> 1)"),
    ("merge_fast_source.cuh", "lane_words += step_words;", "lane_words += pitch;"),
    ("merge_fast_source.cuh", "code & 64 ? (code & 32 ? sum[3] : sum[2])", "code & 64 ? (code & 32 ? sum[2] : sum[3])"),
    ("merge_fast_source.cuh", "make_uint2(slots & at.x, 0)", "make_uint2(slots, 0)"),
    ("merge_fast_source.cuh", "position[1] == i ? 0x32u : 0x44u", "position[1] == i ? 0x32u : 0x10u"),
    ("merge_fast_source.cuh", "static_cast<uint32_t>(first) & ((8 * kSector >> value_shift) - 1)", "0"),
    ("merge_fast_source.cuh", "first += __popc(mask & 0x78)", "first += 4"),
    ("merge_fast_source.cuh", "shift = 16 * first", "shift = 0 * first"),
    ("merge_fast_source.cuh", "left - e < 16 ?", "left - e < 0 ?"),
    ("merge_fast_quantized.cuh", "0x0f0fu, 0x5140", "0x0f0fu, 0x1504"),
    ("merge_fast_quantized.cuh", "(is_int4 ? 8.f : 128.f) + group.zero", "(is_int4 ? 8.f : 128.f) - group.zero"),
    ("merge_fast_quantized.cuh", "(first >> group_shift));", "((first + 32) >> group_shift));"),
    ("merge_fast_quantized.cuh", "(row + i) * in_row", "(row + (i + 1 < rows ? i + 1 : i)) * in_row"),
    ("merge_fast_quantized.cuh", "onto(values[i], dither(key, first + column(i)))", "onto(values[i], 0.f)"),
    ("merge_fast_quantized.cuh", "q.first_row + row + i", "row + i"),
    ("merge_fast_quantized.cuh", "code & 64 ? 2 + (code >> 5 & 1) : 1u", "code & 64 ? 2u : 1u"),
    ("merge_fast_quantized.cuh", "codes ^ 0x80808080u", "codes"),
    ("merge_fast_quantized.cuh", "Grid::int4 ? 2 : 3", "Grid::int4 ? 3 : 3"),
    ("merge_fast_quantized.cuh", "fast_code_bytes(p.layout, q.grid, column);", "0;"),
    ("merge_fast_quantized.cuh", "first_byte = row * this->row_bytes", "first_byte = 0"),
    ("merge_fast_quantized.cuh", "+ column_of(c) + 4 * half", "+ column_of(c)"),
]


def check(sim: Any) -> None:
    for seed, ((N, K, r), dtype, adapter) in enumerate(CALLS):
        random = np.random.default_rng(seed)
        weight = random.standard_normal((N, K)).astype(np.float32)
        any_pattern, groups = patterns(random, N, K)
        adapters = Adapters(random, N, K, r, adapter)
        exact = loaded(stored(weight, dtype), dtype).reshape(N, K)
        for path in PATHS:
            kept = groups if path.startswith("2:4") else any_pattern
            device = sim.Device(seed=seed, multiprocessors=1)
            want = np.where(kept, exact + adapters.update, 0)
            values, index = held(device, path, exact, kept)
            if path == "2:4 values":
                want = compress(want, kept)[0]
            merged = device.empty("merged", SIZE[dtype] * want.size)
            sim.merge(
                device,
                out_features=N,
                in_features=K,
                weight=device.upload("values", stored(values, dtype)),
                weight_dtype=dtype,
                to_sparse24=path == "2:4 values",
                merged=merged,
                merged_dtype=dtype,
                round_to=dtype,
                **adapters.fields(device),
                **index,
            )
            got = loaded(device.download(merged), dtype).reshape(want.shape)
            np.testing.assert_allclose(got, want, rtol=2.0**-7, atol=2.0**-7)
            assert not got[want == 0].any(), path
    for shape in ((41, 640, 16), (310, 384, 5)):
        codes.check(sim, shape, "bfloat16", patterns, compress, sum(shape))
