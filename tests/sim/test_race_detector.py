# SPDX-License-Identifier: Apache-2.0
"""The race detector against an oracle that remembers everything, on random programs.

Every thread of a program follows a script of accesses; barriers and __syncwarps are at the same place in the scripts
of all participants. Whether a program has a race does not depend on the order in which the threads run, so the detector
has to complain on every seed or on none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

READ_SHARED, WRITE_SHARED, READ_GLOBAL, WRITE_GLOBAL, ATOMIC_GLOBAL, BARRIER, SYNCWARP = range(1, 8)
WARP, BYTES = 32, 64


@dataclass(frozen=True)
class Access:
    op: int
    first: int
    width: int
    block: int
    thread: int
    phase: int  # barriers passed
    warp_phase: int  # __syncwarps of the warp passed

    def conflicts(self, other: Access) -> bool:
        shared = self.op <= WRITE_SHARED
        if shared != (other.op <= WRITE_SHARED) or (shared and self.block != other.block):
            return False
        if (self.block, self.thread) == (other.block, other.thread):
            return False
        if self.first + self.width <= other.first or other.first + other.width <= self.first:
            return False
        reads = (READ_SHARED, READ_GLOBAL)
        if self.op in reads and other.op in reads:
            return False
        return not self.op == other.op == ATOMIC_GLOBAL

    def ordered(self, other: Access) -> bool:
        if self.block != other.block:
            return False
        same_warp = self.thread // WARP == other.thread // WARP
        return self.phase != other.phase or (same_warp and self.warp_phase != other.warp_phase)


def program(seed: int, blocks: int, threads: int, steps: int, accesses: int) -> tuple[np.ndarray, list[Access]]:
    """Scripts [blocks * threads, steps], mostly empty, and the accesses in them."""
    random = np.random.default_rng(seed)
    script = np.zeros((blocks, threads, steps), dtype=np.uint32)
    for block, step in itertools.product(range(blocks), range(steps)):
        if random.random() < 0.15:
            script[block, :, step] = BARRIER
    for block, warp, step in itertools.product(range(blocks), range(threads // WARP), range(steps)):
        lanes = script[block, warp * WARP : (warp + 1) * WARP, step]
        if lanes[0] == 0 and random.random() < 0.3:
            lanes[:] = SYNCWARP
    for _ in range(accesses):
        block, thread, step = random.integers(blocks), random.integers(threads), random.integers(steps)
        if script[block, thread, step] == 0:
            op = random.choice([READ_SHARED, READ_SHARED, WRITE_SHARED, READ_GLOBAL, READ_GLOBAL, WRITE_GLOBAL])
            width = random.choice([1, 2, 4])
            if op == WRITE_GLOBAL and random.random() < 0.5:
                op, width = ATOMIC_GLOBAL, 4
            offset = random.integers(BYTES // width) * width
            script[block, thread, step] = op | width << 4 | offset << 8
    found = []
    for block, thread in itertools.product(range(blocks), range(threads)):
        phase = warp_phase = 0
        for word in script[block, thread]:
            op, width, first = int(word & 15), int(word >> 4 & 15), int(word >> 8)
            phase += op == BARRIER
            warp_phase += op == SYNCWARP
            if READ_SHARED <= op <= ATOMIC_GLOBAL:
                found.append(Access(op, first, width, block, thread, phase, warp_phase))
    return script.reshape(blocks * threads, steps), found


def has_race(accesses: list[Access]) -> bool:
    return any(a.conflicts(b) and not a.ordered(b) for a, b in itertools.combinations(accesses, 2))


def complains(sim: Any, script: np.ndarray, blocks: int, seed: int) -> bool:
    device = sim.Device(seed=seed)
    given = {"input": device.upload("in", script), "output": device.empty("out", BYTES), "n": script.shape[1]}
    try:
        sim.selftest(device, "scripted", blocks=blocks, threads=len(script) // blocks, shared_bytes=BYTES, **given)
    except sim.SimError as error:
        if "race: " not in str(error):
            raise
        return True
    return False


# As many accesses as make about every second program race.
@pytest.mark.parametrize(("blocks", "threads", "accesses"), [(1, 32, 24), (1, 64, 16), (1, 96, 14), (3, 32, 12)])
def test_detector_agrees_with_the_oracle(race_sim, blocks, threads, accesses):
    verdicts = []
    for seed in range(100):
        script, found = program(seed, blocks, threads, 10, accesses)
        want = has_race(found)
        verdicts.append(want)
        for order in range(4):
            assert complains(race_sim, script, blocks, order) == want, (seed, order)
    assert 0.2 < np.mean(verdicts) < 0.8  # both kinds were tried


def test_an_atomic_does_not_hide_a_read(race_sim):
    # Found by a longer search: a read, an atomic ordered after it, and another block's atomic.
    script, found = program(1646, 3, 32, 10, 16)
    assert has_race(found)
    assert complains(race_sim, script, 3, 0)
