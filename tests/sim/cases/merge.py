# SPDX-License-Identifier: Apache-2.0
"""The smallest calls of merge that reach every barrier, in every layout: for the mutants.

Each mutant runs them in a process of its own. NumPy alone, because importing torch takes longer than all of them.
"""

from __future__ import annotations

from typing import Any

import codes
import numpy as np
from bits import Adapters

# (out_features, in_features, r), the shared memory of the device: with little of it, the ranks come in chunks; and its
# multiprocessors: with one, a block takes several panels of rows.
SHAPES = [
    ((64, 128, 16), 227 * 1024, 2),
    ((40, 300, 5), 227 * 1024, 2),
    ((33, 136, 150), 100 * 1024, 2),
    ((300, 264, 5), 227 * 1024, 1),
    ((9, 1100, 5), 227 * 1024, 2),  # several blocks of columns: a bitmap's values before each are counted
]

PLANTED = [
    ("merge_adapters.cuh", "ptx::ldmatrix_x4_trans(a,", "ptx::ldmatrix_x4(a,"),
    ("merge_adapters.cuh", "b, a[2], a[3]);", "b, a[3], a[2]);"),
    ("merge.cuh", "if (at.n(h) >= p.out_features) continue;", "if (at.n(h) > p.out_features) continue;"),
    (
        "merge.cuh",
        "fmaf(p.scaling, sum[c][i / 2][2 * h + i % 2], values[i])",
        "sum[c][i / 2][2 * h + i % 2] + values[i]",
    ),
    ("merge.cuh", "kept >> i & 1 ?", "kept >> (i ^ 1) & 1 ?"),
    (
        "merge_source.cuh",
        "at.n(h) < p.out_features ? p.in_features : 0",
        "at.n(h) <= p.out_features ? p.in_features : 0",
    ),
    (
        "merge_source.cuh",
        "merged[2 * half + slot] = pick(values, half, position[slot])",
        "merged[2 * half + 1 - slot] = pick(values, half, position[slot])",
    ),
    ("merge_source.cuh", "value += has;", "value += 1;"),
    ("merge_before.cuh", "carry + sum - count", "carry + sum"),
    ("merge_problem.cuh", "count = sums.w + __popc(v.w)", "count = sums.w"),
    ("merge_quantized.cuh", ">> (4 * (i % 2)) & 15u", ">> (4 - 4 * (i % 2)) & 15u"),
    ("merge_quantized.cuh", "load_code(p, code) - group.zero", "load_code(p, code) + group.zero"),
    (
        "merge_quantized.cuh",
        "at.n(h) * (columns / group) + static_cast<unsigned>(at.column + 32 * c) / group",
        "at.n(h) * (columns / group) + static_cast<unsigned>(at.column + 32) / group",
    ),
    (
        "merge_quantized.cuh",
        "at.n(h) * (columns / group)",
        "(at.n(h) + (at.n(h) + 1 < p.out_features)) * (columns / group)",
    ),
    ("merge_quantized.cuh", "q.dither_seed < 0 || onto.e4m3 ? 0.f", "true ? 0.f"),
    ("merge_quantized.cuh", "q.first_row + at.n(h)", "at.n(h)"),
    ("quantized.cuh", "half - 1.f - zero", "half - 1.f + zero"),
    ("quantized.cuh", "code ^ half", "code"),
    ("quantized.cuh", "power > 121u << 23 ? power : 121u << 23", "power"),
]


def patterns(random: np.random.Generator, N: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks: any, and at most two in each group of four."""
    groups = random.random((N, K // 4, 4)).argsort(-1).argsort(-1) < random.integers(0, 3, (N, K // 4, 1))
    return random.random((N, K)) < 0.6, groups.reshape(N, K)


def held(device: Any, path: str, weight: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """A weight's values in a layout, and its index on the device. "mask": dense, and not zero off the mask."""
    N, K = weight.shape
    words = np.zeros((N, (K + 31) // 32 * 32), dtype=np.uint8)
    words[:, :K] = kept
    bits = np.packbits(words, axis=1, bitorder="little").view(np.uint32)
    if path == "dense":
        return np.where(kept, weight, np.float32(0)), {}
    if path == "mask":
        return weight, {"mask": device.upload("mask", bits)}
    if path == "bitmap":
        offsets = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int64)
        index = {"mask": device.upload("mask", bits), "row_offsets": device.upload("offsets", offsets)}
        return weight[kept], index
    values, metadata = compress(weight, kept)
    return values, {"metadata": device.upload("metadata", metadata)}


def check(sim: Any) -> None:
    for seed, ((N, K, r), shared_bytes, multiprocessors) in enumerate(SHAPES):
        random = np.random.default_rng(seed)
        weight = random.standard_normal((N, K)).astype(np.float32)
        any_pattern, groups = patterns(random, N, K)
        adapters = Adapters(random, N, K, r)
        for path, kept in (
            ("dense", any_pattern),
            ("bitmap", any_pattern),
            ("2:4", groups),
            ("2:4 values", groups),
        ):
            device = sim.Device(seed=seed, shared_bytes=shared_bytes, multiprocessors=multiprocessors)
            want = np.where(kept, weight + adapters.update, 0)
            values, index = held(device, path, weight, kept)
            if path == "2:4 values":
                want = compress(want, kept)[0]
            merged = device.empty("merged", 4 * want.size)
            sim.merge(
                device,
                out_features=N,
                in_features=K,
                weight=device.upload("values", values),
                to_sparse24=path == "2:4 values",
                merged=merged,
                **adapters.fields(device),
                **index,
            )
            got = device.download(merged).view(np.float32).reshape(want.shape)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    for shape in ((9, 640, 5), (41, 128, 20)):
        codes.check(sim, shape, "float32", patterns, compress, sum(shape))


def compress(weight: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values and metadata of layout 2:4, group by group."""
    N, K = weight.shape
    values, metadata = np.zeros((N, K // 2), dtype=np.float32), np.zeros((N, (K + 7) // 8), dtype=np.uint8)
    for n, g in np.ndindex(N, K // 4):
        at = np.flatnonzero(kept[n, 4 * g : 4 * g + 4])
        first, second = (at[0], at[-1]) if len(at) else (1, 0)
        slots = [0, 1] if len(at) == 2 else [int(first == 3)] * len(at)
        for slot, i in zip(slots, at, strict=True):
            values[n, 2 * g + slot] = weight[n, 4 * g + i]
        metadata[n, g // 2] |= np.uint8((first | second << 2) << 4 * (g % 2))
    return values, metadata
