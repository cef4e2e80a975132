# SPDX-License-Identifier: Apache-2.0
"""The probes on the simulator: against the results of a GPU (record-*.json), and against the tables of the PTX ISA.

The tables are written per element, from the ISA's formulas for row and column of element i of a fragment, and share no
code with the simulator, which works on registers.
"""

from __future__ import annotations

import json
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sim"))

import lors_sim  # noqa: E402

RECORDS = sorted(HERE.glob("record-*.json"))
SEEDS = range(1, 17)
NAMES = (
    "ldmatrix_x4",
    "ldmatrix_x4_trans",
    "mma_m16n8k16_bfloat16",
    "mma_m16n8k16_float16",
    "cp_async_16",
    "load_global_once",
    "shuffles",
    "votes",
    "roundings",
    "mma_m16n8k16_zero_bfloat16",
    "pick_bytes",
    "load_global_if",
    "store_global_if",
    "bulk_copy",
    "cluster",
)
NEED_CLUSTERS = {"bulk_copy", "cluster"}


@pytest.fixture(scope="module")
def sim() -> lors_sim.Simulator:
    return lors_sim.load("race")


def run(sim: Any, probe: int, seed: int, cores: str = "rounded") -> tuple[np.ndarray, np.ndarray]:
    """(input [32, 16], the simulator's output [32, 8])"""
    lanes, inputs, outputs = sim.golden_shape
    device = sim.Device(seed=seed, tensor_cores=cores, architecture=90)
    words = sim.golden_input(probe, seed)
    out = device.empty("out", 4 * lanes * outputs)
    sim.golden_run(device, probe, input=device.upload("in", words), output=out)
    return words.reshape(lanes, inputs), device.download(out).view(np.uint32).reshape(lanes, outputs)


def as_floats(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.float32).astype(np.float64)


def sixteen_bit_elements(words: np.ndarray, name: str) -> np.ndarray:
    """[32, n] registers as [32, 2 n] numbers, the lower half first."""
    halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(words.shape[0], -1)
    if name.endswith("bfloat16"):
        return as_floats(halves << 16)
    return halves.astype(np.uint16).view(np.float16).astype(np.float64)


