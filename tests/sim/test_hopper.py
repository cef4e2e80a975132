# SPDX-License-Identifier: Apache-2.0
"""Mbarriers, bulk copies, clusters and their shared memory on the simulator: right programs pass, wrong ones are named.

The race detector is compared with vector clocks in Python, on random programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

WORDS = np.arange(4096, dtype=np.uint32)
LANDINGS = ("early", "late", "random")
BULK = [
    "right",
    "no_fence",
    "no_wait",
    "expect_more",
    "expect_less",
    "earlier_phase",
    "later_phase",
    "misaligned_source",
    "misaligned_target",
    "odd_size",
    "no_barrier_after_init",
    "arrive_twice",
    "store_over_mbarrier",
    "copy_over_readers",
    "copy_over_stores",
    "past_shared",
    "past_global",
    "no_init",
    "init_twice",
]
ACROSS = [
    "added",
    "no_first_barrier",
    "no_last_barrier",
    "arrive_twice",
    "wait_without_arrive",
    "rank_too_large",
    "misaligned_read",
    "written_after_arrive",
    "pushed",
    "pushed_at_once",
    "pushed_unordered",
    "ended_in_barrier",
    "divergent_arrive",
]


def run(sim: Any, kernel: str, n: int, device: dict[str, Any] | None = None, **launch: Any) -> tuple[np.ndarray, dict]:
    on = sim.Device(**{"architecture": 90, **(device or {})})
    source, target = on.upload("in", WORDS), on.empty("out", 4 * 4096)
    sim.selftest(on, kernel, input=source, output=target, n=n, **launch)
    return on.download(target).view(np.uint32), on.stats()[kernel]


def bulk(sim: Any, what: str, **device: Any) -> tuple[np.ndarray, dict]:
    return run(sim, "bulk_copies", BULK.index(what), device, threads=64, shared_bytes=520)


def across(sim: Any, what: str, cluster: int = 4, blocks: int = 8, **device: Any) -> np.ndarray:
    out, stats = run(
        sim, "across_cluster", ACROSS.index(what), device, blocks=blocks, cluster=cluster, threads=64, shared_bytes=1024
    )
    assert stats["blocks"] == blocks
    return out[: 256 * blocks].view(np.float32).reshape(blocks, 256)


# ---- mbarriers and bulk copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cp", LANDINGS)
def test_bulk_copies(sim: Any, race_sim: Any, cp: str) -> None:
    for flavour in (sim, race_sim):
        for seed in range(5):
            out, stats = bulk(flavour, "right", cp=cp, seed=seed)
            assert (out[:128] == WORDS[:128]).all()
            assert stats["bulk_copies"] == 2
            assert stats["bulk_bytes"] == stats["buffers"]["in"]["bytes_read"] == 512
            assert stats["buffers"]["in"]["sectors_read"] == stats["buffers"]["in"]["unique_sectors_read"] == 16


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no_fence", "its initialisation needs fence_mbarrier_init"),
        ("no_wait", "nobody has waited for the mbarrier of this bulk copy"),
        ("expect_more", "deadlock(.|\n)*at byte 512: phase 0, 0 of 1 arrivals and 16 announced bytes missing"),
        ("expect_less", "expect_tx announced fewer bytes|256 bytes more than expect_tx announced"),
        (
            "earlier_phase",
            "nobody has waited for the mbarrier of this bulk copy|deadlock(.|\n)*phase 1, 1 of 1 arrivals",
        ),
        ("later_phase", "deadlock(.|\n)*an mbarrier at selftest.cu:.* byte 512: phase 1, 1 of 1 arrivals"),
        ("misaligned_source", "a bulk copy in units of 16 bytes, misaligned: the address is a multiple of 8 only"),
        ("misaligned_target", "a bulk copy to shared memory of 16 bytes, misaligned"),
        ("odd_size", "a bulk copy of 248 bytes: a multiple of 16"),
        ("arrive_twice", "one more arrival at an mbarrier than its count, 1, in one phase"),
        ("store_over_mbarrier", "which holds an mbarrier"),
        ("past_shared", "a bulk copy to shared memory out of bounds"),
        ("past_global", "a bulk copy of 256 bytes: out of bounds"),
        ("no_init", "holds no mbarrier that is initialised"),
        ("init_twice", "which holds an mbarrier"),
    ],
)
def test_mistakes_with_bulk_copies(sim: Any, race_sim: Any, what: str, sentence: str) -> None:
    for flavour in (sim, race_sim):
        for seed, cp in enumerate(LANDINGS):
            with pytest.raises(flavour.SimError, match=f"{sentence}|race: |has not written") as raised:
                bulk(flavour, what, seed=seed, cp=cp)
            if flavour is sim:
                assert "race: " not in str(raised.value)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no_wait", "bulk copy at selftest.cu:.* writes, and its mbarrier has not been waited for|has not written"),
        (
            "earlier_phase",
            "bulk copy at selftest.cu:.* writes, and its mbarrier has not been waited for|has not written",
        ),
        ("no_barrier_after_init", "race: |has not written|holds no mbarrier"),
        ("copy_over_readers", "race: |needs a fence.proxy.async"),
        ("copy_over_stores", "needs a fence.proxy.async"),
    ],
)
def test_races_with_bulk_copies(race_sim: Any, what: str, sentence: str) -> None:
    for seed in range(6):
        with pytest.raises(race_sim.SimError, match=sentence):
            bulk(race_sim, what, seed=seed, cp=LANDINGS[seed % 3])


def test_destination_in_flight_is_poisoned(sim: Any) -> None:
    seen = []
    for what, cp in (("no_wait", "late"), ("earlier_phase", "late")):
        on = sim.Device(architecture=90, cp=cp)
        target = on.empty("out", 4 * 4096)
        with pytest.raises(sim.SimError):
            sim.selftest(
                on,
                "bulk_copies",
                input=on.upload("in", WORDS),
                output=target,
                n=BULK.index(what),
                threads=64,
                shared_bytes=520,
            )
        seen.append(on.download(target).view(np.uint32)[:128])
    assert all((words == 0xFFFFFFFF).all() for words in seen)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_pipeline_of_bulk_copies(sim: Any, race_sim: Any, stages: int) -> None:
    shared = {"threads": 64, "shared_bytes": 264 * stages}
    want = np.roll(WORDS[:640].reshape(10, 64), -1, axis=1).sum(axis=0)
    for flavour in (sim, race_sim):
        for seed, cp in enumerate(LANDINGS):
            out, stats = run(flavour, "bulk_pipeline", stages, {"seed": seed, "cp": cp, "preempt": 0.05}, **shared)
            assert (out[:64] == want).all()
            assert stats["bulk_copies"] == 10
    for seed, cp in enumerate(LANDINGS):
        with pytest.raises(race_sim.SimError, match=r"race: |deadlock"):
            run(race_sim, "bulk_pipeline", stages + 16, {"seed": seed, "cp": cp}, **shared)
        with pytest.raises(race_sim.SimError, match=r"race: |deadlock|one more arrival|nobody has waited"):
            run(race_sim, "bulk_pipeline", stages + 32, {"seed": seed, "cp": cp}, **shared)


# ---- clusters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("what", ["added", "pushed"])
def test_shared_memory_of_a_cluster(sim: Any, race_sim: Any, what: str, cluster: int) -> None:
    each = WORDS[: 256 * cluster].astype(np.float32).reshape(cluster, 256)
    want = (
        np.tile(each.sum(axis=0), (8, 1)) if what == "added" else np.tile(np.roll(each, 1, axis=0), (8 // cluster, 1))
    )
    for flavour in (sim, race_sim):
        for seed in range(4):
            assert (across(flavour, what, cluster, seed=seed) == want).all()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no_first_barrier", "of which nothing says that it has started|which has ended"),
        ("arrive_twice", "arrives at the barrier of its cluster twice"),
        ("wait_without_arrive", "without having arrived at it"),
        ("rank_too_large", "mapa to block 4 of a cluster of 4"),
        ("misaligned_read", "read of 16 bytes, misaligned"),
        ("pushed_at_once", "of which nothing says that it has started"),
        ("ended_in_barrier", "ended between arrive and wait of a barrier of the cluster"),
        ("divergent_arrive", "divergent warp"),
        ("no_last_barrier", "may have ended before this access to its shared memory|which has ended"),
    ],
)
def test_mistakes_in_clusters(sim: Any, race_sim: Any, what: str, sentence: str) -> None:
    for flavour in (sim, race_sim):
        for seed in range(6):
            with pytest.raises(flavour.SimError, match=sentence):
                across(flavour, what, seed=seed)


@pytest.mark.parametrize("what", ["written_after_arrive", "pushed_unordered"])
def test_races_in_clusters(race_sim: Any, what: str) -> None:
    for seed in range(6):
        with pytest.raises(race_sim.SimError, match=r"race: |has not written"):
            across(race_sim, what, seed=seed)


def test_what_cuda_refuses_of_clusters(sim: Any) -> None:
    with pytest.raises(sim.StatusError, match="a grid that is not a whole number of clusters"):
        across(sim, "added", cluster=4, blocks=6)
    with pytest.raises(sim.StatusError, match="more blocks than a cluster may have"):
        across(sim, "added", cluster=16, blocks=16)
    with pytest.raises(sim.StatusError, match="a cluster on a device without clusters"):
        across(sim, "added", architecture=80)


# ---- the race detector against vector clocks ------------------------------------------------------------------------

(READ, WRITE, READ_CLUSTER, WRITE_CLUSTER, READ_GLOBAL, WRITE_GLOBAL, ARRIVE, WAIT, CLUSTER_ARRIVE, CLUSTER_WAIT) = (
    range(1, 11)
)
BARRIER, SYNCWARP = 11, 12
STEPS, BYTES = 12, 64


def program(seed: int, blocks: int, threads: int, accesses: int) -> np.ndarray:
    """Scripts [blocks, threads, STEPS] in which nobody waits for ever: arrivals come at earlier steps than waits."""
    random = np.random.default_rng(seed)
    script = np.zeros((blocks, threads, STEPS), dtype=np.uint32)
    if random.random() < 0.6:
        arrive, wait = sorted(random.choice(np.arange(1, STEPS), 2, replace=False))
        script[:, :, arrive], script[:, :, wait] = CLUSTER_ARRIVE, CLUSTER_WAIT
    for block, step in np.ndindex(blocks, STEPS):
        if step and (script[block, :, step] == 0).all() and random.random() < 0.06:
            script[block, :, step] = BARRIER
    for block, warp, step in np.ndindex(blocks, threads // 32, STEPS):
        lanes = script[block, 32 * warp : 32 * warp + 32, step]
        if step and (lanes == 0).all() and random.random() < 0.1:
            lanes[:] = SYNCWARP
    for block in range(blocks):
        cut = random.integers(2, STEPS)
        for _ in range(random.integers(5)):
            thread, step = random.integers(threads), random.integers(1, cut)
            if script[block, thread, step] == 0:
                script[block, thread, step] = ARRIVE
        for _ in range(random.integers(6)):
            thread, step = random.integers(threads), random.integers(cut, STEPS)
            if script[block, thread, step] == 0 and (script[block] == ARRIVE).any():
                script[block, thread, step] = WAIT
        script[block, 0, 0] = (script[block] == ARRIVE).sum()
    for _ in range(accesses):
        block, step = random.integers(blocks), random.integers(1, STEPS)
        # Often one that synchronises by an mbarrier, which few do.
        known = np.flatnonzero(((script[block] == ARRIVE) | (script[block] == WAIT)).any(axis=1))
        thread = random.choice(known) if len(known) and random.random() < 0.6 else random.integers(threads)
        if script[block, thread, step] == 0:
            op = random.choice(
                [READ, READ, WRITE, READ_CLUSTER, READ_CLUSTER, WRITE_CLUSTER, READ_GLOBAL, WRITE_GLOBAL]
            )
            width = 16 if op in (READ_CLUSTER, WRITE_CLUSTER) else 4
            offset = random.integers(BYTES // width) * width
            script[block, thread, step] = op | random.integers(blocks) << 4 | offset << 8
    return script


def has_race(script: np.ndarray) -> bool:
    """By a vector clock for each thread; steps in their order are an order in which the program can run."""
    blocks, threads, steps = script.shape
    clocks = np.zeros((blocks * threads, blocks * threads), dtype=int)
    mbarriers, cluster = np.zeros((blocks, blocks * threads), dtype=int), np.zeros(blocks * threads, dtype=int)
    done: dict[tuple, list[tuple[int, int, bool]]] = {}

    def meet(of: Sequence[int] | range) -> None:
        clocks[of] = clocks[of].max(axis=0)

    for step in range(1, steps):
        for block in range(blocks):
            first = block * threads
            if script[block, 0, step] == BARRIER:
                meet(range(first, first + threads))
            for warp in range(0, threads, 32):
                if script[block, warp, step] == SYNCWARP:
                    meet(range(first + warp, first + warp + 32))
        cluster = np.maximum(cluster, clocks.max(axis=0)) if script[0, 0, step] == CLUSTER_ARRIVE else cluster
        if script[0, 0, step] == CLUSTER_WAIT:
            clocks[:] = np.maximum(clocks, cluster)
        for block, thread in np.ndindex(blocks, threads):
            me, word = block * threads + thread, int(script[block, thread, step])
            op, rank, offset = word & 15, word >> 4 & 15, word >> 8
            if op == ARRIVE:
                mbarriers[block] = np.maximum(mbarriers[block], clocks[me])
            if op == WAIT:
                clocks[me] = np.maximum(clocks[me], mbarriers[block])
            if op == 0 or op > WRITE_GLOBAL:
                continue
            clocks[me, me] += 1
            where = "global" if op >= READ_GLOBAL else rank if op >= READ_CLUSTER else block
            writes = op in (WRITE, WRITE_CLUSTER, WRITE_GLOBAL)
            for byte in range(offset, offset + (16 if op in (READ_CLUSTER, WRITE_CLUSTER) else 4), 4):
                for other, time, wrote in done.get((where, byte), []):
                    if (writes or wrote) and clocks[me, other] < time:
                        return True
                done.setdefault((where, byte), []).append((me, clocks[me, me], writes))
    return False


def complains(sim: Any, script: np.ndarray, seed: int) -> bool:
    blocks, threads, steps = script.shape
    on = sim.Device(seed=seed, architecture=90)
    given = {"input": on.upload("in", script.reshape(-1)), "output": on.empty("out", BYTES), "n": steps}
    try:
        sim.selftest(on, "scripted_cluster", blocks=blocks, cluster=blocks, threads=threads, shared_bytes=72, **given)
    except sim.SimError as error:
        if "race: " not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize(("blocks", "threads", "accesses"), [(1, 64, 12), (2, 32, 14), (3, 32, 12)])
def test_detector_agrees_with_vector_clocks(race_sim: Any, blocks: int, threads: int, accesses: int) -> None:
    verdicts = []
    for seed in range(100):
        script = program(seed, blocks, threads, accesses)
        want = has_race(script)
        verdicts.append(want)
        for order in range(3):
            assert complains(race_sim, script, order) == want, (seed, order)
    assert 0.2 < np.mean(verdicts) < 0.8  # both kinds were tried
