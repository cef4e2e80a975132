# SPDX-License-Identifier: Apache-2.0
"""The simulator's fragments against the layouts of CuTe's atoms (cute_layouts.json), which run on hardware everywhere.

The table was printed by a program over CuTe's headers: it shares no author with the simulator, the kernels and
test_golden.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_golden import NAMES, as_floats, lors_sim

LAYOUTS = json.loads((Path(__file__).parent / "cute_layouts.json").read_text())
A, B, C = (np.array(LAYOUTS[name]) for name in "ABC")


@pytest.fixture(scope="module")
def sim() -> Any:
    return lors_sim.load("plain")


def run(sim: Any, name: str, words: np.ndarray, cores: str = "rounded") -> np.ndarray:
    device = sim.Device(tensor_cores=cores)
    out = device.empty("out", 4 * 32 * 8)
    given = device.upload("in", np.ascontiguousarray(words, dtype=np.uint32).reshape(-1))
    sim.golden_run(device, NAMES.index(name), input=given, output=out)
    return device.download(out).view(np.uint32).reshape(32, 8)


def pairs(values: np.ndarray, dtype: str) -> np.ndarray:
    """[32, 2 n] numbers as [32, n] registers of two 16-bit ones."""
    bits = values.astype(np.float32).view(np.uint32) >> 16
    if dtype == "float16":
        bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return bits[:, ::2] | bits[:, 1::2] << 16


def multiply(sim: Any, dtype: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, cores: str = "rounded") -> np.ndarray:
    """a [16, 16] b [16, 8] + c [16, 8] by one mma, with CuTe's layouts for operands and result."""
    words = np.zeros((32, 16), dtype=np.uint32)
    words[:, :4] = pairs(a[A[..., 0], A[..., 1]], dtype)
    words[:, 4:6] = pairs(b[B[..., 1], B[..., 0]], dtype)
    words[:, 8:12] = c[C[..., 0], C[..., 1]].astype(np.float32).view(np.uint32)
    result = np.full((16, 8), np.nan)
    result[C[..., 0], C[..., 1]] = as_floats(run(sim, f"mma_m16n8k16_{dtype}", words, cores)[:, :4])
    return result


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mma(sim: Any, dtype: str) -> None:
    """Each element of A by itself (B and C are all different), and random integers: every sum is exact."""
    b = np.arange(1, 129).reshape(16, 8)
    for m, k in np.ndindex(16, 16):
        a = np.zeros((16, 16))
        a[m, k] = 1
        c = 1000 * np.arange(128).reshape(16, 8) + 16 * m + k
        np.testing.assert_array_equal(multiply(sim, dtype, a, b, c), a @ b + c)
    random = np.random.default_rng(0)
    for cores in ("rounded", "ampere", "hopper"):
        a, b, c = (random.integers(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))
        np.testing.assert_array_equal(multiply(sim, dtype, a, b, c, cores), a @ b + c)


@pytest.mark.parametrize("name", ["ldmatrix_x4", "ldmatrix_x4_trans"])
def test_ldmatrix(sim: Any, name: str) -> None:
    layout = np.array(LAYOUTS[name.replace("_x4", "")])
    elements = np.random.default_rng(0).permutation(1 << 16)[:1024].astype(np.uint16)
    rows = elements.reshape(128, 8)
    given = rows[(layout[..., 0] * 37 + 11) % 128, layout[..., 1]].astype(np.uint32)  # the probe's order of rows
    expected = given[:, ::2] | given[:, 1::2] << 16
    np.testing.assert_array_equal(run(sim, name, elements.view(np.uint32))[:, :4], expected)
