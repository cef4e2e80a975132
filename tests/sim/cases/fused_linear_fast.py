# SPDX-License-Identifier: Apache-2.0
"""Small calls of the fast path of fused_linear, every layout, forward and backward, for the mutants: see merge.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from bits import SIZE, Adapters, loaded, stored

from merge import held, patterns

# (tokens, out_features, in_features, r), dtypes of weight and adapters. The second has several panels of rows; the last
# ends inside a warp's rows.
CALLS = [
    ((16, 64, 136, 16), "bfloat16", "bfloat16"),
    ((3, 300, 520, 5), "float16", "bfloat16"),
    ((11, 41, 264, 20), "bfloat16", "float32"),
]
PATHS = ("dense", "mask", "2:4", "bitmap")

PLANTED = [
    (
        "fused_linear_fast.cuh",
        "ptx::mma_m16n8k16<bfloat16>(sum[tile][o], a, b[o], b[2 + o])",
        "ptx::mma_m16n8k16<bfloat16>(sum[tile][o], a, b[2 + o], b[o])",
    ),
    ("fused_linear_fast.cuh", "j % 2 ? 0x7632 : 0x5410", "j % 2 ? 0x5410 : 0x7632"),
    ("fused_linear_fast.cuh", "half ? v.z : v.x, half ? v.w : v.y", "half ? v.w : v.y, half ? v.z : v.x"),
    ("fused_linear_fast.cuh", "wide ? four[0] + four[1] : four[0]", "four[0]"),
    ("fused_linear_fast.cuh", "from_activation += 2 * block.step;", "from_activation += block.step;"),
    ("fused_linear_fast.cuh", "parts + i * size + t * pitch + k", "parts + i * size + k"),
    (
        "merge_fast_source.cuh",
        "make_uint2(ptx::load_shared(first), ptx::load_shared(first + pitch))",
        "make_uint2(ptx::load_shared(first), ptx::load_shared(first))",
    ),
    ("merge_fast_source.cuh", "Lanes::kTransposed ? c * from_pitch", "Lanes::kTransposed ? 0 * from_pitch"),
]


def check(sim: Any) -> None:
    for seed, ((T, N, K, r), dtype, adapter) in enumerate(CALLS):
        random = np.random.default_rng(seed)
        any_pattern, groups = patterns(random, N, K)
        adapters = Adapters(random, N, K, r, adapter)
        weight = loaded(stored(random.standard_normal((N, K)), dtype), dtype).reshape(N, K)
        for path in PATHS:
            kept = groups if path == "2:4" else any_pattern
            merged = (
                loaded(stored(np.where(kept, weight + adapters.update, 0), dtype), dtype)
                .reshape(N, K)
                .astype(np.float64)
            )
            for backward in (False, True):
                device = sim.Device(seed=seed, multiprocessors=1)
                values, index = held(device, path, weight, kept)
                inputs, outputs = (N, K) if backward else (K, N)
                activation = stored(random.standard_normal((T, inputs)), dtype)
                output = device.empty("output", SIZE[dtype] * T * outputs)
                sim.fused_linear(
                    device,
                    tokens=T,
                    out_features=N,
                    in_features=K,
                    input_gradient=backward,
                    activation=device.upload("activation", activation),
                    weight=device.upload("values", stored(values, dtype)),
                    output=output,
                    **dict.fromkeys(("activation_dtype", "weight_dtype", "round_to", "output_dtype"), dtype),
                    **adapters.fields(device),
                    **index,
                )
                got = loaded(device.download(output), dtype).reshape(T, outputs)
                want = loaded(activation, dtype).reshape(T, inputs) @ (merged if backward else merged.T)
                np.testing.assert_allclose(got, want, rtol=2.0**-6, atol=2.0**-6 * np.abs(want).max())