def matrices_of(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [16, 16], B [16, 8] and C [16, 8] of an mma probe's input (PTX ISA, "Matrix Fragments for mma.m16n8k16").

    Without effect of C where the probe is of "zero".
    """
    a, b, c = sixteen_bit_elements(x[:, :4], name), sixteen_bit_elements(x[:, 4:6], name), as_floats(x[:, 8:12])
    c = c * ("zero" not in name)
    A, B, C = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            A[row, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)] = a[lane, i]
        for i in range(4):
            B[in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group] = b[lane, i]
            C[group + (8 if i >= 2 else 0), in_group * 2 + (i & 1)] = c[lane, i]
    return A, B, C


def fragments_of(D: np.ndarray) -> np.ndarray:
    """[16, 8] as the four accumulators of each lane."""
    d = np.zeros((32, 4))
    for lane in range(32):
        for i in range(4):
            d[lane, i] = D[(lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)]
    return d


def rounding_of_sum(x: np.ndarray, name: str) -> np.ndarray:
    """The error bound of a sum of 17 terms in float32, rounded or truncated, in any order."""
    A, B, C = matrices_of(x, name)
    return 17 * 2.0**-23 * fragments_of(np.abs(A) @ np.abs(B) + np.abs(C))


# ---- the ISA's tables -----------------------------------------------------------------------------------------------


def expect_ldmatrix(x: np.ndarray, transposed: bool) -> np.ndarray:
    rows = x.reshape(128, 4).copy().view(np.uint16).reshape(128, 8)
    named = [rows[(lane * 37 + 11) % 128] for lane in range(32)]
    y = np.zeros((32, 8), dtype=np.uint32)
    for i in range(4):
        matrix = np.stack(named[8 * i : 8 * i + 8])
        matrix = matrix.T if transposed else matrix
        for lane in range(32):
            pair = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].astype(np.uint32)
            y[lane, i] = pair[0] | pair[1] << np.uint32(16)
    return y


def expect_copy(x: np.ndarray) -> np.ndarray:
    y = np.zeros((32, 8), dtype=np.uint32)
    for lane in range(32):
        source = (lane + 1) % 32
        copied = x[source, :4].copy().view(np.uint8)
        copied[source % 17 :] = 0
        y[lane, :4] = copied.view(np.uint32)
    return y


def expect_shuffles(x: np.ndarray) -> np.ndarray:
    lane = np.arange(32)
    y = np.zeros((32, 8), dtype=np.uint32)
    y[:, 0] = x[lane ^ 5, 0]
    y[:, 1] = x[x[:, 2] % 32, 1]
    y[:, 2] = x[np.where(lane + 3 < 32, lane + 3, lane), 3]
    y[:, 3] = x[np.where(lane >= 7, lane - 7, lane), 4]
    y[:, 4] = x[lane ^ 3, 5]
    return y


def expect_votes(x: np.ndarray) -> np.ndarray:
    y = np.zeros((32, 8), dtype=np.uint32)
    y[:, 0] = sum(int(x[lane, 0] & 1) << lane for lane in range(32))
    y[:, 1] = 1
    y[:, 3] = [int(word).bit_count() for word in x[:, 1]]
    return y


def expect_picked(x: np.ndarray) -> np.ndarray:
    y = np.zeros((32, 8), dtype=np.uint32)
    for lane, i, byte in np.ndindex(32, 8, 4):
        eight = np.array([x[lane, i], x[lane, (i + 1) % 8]], dtype=np.uint32).view(np.uint8)
        y[lane, i] |= np.uint32(eight[x[lane, (i + 2) % 8] >> 4 * byte & 7]) << np.uint32(8 * byte)
    return y


def expect_conditional(x: np.ndarray, loads: bool) -> np.ndarray:
    lane = np.arange(32)[:, None]
    y = np.zeros((32, 8), dtype=np.uint32) if loads else x[:, 8:].copy()
    if loads:
        y[:, :4] = np.where(lane > 15, x[::-1, 8:12], x[:, :4])
        y[:, 4:6] = np.where(lane % 5 > 1, x[::-1, 14:], x[:, 4:6])
    else:
        y[:, :4] = np.where(lane % 3 > 0, x[:, :4], x[:, 8:12])
        y[:, 4:6] = np.where(lane % 5 > 1, x[:, 4:6], x[:, 12:14])
    return y


def expect_bulk_copy(x: np.ndarray) -> np.ndarray:
    even = np.arange(32) // 2 * 2
    first = x[31 - even, :8].reshape(32, 2, 4)[np.arange(32), np.arange(32) % 2]
    return np.concatenate([first, x[even + 1, 8:12]], axis=1)


def expect_cluster(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[::-1, 8:12], x[::-1, 12:15], np.full((32, 1), 2, np.uint32)], axis=1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("probe", range(len(NAMES)), ids=NAMES)
def test_simulator_follows_the_isa(sim, probe, seed):
    name, is_sum = sim.golden_probes()[probe]
    assert name == NAMES[probe]
    x, y = run(sim, probe, seed)
    if is_sum:
        A, B, C = matrices_of(x, name)
        # The simulator rounds once; float64 holds the sum of such numbers to far below a float32's last bit.
        np.testing.assert_allclose(as_floats(y[:, :4]), fragments_of(A @ B + C), rtol=2.0**-23)
        assert (y[:, 4:] == 0).all()
    elif name.startswith("ldmatrix"):
        np.testing.assert_array_equal(y, expect_ldmatrix(x, name.endswith("trans")))
    elif name == "cp_async_16":
        np.testing.assert_array_equal(y, expect_copy(x))
    elif name == "load_global_once":
        np.testing.assert_array_equal(y[:, :4], x[::-1, 4:8])
    elif name == "shuffles":
        np.testing.assert_array_equal(y, expect_shuffles(x))
    elif name == "votes":
        np.testing.assert_array_equal(y, expect_votes(x))
    elif name == "pick_bytes":
        np.testing.assert_array_equal(y, expect_picked(x))
    elif name in ("load_global_if", "store_global_if"):
        np.testing.assert_array_equal(y, expect_conditional(x, name == "load_global_if"))
    elif name == "bulk_copy":
        np.testing.assert_array_equal(y, expect_bulk_copy(x))
    elif name == "cluster":
        np.testing.assert_array_equal(y, expect_cluster(x))
    else:
        value = x.astype(np.uint32).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            halves = value[:, :3].astype(np.float16)
            fused = as_floats(x[:, 8]) * as_floats(x[:, 9]) + as_floats(x[:, 10])
        number = ~np.isnan(value)
        np.testing.assert_array_equal(y[number[:, 0], 1], halves.view(np.uint16)[number[:, 0], 0])
        np.testing.assert_array_equal(y[number[:, 1], 3], halves.view(np.uint16)[number[:, 1], 1])
        np.testing.assert_array_equal(y[number[:, 2], 4], halves[number[:, 2], 2].astype(np.float32).view(np.uint32))
        np.testing.assert_array_equal(y[:, 5], fused.astype(np.float32).view(np.uint32))
        # bfloat16 to nearest, ties to even, from the bits.
        for i in range(2):
            nearest = ((x[:, i].astype(np.uint64) + 0x7FFF + (x[:, i] >> 16 & 1)) >> 16).astype(np.uint32)
            np.testing.assert_array_equal(y[number[:, i], 2 * i], nearest[number[:, i]])


def cut_off(value: Fraction, last: int) -> Fraction:
    """Without what lies below 2^last, towards zero."""
    unit = Fraction(2) ** last
    return int(value / unit) * unit


def tensor_core(c: Fraction, products: list[Fraction], width: int, extra_bits: int) -> Fraction:
    """c plus the products, `width` at a time, in the arithmetic that tests/sim/runtime/device.h describes."""
    for first in range(0, len(products), width):
        terms = [c, *products[first : first + width]]
        top = max(math.frexp(term)[1] for term in terms if term) - 1
        total = sum((cut_off(term, top - 23 - extra_bits) for term in terms), Fraction())
        c = cut_off(total, max(math.frexp(total)[1] - 1, -126) - 23) if total else total
    return c


@pytest.mark.parametrize(("cores", "width", "extra_bits"), [("ampere", 8, 1), ("hopper", 16, 2)])
@pytest.mark.parametrize("name", ["mma_m16n8k16_bfloat16", "mma_m16n8k16_float16"])
def test_sums_of_tensor_cores(sim, name, cores, width, extra_bits):
    for seed in SEEDS:
        x, y = run(sim, NAMES.index(name), seed, cores)
        A, B, C = (np.vectorize(Fraction)(matrix) for matrix in matrices_of(x, name))
        expected = np.zeros((16, 8))
        for m, n in np.ndindex(16, 8):
            expected[m, n] = tensor_core(C[m, n], list(A[m] * B[:, n]), width, extra_bits)
        np.testing.assert_array_equal(as_floats(y[:, :4]), fragments_of(expected))
        rounded = run(sim, NAMES.index(name), seed)[1]
        assert (y != rounded).any(), "the model makes no difference"


def test_every_probe_is_expected(sim):
    assert tuple(name for name, _ in sim.golden_probes()) == NAMES


# ---- results of a GPU -----------------------------------------------------------------------------------------------


def compare(sim: Any, answers: dict[str, Any]) -> None:
    for probe, (name, is_sum) in enumerate(sim.golden_probes()):
        for seed, text in answers["probes"].get(name, {}).items():
            x, y = run(sim, probe, int(seed))
            words = np.frombuffer(bytes.fromhex(text), dtype=">u4").astype(np.uint32).reshape(y.shape)
            where = f"{name}, seed {seed}, on {answers['device']}"
            if is_sum:
                difference = np.abs(as_floats(y[:, :4]) - as_floats(words[:, :4]))
                assert (difference <= rounding_of_sum(x, name)).all(), where
            else:
                np.testing.assert_array_equal(y, words, err_msg=where)


@pytest.mark.skipif(not RECORDS, reason="not yet confirmed on hardware: there is no tests/golden/record-*.json")
@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_simulator_agrees_with_hardware(sim, record):
    answers = json.loads(record.read_text())
    assert answers["device"]
    assert answers["date"]
    clusters = answers["architecture"].startswith(("sm_9", "sm_10"))
    assert set(answers["probes"]) == set(NAMES) - (set() if clusters else NEED_CLUSTERS)
    compare(sim, answers)


@pytest.mark.parametrize("probe", range(len(NAMES)), ids=NAMES)
def test_comparison_notices(sim, probe):
    """compare() passes on the simulator's own results and fails with the words of two lanes swapped."""
    answers: dict[str, Any] = {"device": "the simulator", "probes": {name: {} for name in NAMES}}
    _, y = run(sim, probe, 1)
    answers["probes"][NAMES[probe]]["1"] = y.astype(">u4").tobytes().hex()
    compare(sim, answers)
    if NAMES[probe] == "votes":  # every lane has the same; spoil a bit
        y[0, 0] ^= 4
    else:
        y[[4, 5]] = y[[5, 4]]
    answers["probes"][NAMES[probe]]["1"] = y.astype(">u4").tobytes().hex()
    with pytest.raises(AssertionError):
        compare(sim, answers)
