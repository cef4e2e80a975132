# SPDX-License-Identifier: Apache-2.0
"""The CUDA "exact" adapter gradients and masked_contract, run on the simulator, against float64; and what they move."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from numerics import DTYPES, assert_gradient_close, download, empty, pack, random, upload

SCALING = 0.75
Shape = tuple[int, int, int]  # tokens, out_features, in_features
Dtypes = tuple[str, str, str, str]  # of grad_output and input, of the weight, of lora_A and of lora_B
BF16: Dtypes = ("bfloat16",) * 4
MIXED: Dtypes = ("float32", "bfloat16", "float16", "float32")
Result = dict[str, Tensor]  # the gradients by their adapter's letter
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def operands(shape: Shape, r: int, dtypes: Dtypes, seed: int = 0) -> dict[str, Tensor]:
    T, N, K = shape
    return {
        "grad_output": random(seed, T, N, dtype=dtypes[0]),
        "input": random(seed + 1, T, K, dtype=dtypes[0]),
        "weight": random(seed + 2, N, K, dtype=dtypes[1], density=0.5),
        "lora_A": random(seed + 3, r, K, dtype=dtypes[2]),
        "lora_B": random(seed + 4, N, r, dtype=dtypes[3]),
    }


def panel(rows: int, K: int, r: int, dtypes: Dtypes, seed: int = 0) -> dict[str, Tensor]:
    """For masked_contract: the gradient of a weight in place of its factors."""
    given = operands((1, rows, K), r, dtypes, seed)
    del given["grad_output"], given["input"]
    return {"grad_weight": random(seed, rows, K, dtype=dtypes[0]), **given}


def kept_of(given: dict[str, Tensor], explicit: bool) -> Tensor:
    """An explicit mask is not where the weight is zero."""
    return random(99, *given["weight"].shape) > 0 if explicit else given["weight"] != 0


def run(
    sim: Any, device: Any, given: dict[str, Tensor], *, explicit: bool = False, want: str = "AB", misalign: int = 0
) -> Result:
    """adapter_grad_exact's gradients, or masked_contract's where grad_weight is given: A's then [K, r], added to ones.

    `misalign`: offset of every pointer from an aligned address, in elements.
    """
    (N, K), r = given["weight"].shape, given["lora_A"].shape[0]
    contract = "grad_weight" in given
    fields: dict[str, Any] = {"in_features": K, "r": r, "scaling": SCALING}
    for name, tensor in given.items():
        fields[name] = upload(device, name, tensor, misalign * tensor.element_size())
        fields[f"{name}_dtype"] = NAMES[tensor.dtype]
    fields["mask"] = None
    if explicit:
        fields["mask"] = device.upload("mask", pack(kept_of(given, True)), 4 * misalign)
        fields["weight"] = None
    shapes = {"A": (K, r) if contract else (r, K), "B": (N, r)}
    dtypes = {"A": "float32" if contract else fields["lora_A_dtype"], "B": fields["lora_B_dtype"]}
    outputs = {}
    for letter in want:
        name = "lora_A_sum" if contract and letter == "A" else f"lora_{letter}_grad"
        size = DTYPES[dtypes[letter]].itemsize
        if name == "lora_A_sum":
            outputs[letter] = upload(device, name, torch.ones(K, r), misalign * size)
        else:
            outputs[letter] = empty(device, name, shapes[letter], dtypes[letter], misalign * size)
        fields[name] = outputs[letter]
    if contract:
        sim.masked_contract(device, rows=N, **fields)
    else:
        sim.adapter_grad_exact(device, tokens=len(given["input"]), out_features=N, **fields)
    return {letter: download(device, of, shapes[letter], dtypes[letter]) for letter, of in outputs.items()}


def check(result: Result, given: dict[str, Tensor], explicit: bool = False) -> None:
    kept, A, B = kept_of(given, explicit), given["lora_A"].double(), given["lora_B"].double()
    contract = "grad_weight" in given
    if contract:
        tokens, G = 1, given["grad_weight"].double() * kept
        squares = G.square()
    else:
        dY, X = given["grad_output"].double(), given["input"].double()
        tokens, G, squares = len(X), (dY.T @ X) * kept, (dY.square().T @ X.square()) * kept
    if "A" in result:
        expected, rms = SCALING * B.T @ G, SCALING * (B.square().T @ squares).sqrt()
        if contract:
            expected, rms = 1 + expected.T, (1 + rms.T.square()).sqrt()
        dtype = torch.float32 if contract else given["lora_A"].dtype
        assert_gradient_close(result["A"], expected, rms, tokens + len(B), dtype, "of lora_A")
    if "B" in result:
        expected, rms = SCALING * G @ A.T, SCALING * (squares @ A.square().T).sqrt()
        dtype = given["lora_B"].dtype
        assert_gradient_close(result["B"], expected, rms, tokens + A.shape[1], dtype, "of lora_B")


@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(sim: Any, dtype: str, contract: bool) -> None:
    weights = list(DTYPES)
    for seed, (lora_A, lora_B) in enumerate(itertools.product(DTYPES, DTYPES)):
        dtypes, r = (dtype, weights[seed % 3], lora_A, lora_B), 24 if seed % 4 == 0 else 8
        given = panel(136, 72, r, dtypes, 10 * seed) if contract else operands((40, 136, 72), r, dtypes, 10 * seed)
        for explicit in (False, True) if seed < 3 else (seed % 2 == 1,):
            check(run(sim, sim.Device(seed=seed), given, explicit=explicit), given, explicit)


@pytest.mark.parametrize("r", [1, 3, 17, 64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 129, 17), (129, 1, 257), (33, 17, 40)])
def test_awkward_shapes(sim: Any, shape: Shape, r: int) -> None:
    for seed, dtypes in enumerate((BF16, MIXED)):
        explicit = (seed + r) % 2 == 0
        device = sim.Device(seed=seed, cp=("early", "late")[seed], multiprocessors=1 + seed)
        given = operands(shape, r, dtypes, seed)
        check(run(sim, device, given, explicit=explicit), given, explicit)
        given = panel(*shape[1:], r, dtypes, seed)
        check(run(sim, device, given, explicit=explicit), given, explicit)


def test_large_ranks(sim: Any) -> None:
    for make in (lambda dtypes: operands((20, 40, 72), 256, dtypes), lambda dtypes: panel(40, 72, 256, dtypes)):
        given = make(("bfloat16", "bfloat16", "float32", "bfloat16"))
        check(run(sim, sim.Device(), given), given)


@pytest.mark.parametrize("multiprocessors", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cut_into_blocks(sim: Any, dtype: str, multiprocessors: int) -> None:
    """One multiprocessor takes wide tiles, many take narrow ones and ranges of tokens."""
    given = operands((520, 140, 500), 16, (dtype, "bfloat16", "bfloat16", "float32"))
    device = sim.Device(multiprocessors=multiprocessors)
    check(run(sim, device, given), given)
    tiles = {1: 2 * (4 if dtype == "float32" else 2), 40: 2 * 4 * 2}
    assert device.launches()[0]["grid"][0] == tiles[multiprocessors]


@pytest.mark.parametrize("contract", [False, True])
def test_partial_sums_are_bounded(sim: Any, contract: bool) -> None:
    """Rows are taken in panels where the partial sums of all would exceed 1 MiB per multiprocessor."""
    given = panel(140, 264, 256, BF16) if contract else operands((16, 260, 264), 256, BF16)
    device = sim.Device(multiprocessors=1)
    check(run(sim, device, given), given)
    assert device.stats()["masked_contract" if contract else "adapter_grad_exact"]["launches"] > 1


@pytest.mark.parametrize("want", ["A", "B", "AB", ""])
def test_what_is_not_wanted_is_not_computed(sim: Any, want: str) -> None:
    for name, given in (
        ("adapter_grad_exact", operands((40, 136, 72), 16, BF16)),
        ("masked_contract", panel(136, 72, 16, BF16)),
    ):
        device = sim.Device()
        check(run(sim, device, given, want=want), given)
        if want == "":
            assert not device.launches()
            continue
        reads = device.stats()[name]["buffers"]
        assert ("lora_A" in reads) == ("B" in want)
        assert ("lora_B" in reads) == ("A" in want)


@pytest.mark.parametrize("shape", [(0, 24, 40), (8, 0, 40), (8, 24, 0)])
def test_sums_of_nothing_are_zero(sim: Any, shape: Shape) -> None:
    want = ("A" if shape[2] else "") + ("B" if shape[1] else "")
    for gradient in run(sim, sim.Device(), operands(shape, 4, BF16), want=want).values():
        assert not gradient.view(torch.int16).any()
    if shape[0] != 0:
        result = run(sim, sim.Device(), panel(*shape[1:], 4, BF16), want=want)
        assert "A" not in result or bool((result["A"] == 1).all())
        assert "B" not in result or not result["B"].view(torch.int16).any()


@pytest.mark.parametrize("contract", [False, True])
def test_what_is_masked_does_not_count(sim: Any, contract: bool) -> None:
    """Not even where it is infinite or no number at all; and a kept infinity does."""
    given = panel(20, 40, 4, BF16) if contract else operands((24, 20, 40), 4, BF16)
    given["weight"][3] = -0.0
    given["weight"][:, 5] = 0.0
    if contract:
        given["grad_weight"][3], given["grad_weight"][:, 5] = torch.inf, torch.nan
    else:
        given["grad_output"][7, 3], given["input"][:, 5] = torch.inf, torch.nan
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
        given = operands((34, 64, 136), 16, (dtype,) * 4)
        check(run(sim, sim.Device(), given, explicit=explicit, misalign=misalign), given, explicit)
        given = panel(64, 136, 16, (dtype,) * 4)
        check(run(sim, sim.Device(), given, explicit=explicit, misalign=misalign), given, explicit)


def test_little_shared_memory(sim: Any) -> None:
    for dtypes in (BF16, ("float32",) * 4):
        for given in (operands((40, 140, 264), 48, dtypes), panel(140, 264, 48, dtypes)):
            device = sim.Device(shared_bytes=99 * 1024, multiprocessors=1)
            check(run(sim, device, given), given)
            assert all(launch["shared_bytes"] <= 99 * 1024 for launch in device.launches())


def test_refusals_are_sentences(sim: Any) -> None:
    given = operands((8, 8, 8), 4, BF16)
    with pytest.raises(sim.StatusError, match="bytes of shared memory per block, and this device has 1024"):
        run(sim, sim.Device(shared_bytes=1024), given)
    with pytest.raises(sim.StatusError, match="was given bfloat16 and float16; convert one"):
        run(sim, sim.Device(), {**given, "input": given["input"].half()})
    for function, field in ((sim.adapter_grad_exact, "input_dtype"), (sim.masked_contract, "grad_weight_dtype")):
        with pytest.raises(sim.StatusError, match="takes float32, bfloat16 and float16, and was given float64"):
            function(sim.Device(), in_features=8, r=4, **{field: "float64"})


@pytest.mark.parametrize("seed", range(3))
def test_scheduling_changes_nothing(sim: Any, seed: int) -> None:
    dtypes = ("bfloat16", "bfloat16", "float32", "float32")
    for given in (operands((520, 140, 264), 16, dtypes), panel(140, 264, 16, dtypes)):
        first = run(sim, sim.Device(seed=1, cp="late"), given)
        again = run(sim, sim.Device(seed=seed + 2, preempt=0.05, cp="early"), given)
        for letter in "AB":
            assert torch.equal(first[letter].view(torch.int32), again[letter].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_races(sim: Any, dtype: str) -> None:
    dtypes = (dtype, "float32", "bfloat16", "float32")
    for seed, cp in enumerate(("early", "late", "random")):
        for given in (operands((130, 72, 264), 20, dtypes), panel(72, 264, 20, dtypes)):
            device = sim.Device(seed=seed, race=True, preempt=0.02, cp=cp, multiprocessors=1 + 3 * (seed % 2))
            check(run(sim, device, given, explicit=seed == 1), given, seed == 1)


@pytest.mark.parametrize("contract", [False, True])
def test_beyond_31_bits_of_elements(sim: Any, contract: bool) -> None:
    """The last columns of matrices of more than 2^31 elements, in buffers that are mostly never touched."""
    T, N, K, r, columns = 65, 40, (1 << 26) + 64, 1, 16
    given = panel(N, columns, r, BF16) if contract else operands((T, N, columns), r, BF16)
    device = sim.Device(sample_blocks=3)
    fields: dict[str, Any] = {"in_features": K, "r": r, "scaling": SCALING}
    for name, tensor in given.items():
        if name in ("input", "weight", "grad_weight"):
            fields[name] = device.empty(name, 2 * len(tensor) * K, sparse=True)
            for row, values in enumerate(tensor.view(torch.int16).numpy()):
                device.write(fields[name], 2 * ((row + 1) * K - columns), values)
        else:
            fields[name] = upload(device, name, tensor)
        fields[f"{name}_dtype"] = "bfloat16"
    if contract:
        result = fields["lora_A_sum"] = device.empty("lora_A_sum", 4 * K, sparse=True)
        device.write(result, 4 * (K - columns), np.ones(columns, dtype=np.float32))
        sim.masked_contract(device, rows=N, **fields)
        got = torch.from_numpy(device.read(result, 4 * (K - columns), 4 * columns).copy().view(np.float32))
        check({"A": got.reshape(columns, r)}, given)
    else:
        result = fields["lora_A_grad"] = device.empty("lora_A_grad", 2 * K, sparse=True)
        sim.adapter_grad_exact(device, tokens=T, out_features=N, **fields)
        got = torch.from_numpy(device.read(result, 2 * (K - columns), 2 * columns).copy().view(np.int16))
        check({"A": got.view(torch.bfloat16).reshape(r, columns)}, given)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_traffic_is_the_floor(sim: Any, dtype: str, explicit: bool) -> None:
    """A tiled matmul reads dY once per tile of columns and X once per tile of rows. All else is read once per use, and
    nothing of the size of the weight is written."""
    T, N, K, r = 128, 512, 1024, 16
    columns = 256 if dtype == "bfloat16" else 128
    device = sim.Device(multiprocessors=16)
    run(sim, device, operands((T, N, K), r, (dtype, "bfloat16", "bfloat16", "bfloat16")), explicit=explicit)
    assert device.launches()[0]["grid"][0] == N // 128 * (K // columns)
    buffers = device.stats()["adapter_grad_exact"]["buffers"]
    size = DTYPES[dtype].itemsize
    floor = {
        "grad_output": T * N * size * (K // columns),
        "input": T * K * size * (N // 128),
        "mask" if explicit else "weight": N * K // 8 if explicit else 2 * N * K,
        "lora_A": 2 * r * K * (N // 128),
        "lora_B": 2 * N * r * (K // columns),
    }
    for name, least in floor.items():
        # A row of a narrow tile has 16 bytes of mask, half a sector.
        times = 2 if name == "mask" and columns == 128 else 1
        assert buffers[name]["bytes_read"] == least, name
        assert buffers[name]["sectors_read"] == times * least // 32, name
    assert ("weight" in buffers) != ("mask" in buffers)
    partial = 4 * r * (N * (K // columns) + K * (N // 128))
    written = {name: of["bytes_written"] for name, of in buffers.items() if of["bytes_written"]}
    assert sum(written.values()) == partial
    assert all(name.startswith("scratch") for name in written)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_traffic_is_the_floor(sim: Any, dtype: str) -> None:
    N, K, r = 256, 512, 16
    device = sim.Device(multiprocessors=16)
    run(sim, device, panel(N, K, r, (dtype, "bfloat16", "bfloat16", "bfloat16")))
    counted = device.stats()["masked_contract"]
    buffers = counted["buffers"]
    for name, least in (("grad_weight", N * K * DTYPES[dtype].itemsize), ("weight", 2 * N * K)):
        assert buffers[name]["sectors_read"] == buffers[name]["unique_sectors_read"] == least // 32
    assert counted["global_bytes_written"] == 4 * r * (N * (K // 128) + K * (N // 128))


@pytest.mark.parametrize("multiprocessors", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accesses_are_wide_and_meet_no_bank_twice(sim: Any, dtype: str, multiprocessors: int) -> None:
    dtypes = (dtype, "bfloat16", "bfloat16", "float32")
    for given in (operands((64, 256, 512), 32, dtypes), panel(256, 512, 32, dtypes)):
        for explicit in (False, True):
            device = sim.Device(multiprocessors=multiprocessors)
            run(sim, device, given, explicit=explicit)
            counted = device.stats()["masked_contract" if "grad_weight" in given else "adapter_grad_exact"]
            widths = {w: counted["loads_by_width"][w] + counted["stores_by_width"][w] for w in (1, 2, 4, 8, 16)}
            assert widths[16] >= 0.95 * sum(widths.values()), widths
            assert not any(counted[kind] for kind in counted if kind.endswith("_conflicts")), counted
