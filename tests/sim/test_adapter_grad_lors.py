# SPDX-License-Identifier: Apache-2.0
"""The CUDA "lors" adapter gradients, run on the simulator, against float64; and what they move, against the floor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from numerics import DTYPES, assert_gradient_close, download, empty, random, upload

SCALING = 0.75
PROJECTIONS, GRADIENTS = "the projections of the adapter gradients", "the adapter gradients"
SUMS = "the sum of partial results"
Shape = tuple[int, int, int]  # tokens, out_features, in_features
Dtypes = tuple[str, str, str, str]  # of grad_output, input, lora_A and lora_B
BF16: Dtypes = ("bfloat16",) * 4


def operands(shape: Shape, r: int, dtypes: Dtypes, seed: int = 0) -> dict[str, Tensor]:
    T, N, K = shape
    return {
        "grad_output": random(seed, T, N, dtype=dtypes[0]),
        "input": random(seed + 1, T, K, dtype=dtypes[1]),
        "lora_A": random(seed + 2, r, K, dtype=dtypes[2]),
        "lora_B": random(seed + 3, N, r, dtype=dtypes[3]),
    }


def run(
    sim: Any, device: Any, given: dict[str, Tensor], *, want: str = "AB", misalign: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """lora_A_grad and lora_B_grad, where `want` names them. `misalign`: elements past an aligned address."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    (T, N), (r, K) = given["grad_output"].shape, given["lora_A"].shape
    fields: dict[str, Any] = {}
    for name, tensor in given.items():
        fields[name] = upload(device, name, tensor, misalign * tensor.element_size())
        fields[f"{name}_dtype"] = names[tensor.dtype]
    gradients = {}
    for letter, shape in (("A", (r, K)), ("B", (N, r))):
        dtype = fields[f"lora_{letter}_dtype"]
        if letter in want:
            gradients[letter] = empty(device, f"lora_{letter}_grad", shape, dtype, misalign * DTYPES[dtype].itemsize)
        fields[f"lora_{letter}_grad"] = gradients.get(letter)
    sim.adapter_grad_lors(device, tokens=T, out_features=N, in_features=K, r=r, scaling=SCALING, **fields)
    return (
        download(device, gradients["A"], (r, K), fields["lora_A_dtype"]) if "A" in want and K else None,
        download(device, gradients["B"], (N, r), fields["lora_B_dtype"]) if "B" in want and N else None,
    )


def check(result: tuple[Tensor | None, Tensor | None], given: dict[str, Tensor]) -> None:
    dY, X, A, B = (given[name].double() for name in ("grad_output", "input", "lora_A", "lora_B"))
    tokens = len(dY)
    got_A, got_B = result
    if got_A is not None:
        rms = SCALING * ((dY.square() @ B.square()).T @ X.square()).sqrt()
        expected = SCALING * (dY @ B).T @ X
        assert_gradient_close(got_A, expected, rms, tokens + len(B), got_A.dtype, "lora_A_grad")
    if got_B is not None:
        rms = SCALING * (dY.square().T @ (X.square() @ A.square().T)).sqrt()
        expected = SCALING * dY.T @ (X @ A.T)
        assert_gradient_close(got_B, expected, rms, tokens + A.shape[1], got_B.dtype, "lora_B_grad")


@pytest.mark.parametrize("lora_B", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(sim: Any, dtype: str, lora_B: str) -> None:
    for seed, lora_A in enumerate(DTYPES):
        given = operands((40, 136, 72), 24 if seed % 2 else 8, (dtype, dtype, lora_A, lora_B), seed=10 * seed)
        check(run(sim, sim.Device(seed=seed), given), given)


@pytest.mark.parametrize("r", [1, 3, 16, 17, 33, 64, 130])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 129, 17), (129, 1, 257), (33, 17, 40)])
def test_awkward_shapes(sim: Any, shape: Shape, r: int) -> None:
    for seed, dtypes in enumerate(
        (BF16, ("float16", "float16", "float32", "bfloat16"), ("float32", "float32", "bfloat16", "float16"))
    ):
        given = operands(shape, r, dtypes, seed)
        check(run(sim, sim.Device(seed=seed, cp=("early", "late", "random")[seed]), given), given)


def launches(device: Any) -> dict[str, int]:
    return {name: of["launches"] for name, of in device.stats().items()}


