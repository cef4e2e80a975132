# SPDX-License-Identifier: Apache-2.0
"""masked_contract on CUDA, run on the simulator, against float64; and what it moves, alone and in the exact gradients."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from numerics import DTYPES, assert_gradient_close, download, empty, pack, random, upload

SCALING = 0.75
Dtypes = tuple[str, str, str, str]  # of the gradient, of the weight, of lora_A and of lora_B
BF16: Dtypes = ("bfloat16",) * 4
MIXED: Dtypes = ("float32", "bfloat16", "float16", "float32")
Result = dict[str, Tensor]  # the gradients by their adapter's letter
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def panel(rows: int, K: int, r: int, dtypes: Dtypes, seed: int = 0) -> dict[str, Tensor]:
    return {
        "grad_weight": random(seed, rows, K, dtype=dtypes[0]),
        "weight": random(seed + 2, rows, K, dtype=dtypes[1], density=0.5),
        "lora_A": random(seed + 3, r, K, dtype=dtypes[2]),
        "lora_B": random(seed + 4, rows, r, dtype=dtypes[3]),
    }


def kept_of(given: dict[str, Tensor], explicit: bool) -> Tensor:
    """An explicit mask is not where the weight is zero."""
    return random(99, *given["weight"].shape) > 0 if explicit else given["weight"] != 0


def run(
    sim: Any, device: Any, given: dict[str, Tensor], *, explicit: bool = False, want: str = "AB", misalign: int = 0
) -> Result:
    """lora_A_sum [K, r], added to ones, and lora_B_grad, where `want` names them.

    `misalign`: offset of every pointer from an aligned address, in elements.
    """
    (N, K), r = given["weight"].shape, given["lora_A"].shape[0]
    fields: dict[str, Any] = {"in_features": K, "r": r, "scaling": SCALING}
    for name, tensor in given.items():
        fields[name] = upload(device, name, tensor, misalign * tensor.element_size())
        fields[f"{name}_dtype"] = NAMES[tensor.dtype]
    fields["mask"] = None
    if explicit:
        fields["mask"] = device.upload("mask", pack(kept_of(given, True)), 4 * misalign)
        fields["weight"] = None
    shapes = {"A": (K, r), "B": (N, r)}
    dtypes = {"A": "float32", "B": fields["lora_B_dtype"]}
    outputs = {}
    for letter in want:
        name = "lora_A_sum" if letter == "A" else "lora_B_grad"
        size = DTYPES[dtypes[letter]].itemsize
        if letter == "A":
            outputs[letter] = upload(device, name, torch.ones(K, r), misalign * size)
        else:
            outputs[letter] = empty(device, name, shapes[letter], dtypes[letter], misalign * size)
        fields[name] = outputs[letter]
    sim.masked_contract(device, rows=N, **fields)
    return {letter: download(device, of, shapes[letter], dtypes[letter]) for letter, of in outputs.items()}


def check(result: Result, given: dict[str, Tensor], explicit: bool = False) -> None:
    kept, A, B = kept_of(given, explicit), given["lora_A"].double(), given["lora_B"].double()
    G = given["grad_weight"].double() * kept
    if "A" in result:
        expected, rms = 1 + SCALING * G.T @ B, (1 + (SCALING**2) * G.square().T @ B.square()).sqrt()
        assert_gradient_close(result["A"], expected, rms, 1 + len(B), torch.float32, "of lora_A")
    if "B" in result:
        expected, rms = SCALING * G @ A.T, SCALING * (G.square() @ A.square().T).sqrt()
        assert_gradient_close(result["B"], expected, rms, 1 + A.shape[1], given["lora_B"].dtype, "of lora_B")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(sim: Any, dtype: str) -> None:
    weights = list(DTYPES)
    for seed, (lora_A, lora_B) in enumerate(itertools.product(DTYPES, DTYPES)):
        given = panel(136, 72, 24 if seed % 4 == 0 else 8, (dtype, weights[seed % 3], lora_A, lora_B), 10 * seed)
        for explicit in (False, True) if seed < 3 else (seed % 2 == 1,):
            check(run(sim, sim.Device(seed=seed), given, explicit=explicit), given, explicit)


@pytest.mark.parametrize("r", [1, 3, 17, 64])
@pytest.mark.parametrize("shape", [(1, 1), (129, 17), (1, 257), (17, 40)])
def test_awkward_shapes(sim: Any, shape: tuple[int, int], r: int) -> None:
    for seed, dtypes in enumerate((BF16, MIXED)):
        explicit = (seed + r) % 2 == 0
        given = panel(*shape, r, dtypes, seed)
        check(run(sim, sim.Device(seed=seed, multiprocessors=1 + seed), given, explicit=explicit), given, explicit)


def test_large_ranks(sim: Any) -> None:
    given = panel(40, 72, 256, ("bfloat16", "bfloat16", "float32", "bfloat16"))
    check(run(sim, sim.Device(), given), given)


def test_two_launches_however_many_tiles(sim: Any) -> None:
    given = panel(700, 520, 16, BF16)
    device = sim.Device()
    check(run(sim, device, given), given)
    assert [launch["name"] for launch in device.launches()] == ["masked_contract", "the sum of partial results"]


def test_partial_sums_are_bounded(sim: Any) -> None:
    """Rows are taken in panels where the partial sums of all would exceed 1 MiB per multiprocessor."""
    given = panel(140, 264, 256, BF16)
    device = sim.Device(multiprocessors=1)
    check(run(sim, device, given), given)
    assert device.stats()["masked_contract"]["launches"] > 1


@pytest.mark.parametrize("want", ["A", "B", "AB", ""])
def test_what_is_not_wanted_is_not_computed(sim: Any, want: str) -> None:
    given = panel(136, 72, 16, BF16)
    device = sim.Device()
    check(run(sim, device, given, want=want), given)
    if want == "":
        assert not device.launches()
        return
    reads = device.stats()["masked_contract"]["buffers"]
    assert ("lora_A" in reads) == ("B" in want)
    assert ("lora_B" in reads) == ("A" in want)


@pytest.mark.parametrize("shape", [(0, 40), (24, 0)])
def test_sums_of_nothing_are_zero(sim: Any, shape: tuple[int, int]) -> None:
    want = ("A" if shape[1] else "") + ("B" if shape[0] else "")
    result = run(sim, sim.Device(), panel(*shape, 4, BF16), want=want)
    assert "A" not in result or bool((result["A"] == 1).all())
    assert "B" not in result or not result["B"].view(torch.int16).any()


def test_what_is_masked_does_not_count(sim: Any) -> None:
    """Not even where it is infinite or no number at all; and a kept infinity does."""
    given = panel(20, 40, 4, BF16)
    given["weight"][3] = -0.0
    given["weight"][:, 5] = 0.0
    given["grad_weight"][3], given["grad_weight"][:, 5] = torch.inf, torch.nan
    result = run(sim, sim.Device(), given)
    assert all(bool(gradient.isfinite().all()) for gradient in result.values())
    given["weight"][3, 0] = 1.0
    result = run(sim, sim.Device(), given)
    assert not bool(result["B"][3].isfinite().any())
    assert bool(result["B"][[0, 4]].isfinite().all())


@pytest.mark.parametrize("misalign", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers_take_the_slow_path(sim: Any, dtype: str, misalign: int) -> None:
    for explicit in (False, True):
        given = panel(64, 136, 16, (dtype,) * 4)
        check(run(sim, sim.Device(), given, explicit=explicit, misalign=misalign), given, explicit)


def test_little_shared_memory(sim: Any) -> None:
    for dtypes in (BF16, ("float32",) * 4):
        given = panel(140, 264, 48, dtypes)
        device = sim.Device(shared_bytes=99 * 1024, multiprocessors=1)
        check(run(sim, device, given), given)
        assert all(launch["shared_bytes"] <= 99 * 1024 for launch in device.launches())


def test_refusals_are_sentences(sim: Any) -> None:
    with pytest.raises(sim.StatusError, match="bytes of shared memory per block, and this device has 1024"):
        run(sim, sim.Device(shared_bytes=1024), panel(8, 8, 4, BF16))
    with pytest.raises(sim.StatusError, match="takes float32, bfloat16 and float16, and was given float64"):
        sim.masked_contract(sim.Device(), in_features=8, r=4, grad_weight_dtype="float64")


@pytest.mark.parametrize("seed", range(3))
def test_scheduling_changes_nothing(sim: Any, seed: int) -> None:
    given = panel(700, 264, 16, ("float32", "bfloat16", "float32", "float32"))
    first = run(sim, sim.Device(seed=1), given)
    again = run(sim, sim.Device(seed=seed + 2, preempt=0.05), given)
    for letter in "AB":
        assert torch.equal(first[letter].view(torch.int32), again[letter].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_races(sim: Any, dtype: str) -> None:
    for seed in range(3):
        given = panel(72, 264, 20, (dtype, "float32", "bfloat16", "float32"))
        device = sim.Device(seed=seed, race=True, preempt=0.02, multiprocessors=1 + 3 * (seed % 2))
        check(run(sim, device, given, explicit=seed == 1), given, seed == 1)


def test_beyond_31_bits_of_elements(sim: Any) -> None:
    """The last columns of matrices of more than 2^31 elements, in buffers that are mostly never touched."""
    N, K, r, columns = 40, (1 << 26) + 64, 1, 16
    given = panel(N, columns, r, BF16)
    device = sim.Device(sample_blocks=3)
    fields: dict[str, Any] = {"in_features": K, "r": r, "scaling": SCALING}
    for name, tensor in given.items():
        if name in ("weight", "grad_weight"):
            fields[name] = device.empty(name, 2 * len(tensor) * K, sparse=True)
            for row, values in enumerate(tensor.view(torch.int16).numpy()):
                device.write(fields[name], 2 * ((row + 1) * K - columns), values)
        else:
            fields[name] = upload(device, name, tensor)
        fields[f"{name}_dtype"] = "bfloat16"
    result = fields["lora_A_sum"] = device.empty("lora_A_sum", 4 * K, sparse=True)
    device.write(result, 4 * (K - columns), np.ones(columns, dtype=np.float32))
    sim.masked_contract(device, rows=N, **fields)
    got = torch.from_numpy(device.read(result, 4 * (K - columns), 4 * columns).copy().view(np.float32))
    check({"A": got.reshape(columns, r)}, given)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_traffic_is_the_floor(sim: Any, dtype: str, explicit: bool) -> None:
    """G and the weight or its mask are read once, nothing of their size is written, and no access meets a bank twice."""
    N, K, r = 512, 1024, 16
    device = sim.Device(multiprocessors=16)
    run(sim, device, panel(N, K, r, (dtype, "bfloat16", "bfloat16", "bfloat16")), explicit=explicit)
    counted = device.stats()["masked_contract"]
    buffers = counted["buffers"]
    kept = "mask" if explicit else "weight"
    floor = {"grad_weight": N * K * DTYPES[dtype].itemsize, kept: N * K // 8 if explicit else 2 * N * K}
    floor |= {"lora_A": 2 * r * K * (N // 128), "lora_B": 2 * N * r * (K // 128)}
    for name, least in floor.items():
        times = 2 if name == "mask" else 1  # a row of a tile has 16 bytes of mask, half a sector
        assert buffers[name]["bytes_read"] == least, name
        assert buffers[name]["sectors_read"] <= times * least // 32, name
    assert counted["global_bytes_written"] == 4 * r * (K * (N // 128) + N * (K // 128))
    for stats in device.stats().values():
        assert not any(stats[kind] for kind in stats if kind.endswith("_conflicts")), stats
