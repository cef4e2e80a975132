# SPDX-License-Identifier: Apache-2.0
"""Small merges of quantised weights, every layout and grid, some requantised: for merge.py and merge_fast.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from bits import SIZE, Adapters, loaded, stored

# grid, group, zero points, requantize_steps, dither seed
WAYS = [("int4", 64, True, 1, 5), ("int8", 32, True, 16, -1), ("e4m3", 0, False, 1, -1), ("int4", 128, True, 0, -1)]
FIRST_ROW = 3


def words(seed: int, N: int, K: int) -> np.ndarray:
    """lors/random.h's, of the rows from FIRST_ROW on."""
    long, word, golden = 2**64 - 1, np.uint64(2**32 - 1), 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & long
        z = (z ^ z >> 27) * 0x94D049BB133111EB & long
        return z ^ z >> 31

    keys = np.array([mix(mix(seed + golden & long) + n * golden & long) for n in range(FIRST_ROW, FIRST_ROW + N)], "u8")
    h = np.arange(K, dtype="u8") ^ (keys & word)[:, None]
    h = (h ^ h >> np.uint64(16)) * np.uint64(0x7FEB352D) & word ^ (keys >> np.uint64(32))[:, None]
    h = (h ^ h >> np.uint64(15)) * np.uint64(0x846CA68B) & word
    return h ^ h >> np.uint64(16)


def e4m3(codes: np.ndarray) -> np.ndarray:
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    return np.where(codes & 128, -size, size)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """To the nearest."""
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(values) + 1e-30)), -6) - 3)
    return np.clip(np.rint(values / step) * step, -448, 448)


def check(sim: Any, shape: tuple[int, int, int], out: str, patterns: Any, compress: Any, seed: int) -> None:
    N, K, r = shape
    random = np.random.default_rng(seed)
    any_pattern, groups = patterns(random, N, K)
    adapters = Adapters(random, N, K, r, "bfloat16")
    for i, (grid, group, has_zeros, steps, dither) in enumerate(WAYS):
        for layout in ("dense", "2:4", "bitmap"):
            kept = groups if layout == "2:4" else any_pattern
            group = group or K
            low, high = (-8, 8) if grid == "int4" else (-128, 128)
            codes = random.integers(low, high, (N, K)) if grid != "e4m3" else random.integers(0, 127, (N, K))
            # Of e4m3 so large that the sums move the small, subnormal codes alone.
            size = {"int8": 1 / 16, "int4": 1, "e4m3": 256}[grid]
            scales = stored((random.random((N, K // group)) + 0.5) * size, "float16")
            zeros = random.integers(-3, 4, scales.shape).astype(np.int8) * max(steps, 1)
            scale = loaded(scales, "float16").repeat(group, 1).astype(np.float64)
            zero = zeros.repeat(group, 1) * has_zeros
            w = ((e4m3(codes) if grid == "e4m3" else codes) - zero) * scale
            want = w + adapters.update
            if steps:
                step, zero = steps * scale, zero // steps
                at = want / step + (((words(dither, N, K) >> np.uint64(8)) / 2**24 - 0.5) * 0.998 if dither >= 0 else 0)
                low, high = (-8, 7) if grid == "int4" or steps == 16 else (-128, 127)
                q = to_e4m3(at) if grid == "e4m3" else np.clip(np.rint(at), low - zero, high - zero)
                want = q * step
            want = np.where(kept, want, 0)
            device = sim.Device(seed=i, multiprocessors=1)
            merged = device.empty("merged", SIZE[out] * N * K)
            sim.merge(
                device,
                out_features=N,
                in_features=K,
                merged=merged,
                merged_dtype=out,
                round_to=out,
                grid=grid,
                group=group,
                scales=device.upload("scales", scales),
                scales_dtype="float16",
                zero_points=device.upload("zeros", zeros) if has_zeros else None,
                requantize_steps=steps,
                dither_seed=dither,
                first_row=FIRST_ROW,
                **adapters.fields(device),
                **held(device, layout, grid, np.where(kept, codes, 0), kept, compress),
            )
            got = loaded(device.download(merged), out).reshape(N, K)
            assert not got[~kept].any(), (grid, layout)
            # A sum beside a tie may become the neighbouring code.
            close = np.isclose(got, want, rtol=2.0**-7, atol=2.0**-7 if steps == 0 else 2.0**-10)
            assert np.mean(close) > 0.999, (grid, layout, np.mean(close))


def held(device: Any, layout: str, grid: str, codes: np.ndarray, kept: np.ndarray, compress: Any) -> dict[str, Any]:
    N, K = codes.shape
    index: dict[str, Any] = {}
    rows = list(codes)
    if layout == "2:4":
        slots, metadata = compress(codes.astype(np.float32), kept)
        rows = list(slots.astype(np.int64))
        index["metadata"] = device.upload("metadata", metadata)
    else:
        bits = np.zeros((N, (K + 31) // 32 * 32), dtype=np.uint8)
        bits[:, :K] = kept
        index["mask"] = device.upload("mask", np.packbits(bits, axis=1, bitorder="little").view(np.uint32))
    if layout == "bitmap":
        rows = [row[keep] for row, keep in zip(codes, kept, strict=True)]
    if grid == "int4":
        rows = [np.append(row, [0] * (len(row) % 2)) for row in rows]
    if layout == "bitmap":
        index["row_offsets"] = device.upload("offsets", np.cumsum([0, *map(len, rows)], dtype=np.int64))
    packed = np.concatenate(rows).astype(np.int64)
    if grid == "int4":
        packed = packed[::2] & 15 | (packed[1::2] & 15) << 4
    return {**index, "weight": device.upload("values", (packed & 255).astype(np.uint8))}
