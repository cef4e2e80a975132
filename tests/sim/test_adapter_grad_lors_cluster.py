# SPDX-License-Identifier: Apache-2.0
"""The "lors" adapter gradients on a device with clusters: sums across blocks through distributed shared memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from test_adapter_grad_lors import BF16, GRADIENTS, SUMS, Dtypes, Shape, check, operands, run

Gradients = tuple[Tensor | None, Tensor | None]


def on_hopper(sim: Any, **options: Any) -> Any:
    return sim.Device(**{"architecture": 90, "multiprocessors": 8, **options})


def same_bits(one: Gradients, other: Gradients) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return bool(pairs) and all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def gradient_launch(device: Any) -> dict[str, Any]:
    [launch] = [launch for launch in device.launches() if launch["name"] == GRADIENTS]
    return launch


@pytest.mark.parametrize("r", [1, 16, 17, 40, 64, 128])
@pytest.mark.parametrize("shape", [(1, 8, 8), (300, 136, 72), (129, 8, 264), (600, 64, 72)])
def test_shapes(sim: Any, shape: Shape, r: int) -> None:
    dtypes: Dtypes = ("bfloat16", "bfloat16", "float32", "bfloat16") if r % 2 else BF16
    given = operands(shape, r, dtypes, seed=r)
    device = on_hopper(sim, seed=r, multiprocessors=132 if r % 4 else 12)
    check(run(sim, device, given), given)
    assert SUMS not in device.stats()


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("ranges", [1, 2, 3, 8])
def test_ranges_of_tokens_are_clusters(sim: Any, ranges: int, architecture: int) -> None:
    given = operands((2048, 64, 64), 16, BF16)
    device = on_hopper(sim, architecture=architecture, multiprocessors=2 * ranges)
    check(run(sim, device, given), given)
    launch = gradient_launch(device)
    assert launch["cluster"] == ranges
    assert launch["grid"][0] == 2 * ranges
    assert len(device.launches()) == 2
    assert launch["bulk_copies"] > 0
    # Each gradient is read once from each block's shared memory.
    assert launch["cluster_bytes_read"] == ranges * 4 * (64 * 16 + 16 * 64)
    for name in ("input", "grad_output"):
        assert (
            launch["buffers"][name]["sectors_read"] == launch["buffers"][name]["unique_sectors_read"] == 2048 * 64 // 16
        )


@pytest.mark.parametrize("multiprocessors", [1, 4, 6])
def test_the_same_bits_as_without_clusters(sim: Any, multiprocessors: int) -> None:
    """As long as the sum of partial results adds up its few ranges in their order too."""
    given = operands((1500, 64, 64), 16, ("bfloat16", "bfloat16", "float32", "float32"))
    hopper = on_hopper(sim, multiprocessors=multiprocessors)
    ampere = sim.Device(multiprocessors=multiprocessors)
    assert same_bits(run(sim, hopper, given), run(sim, ampere, given))
    assert gradient_launch(ampere)["cluster"] == 1
    assert len(ampere.launches()) == (2 if multiprocessors == 1 else 3)


@pytest.mark.parametrize("seed", range(3))
def test_scheduling_changes_nothing(sim: Any, seed: int) -> None:
    given = operands((700, 136, 72), 32, ("bfloat16", "bfloat16", "float32", "float32"))
    first = run(sim, on_hopper(sim, seed=1, cp="late", multiprocessors=20), given)
    again = run(sim, on_hopper(sim, seed=seed + 2, preempt=0.05, cp="early", multiprocessors=20), given)
    assert same_bits(first, again)


@pytest.mark.parametrize(("r", "tokens"), [(5, 600), (40, 2060)])
def test_no_races(sim: Any, r: int, tokens: int) -> None:
    for seed, cp in enumerate(("early", "late", "random")):
        given = operands((tokens, 72, 40), r, BF16, seed=seed)
        device = on_hopper(sim, seed=seed, race=True, preempt=0.02, cp=cp)
        check(run(sim, device, given), given)
        assert gradient_launch(device)["cluster"] > 1


@pytest.mark.parametrize("want", ["A", "B"])
def test_one_gradient(sim: Any, want: str) -> None:
    given = operands((700, 136, 72), 16, BF16)
    device = on_hopper(sim)
    check(run(sim, device, given, want=want), given)
    assert gradient_launch(device)["cluster"] > 1


@pytest.mark.parametrize(
    ("shape", "dtype", "misalign", "architecture"),
    [
        ((600, 64, 64), "float16", 0, 90),
        ((600, 64, 64), "float32", 0, 90),
        ((600, 64, 64), "bfloat16", 1, 90),
        ((600, 68, 64), "bfloat16", 0, 90),
        ((600, 64, 64), "bfloat16", 0, 89),
        ((600, 64, 64), "bfloat16", 0, 120),
    ],
)
def test_everything_else_takes_the_base_path(
    sim: Any, shape: Shape, dtype: str, misalign: int, architecture: int
) -> None:
    given = operands(shape, 16, (dtype, dtype, "bfloat16", "bfloat16"))
    device = on_hopper(sim, architecture=architecture)
    result = run(sim, device, given, misalign=misalign)
    check(result, given)
    assert gradient_launch(device)["cluster"] == 1
    assert same_bits(result, run(sim, sim.Device(multiprocessors=8), given, misalign=misalign))


def test_values_of_finished_rows_do_not_leak(sim: Any) -> None:
    """Rows beyond the last token are zeros, although an infinite value lay there a few steps before."""
    given = operands((16 * 64 + 3, 64, 64), 16, BF16)
    given["lora_B"][:] = 0
    given["input"][:, 7] = torch.inf
    given["input"][-3:] = 0
    for cp in ("early", "late"):
        expected = run(sim, sim.Device(multiprocessors=1), given)
        assert same_bits(run(sim, on_hopper(sim, multiprocessors=1, cp=cp), given), expected)