@pytest.mark.parametrize("r", [16, 64, 128])
def test_two_launches_and_one_for_partial_sums(sim: Any, r: int) -> None:
    given = operands((2200, 72, 40), r, BF16)
    for multiprocessors in (2, 40):
        device = sim.Device(multiprocessors=multiprocessors)
        check(run(sim, device, given), given)
        ranges = multiprocessors == 40 and r < 128
        assert launches(device) == {PROJECTIONS: 1, GRADIENTS: 1, **({SUMS: 1} if ranges else {})}


def test_large_ranks_are_taken_in_turns(sim: Any) -> None:
    given = operands((20, 40, 72), 200, ("bfloat16", "bfloat16", "float32", "bfloat16"))
    device = sim.Device()
    check(run(sim, device, given), given)
    assert launches(device)[GRADIENTS] == -(-200 // 64)  # 128 ranks of a float32 adapter do not fit


@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
@pytest.mark.parametrize("r", [16, 32, 64])
def test_every_cut_into_blocks(sim: Any, multiprocessors: int, r: int) -> None:
    for dtype in ("bfloat16", "float32"):
        given = operands((600, 330, 72), r, (dtype, dtype, "bfloat16", "bfloat16"))
        check(run(sim, sim.Device(multiprocessors=multiprocessors), given), given)


@pytest.mark.parametrize("want", ["A", "B", "AB"])
def test_what_is_not_wanted_is_not_computed(sim: Any, want: str) -> None:
    given = operands((40, 136, 72), 16, BF16)
    device = sim.Device()
    check(run(sim, device, given, want=want), given)
    projections, gradients = (device.stats()[name]["buffers"] for name in (PROJECTIONS, GRADIENTS))
    sizes = {"grad_output": 2 * 40 * 136, "input": 2 * 40 * 72}
    for buffers, names in (
        (projections, {"A": "grad_output", "B": "input"}),
        (gradients, {"A": "input", "B": "grad_output"}),
    ):
        read = {name: of["bytes_read"] for name, of in buffers.items() if name in sizes}
        assert read == {names[letter]: sizes[names[letter]] for letter in want}
    assert ("lora_A" in projections) == ("B" in want)
    assert ("lora_B" in projections) == ("A" in want)


@pytest.mark.parametrize("shape", [(0, 24, 40), (8, 0, 40), (8, 24, 0)])
def test_sums_of_nothing_are_zero(sim: Any, shape: Shape) -> None:
    for gradient in run(sim, sim.Device(), operands(shape, 4, BF16)):
        assert gradient is None or not gradient.view(torch.int16).any()


@pytest.mark.parametrize("misalign", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers_take_the_slow_path(sim: Any, dtype: str, misalign: int) -> None:
    given = operands((34, 64, 136), 16, (dtype,) * 4)
    check(run(sim, sim.Device(), given, misalign=misalign), given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_little_shared_memory(sim: Any, dtype: str) -> None:
    """As of a GPU of architecture 89, where 64 ranks of float32 adapters do not fit."""
    given = operands((70, 200, 136), 80, (dtype, dtype, "float32", "float32"))
    device = sim.Device(shared_bytes=99 * 1024)
    check(run(sim, device, given), given)
    assert all(launch["shared_bytes"] <= 99 * 1024 for launch in device.launches())


def test_refusals_are_sentences(sim: Any) -> None:
    with pytest.raises(sim.StatusError, match="1024 bytes of shared memory per block"):
        run(sim, sim.Device(shared_bytes=1024), operands((8, 8, 8), 4, BF16))
    given = operands((8, 8, 8), 4, BF16)
    with pytest.raises(sim.StatusError, match="was given bfloat16 and float16; convert one"):
        run(sim, sim.Device(), {**given, "input": given["input"].half()})
    fields = {name: upload(sim.Device(), name, tensor) for name, tensor in given.items()}
    with pytest.raises(sim.StatusError, match="takes float32, bfloat16 and float16, and was given float64"):
        sim.adapter_grad_lors(
            sim.Device(), tokens=8, out_features=8, in_features=8, r=4, **fields, input_dtype="float64"
        )


@pytest.mark.parametrize("seed", range(3))
def test_scheduling_changes_nothing(sim: Any, seed: int) -> None:
    given = operands((200, 600, 264), 16, ("bfloat16", "bfloat16", "float32", "float32"))
    first = run(sim, sim.Device(seed=1, cp="late"), given)
    again = run(sim, sim.Device(seed=seed + 2, preempt=0.05, cp="early"), given)
    for one, other in zip(first, again, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("r", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_races(sim: Any, dtype: str, r: int) -> None:
    given = operands((100, 200, 40), r, (dtype, dtype, "bfloat16", "float32"))
    for seed, cp in enumerate(("early", "late", "random")):
        device = sim.Device(seed=seed, race=True, preempt=0.02, cp=cp, multiprocessors=1 + 3 * (seed % 2))
        check(run(sim, device, given), given)


def test_beyond_31_bits_of_elements(sim: Any) -> None:
    """The last outputs of a gradient of more than 2^31 elements, in a buffer that is mostly never touched."""
    T, N, K, r = 65, (1 << 25) + 64, 8, 1
    device = sim.Device(sample_blocks=3, multiprocessors=1)
    grad_output = device.empty("grad_output", 2 * T * N, sparse=True)
    gradient = device.empty("lora_B_grad", 2 * N * r, sparse=True)
    columns = 16
    given = operands((T, columns, K), r, BF16)
    for token, row in enumerate(given["grad_output"].view(torch.int16).numpy()):
        device.write(grad_output, 2 * ((token + 1) * N - columns), row)
    fields = {f"{name}_dtype": "bfloat16" for name in ("grad_output", "input", "lora_A", "lora_B")}
    sim.adapter_grad_lors(
        device,
        tokens=T,
        out_features=N,
        in_features=K,
        r=r,
        scaling=SCALING,
        grad_output=grad_output,
        input=upload(device, "input", given["input"]),
        lora_A=upload(device, "lora_A", given["lora_A"]),
        lora_B_grad=gradient,
        **fields,
    )
    # The last block is always among the sampled ones; it has the last features.
    raw = device.read(gradient, 2 * (N - columns), 2 * columns).copy()
    end = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).reshape(columns, r)
    check((None, end), given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(512, 1024, 2048), (1024, 512, 512)])
def test_traffic_is_the_floor(sim: Any, shape: Shape, dtype: str) -> None:
    """dY and X are read once by each launch. P, Q and partial sums, which stay in cache, are counted apart."""
    T, N, K = shape
    device = sim.Device(multiprocessors=8)
    run(sim, device, operands(shape, 16, (dtype, dtype, "bfloat16", "bfloat16")))
    assert SUMS not in device.stats()
    for kernel in (PROJECTIONS, GRADIENTS):
        buffers = device.stats()[kernel]["buffers"]
        for name, elements in (("grad_output", T * N), ("input", T * K)):
            floor = elements * DTYPES[dtype].itemsize // 32
            assert buffers[name]["sectors_read"] <= 1.05 * floor, (name, buffers[name], floor)
        scratch = sum(
            of["sectors_read"] + of["sectors_written"] for name, of in buffers.items() if name.startswith("scratch")
        )
        moved = T * (N + K) * DTYPES[dtype].itemsize // 32
        assert scratch <= 0.52 * moved, f"{kernel}: {scratch} sectors of P and Q, {scratch / moved:.2f} of dY and X"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [16, 32, 64, 128])
def test_accesses_are_wide_and_meet_no_bank_twice(sim: Any, dtype: str, r: int) -> None:
    for adapters in (("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float16")):
        device = sim.Device(multiprocessors=16)
        run(sim, device, operands((512, 512, 520), r, (dtype, dtype, *adapters)))
        for stats in device.stats().values():
            loads = stats["loads_by_width"]
            assert loads[16] >= 0.95 * sum(loads.values()), loads
            assert not any(stats[kind] for kind in stats if kind.endswith("_conflicts")), stats


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_split_terms_of_long_sums(sim: Any, dtype: str) -> None:
    """From 1,536 terms on, P and Q of 16-bit dY and X are stored as two terms, which the tolerance does not notice; of
    shorter sums, and of float32, as three."""
    for features, terms in ((1472, 2), (1464, 3)):
        given = operands((64, features, features), 16, (dtype, dtype, "float32", "float32"), seed=features)
        device = sim.Device()
        check(run(sim, device, given), given)
        written = device.stats()[PROJECTIONS]["global_bytes_written"]
        assert written == 2 * 64 * 16 * 2 * (3 if dtype == "float32" else terms)
