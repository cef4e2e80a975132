# SPDX-License-Identifier: Apache-2.0
"""The simulator itself: it has to catch what is wrong, let pass what is right, and count correctly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lors_sim

WORDS = np.arange(4096, dtype=np.uint32)
NAN_WORD = 0xFFFFFFFF


def run(
    sim: Any, kernel: str, *, words: int = 4096, misalign: int = 0, device: dict | None = None, **launch: Any
) -> Any:
    """Launch a self-test kernel on a new device; returns (output words, the kernel's counters)."""
    on = sim.Device(**(device or {}))
    source = on.upload("in", WORDS[:words], misalign=misalign)
    target = on.empty("out", 4 * words, misalign=misalign)
    sim.selftest(on, kernel, input=source, output=target, **launch)
    return on.download(target).view(np.uint32), on.stats()[kernel]


def refused(sim: Any, match: str, kernel: str, **launch: Any) -> str:
    with pytest.raises(sim.SimError, match=match) as info:
        run(sim, kernel, **launch)
    return str(info.value)


# ---- rendezvous -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_divergent_collectives_are_refused(sim, seed):
    refused(sim, "divergent warp", "divergent_collective", device={"seed": seed})


def test_collective_that_some_lanes_never_reach(sim):
    text = refused(sim, "deadlock", "collective_in_branch")
    assert "threads 0 to 15: __ballot_sync at selftest.cu:" in text
    assert "threads 16 to 31: ended" in text


def test_barrier_that_some_threads_never_reach(sim):
    text = refused(sim, "deadlock", "barrier_in_branch", threads=64)
    assert "threads 0 to 31: __syncthreads" in text


def test_two_barriers_are_not_one(sim):
    refused(sim, "__syncthreads here, while thread", "two_barriers", threads=64)


def test_blocks_warps_and_atomics(sim, race_sim):
    for flavour in (sim, race_sim):
        on = flavour.Device()
        out = on.upload("out", np.zeros(1, np.uint32))
        source = on.upload("in", WORDS[:1024])
        flavour.selftest(on, "reduce", input=source, output=out, blocks=4, threads=256)
        assert on.download(out)[0] == WORDS[:1024].sum()
        assert on.stats()["reduce"]["shuffles"] == 5 * 32
        assert on.stats()["reduce"]["atomics"] == 32


# ---- shared memory --------------------------------------------------------------------------------------------------


def test_missing_barrier(sim, race_sim):
    shared = {"threads": 64, "shared_bytes": 256}
    right = np.roll(WORDS[:64], -1)
    out, _ = run(race_sim, "neighbour", n=1, **shared)
    assert (out[:64] == right).all()
    # Without the detector the poison shows in a random order, but may not in every one.
    wrong = [(run(sim, "neighbour", n=0, device={"seed": s}, **shared)[0][:64] != right).any() for s in range(10)]
    assert all(wrong)
    refused(race_sim, "race: |has not written", "neighbour", n=0, **shared)


def test_syncwarp_orders_a_warp_but_not_a_block(race_sim):
    out, _ = run(race_sim, "neighbour", n=2, threads=32, shared_bytes=128)
    assert (out[:32] == np.roll(WORDS[:32], -1)).all()
    refused(race_sim, "race: |has not written", "neighbour", n=2, threads=64, shared_bytes=256)


@pytest.mark.parametrize("seed", range(5))
def test_buffer_reused_without_a_barrier(race_sim, seed):
    run(race_sim, "reuse", n=1, threads=64, shared_bytes=256, device={"seed": seed})
    refused(race_sim, "race: ", "reuse", n=0, threads=64, shared_bytes=256, device={"seed": seed})


def test_uninitialised_shared_memory(sim, race_sim):
    out, _ = run(sim, "uninitialised", shared_bytes=128)
    assert (out[:32] == NAN_WORD).all()
    refused(race_sim, "has not written", "uninitialised", shared_bytes=128)


@pytest.mark.parametrize("n", [1, -32, 1 << 20])
def test_shared_memory_has_an_exact_length(sim, n):
    refused(sim, "shared", "shared_at", n=n, shared_bytes=128)


# ---- asynchronous copies --------------------------------------------------------------------------------------------


def test_right_copies(sim, race_sim):
    want = np.roll(WORDS[:256].reshape(64, 4), -1, axis=0).ravel()
    for cp in ("early", "late", "random"):
        for flavour in (sim, race_sim):
            out, stats = run(flavour, "copies", n=0, threads=64, shared_bytes=1024, device={"cp": cp})
            assert (out[:256] == want).all()
            assert stats["copy_bytes"] == 1024
            assert stats["copy_requests"] == 2


def test_copy_that_is_never_waited_for(sim):
    for n in (1, 4):
        for cp in ("early", "late"):
            refused(sim, "without waiting for this cp.async", "copies", n=n, shared_bytes=512, device={"cp": cp})


def test_wait_that_is_too_weak(sim, race_sim):
    out, _ = run(sim, "copies", n=2, shared_bytes=512, device={"cp": "late"})
    assert (out[:128] == NAN_WORD).all()
    for cp in ("early", "late"):
        refused(race_sim, "has not been waited for", "copies", n=2, shared_bytes=512, device={"cp": cp})


def test_wait_without_a_barrier(race_sim):
    refused(race_sim, "race: |has not been waited for|has not written", "copies", n=3, threads=64, shared_bytes=1024)


def test_copy_over_bytes_that_others_read(race_sim):
    refused(race_sim, "race: |has not been waited for", "copy_over_readers", threads=64, shared_bytes=256)


# ---- global memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 40, -1])
def test_global_memory_has_an_exact_length(sim, n):
    text = refused(sim, "global read of 4 bytes: .*out of bounds|in no buffer", "read_at", n=n, words=32)
    assert "selftest.cu:" in text
    assert "block (0,0,0) thread (" in text
    refused(sim, "global write of 4 bytes: .*out of bounds", "write_at", n=n, words=32)


def test_misaligned_access(sim):
    run(sim, "read_vector_at", n=4)
    refused(sim, "misaligned: the address is a multiple of 4 only", "read_vector_at", n=1)
    refused(sim, "misaligned: the address is a multiple of 8 only", "read_vector_at", n=0, misalign=8)


def test_blocks_race_on_global_memory(race_sim):
    refused(race_sim, "another block wrote .*in the same launch", "same_words", n=0, blocks=2)
    run(race_sim, "same_words", n=1, blocks=2)
    run(race_sim, "same_words", n=0, blocks=1)
    run(race_sim, "bytes", blocks=3, threads=7)
    for seed in range(5):
        refused(race_sim, "race: ", "read_what_another_writes", blocks=3, device={"seed": seed})


def test_launches_are_ordered(race_sim):
    on = race_sim.Device()
    out = on.empty("out", 128)
    for _ in range(2):
        race_sim.selftest(on, "same_words", input=out, output=out, n=0, blocks=1)


def test_load_global_once_of_bytes_that_the_kernel_writes(race_sim):
    refused(race_sim, "load_global_once", "once_and_written")


def test_released_memory_and_missing_devices(sim):
    on, other = sim.Device(), sim.Device()
    foreign = other.empty("foreign", 128)
    with pytest.raises(sim.SimError, match="not device memory"):
        sim.selftest(on, "read_at", input=foreign, output=foreign)
    with pytest.raises(sim.SimError, match="not device memory"):
        sim.selftest(on, "read_at", input=None, output=None)
    with pytest.raises(sim.StatusError, match="could not launch read_at: more threads"):
        sim.selftest(on, "read_at", input=None, output=None, threads=1056)
    with pytest.raises(sim.StatusError, match="more shared memory"):
        sim.selftest(on, "read_at", input=None, output=None, shared_bytes=1 << 20)
    with pytest.raises(sim.StatusError, match="no self-test kernel"):
        sim.selftest(on, "nothing", input=None, output=None)


def test_huge_buffers_cost_what_is_touched(sim):
    on = sim.Device(sample_blocks=2)
    words = 3 << 31  # 24 GB
    huge = on.empty("huge", 4 * words, sparse=True)
    tail = 4 * (words - 4096)
    on.write(huge, tail, WORDS)
    out = on.empty("out", 128)
    sim.selftest(on, "read_at", input=huge + tail, output=out, n=4064)
    assert (on.download(out).view(np.uint32) == WORDS[-32:]).all()
    with pytest.raises(sim.SimError, match="out of bounds"):
        sim.selftest(on, "read_at", input=huge + tail, output=out, n=4065)


def test_sample_blocks(sim):
    out, stats = run(sim, "copy_vectors", blocks=30, device={"sample_blocks": 3})
    assert stats["blocks"] == 5
    written = (out.reshape(-1, 128)[:30] != NAN_WORD).all(axis=1)
    assert written.sum() == 5
    assert written[0]
    assert written[29]


# ---- past ptx.h -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "where"),
    [
        ("raw_global_read", "global"),
        ("raw_global_write", "global"),
        ("raw_shared_write", "shared"),
        ("raw_struct_copy", "global"),
    ],
)
def test_raw_accesses(sim, kernel, where):
    for _ in range(3):  # and the process survives
        refused(sim, f"raw access to {where} memory", kernel, shared_bytes=128)
    run(sim, "copy_vectors")


def test_stack_overflow_is_reported(sim):
    refused(sim, "stack overflow", "deep_recursion", n=100)


def test_asan_flavour():
    here = f"{__file__}:"
    assert lors_sim.run_case("asan", here + "asan_right").passed
    for kernel, n, report in (
        ("local_array", 4, "index 4 out of bounds|stack-buffer-overflow"),
        ("shift_too_far", 33, "shift exponent 33"),
    ):
        outcome = lors_sim.run_case("asan", here + "asan_wrong", {"kernel": kernel, "n": n})
        assert not outcome.passed
        assert any(text in outcome.text for text in report.split("|")), outcome.text
    outcome = lors_sim.run_case("asan", here + "asan_wrong", {"kernel": "raw_global_write", "n": 0})
    assert not outcome.passed
    assert "raw access to global memory" in outcome.text


def asan_right(sim):
    run(sim, "local_array", n=3)
    run(sim, "shift_too_far", n=31)
    run(sim, "reduce", blocks=4, threads=256)
    run(sim, "copies", n=0, threads=64, shared_bytes=1024)
    # Errors are exceptions here too, and abandoned stacks can be used again.
    for _ in range(3):
        for kernel in ("barrier_in_branch", "divergent_collective", "two_barriers"):
            try:
                run(sim, kernel, threads=64)
            except sim.SimError:
                continue
            raise AssertionError(kernel)


def asan_wrong(sim, kernel, n):
    run(sim, kernel, n=n)


# ---- counters -------------------------------------------------------------------------------------------------------


def test_coalesced_vectors(sim):
    _, stats = run(sim, "copy_vectors", blocks=2, threads=64)
    assert stats["global_load_requests"] == stats["global_store_requests"] == 4
    assert stats["global_sectors_read"] == stats["global_sectors_written"] == 2 * 64 * 16 // 32
    assert stats["global_bytes_read"] == stats["global_bytes_written"] == 2 * 64 * 16
    assert stats["loads_by_width"] == {1: 0, 2: 0, 4: 0, 8: 0, 16: 128}
    assert stats["buffers"]["in"]["sectors_read"] == stats["buffers"]["in"]["unique_sectors_read"] == 64
    assert stats["buffers"]["in"]["sectors_written"] == 0
    assert stats["buffers"]["out"]["unique_sectors_written"] == 64


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (16, 32)])
def test_strided_words(sim, stride, sectors):
    _, stats = run(sim, "copy_strided", n=stride, threads=64)
    assert stats["global_sectors_read"] == stats["global_sectors_written"] == 2 * sectors
    assert stats["loads_by_width"][4] == 64


def test_misaligned_words_touch_one_sector_more(sim):
    _, stats = run(sim, "copy_strided", n=1, misalign=4)
    assert stats["global_sectors_read"] == 5


def test_sectors_read_again_are_not_unique(sim):
    on = sim.Device()
    source, target = on.upload("in", WORDS), on.empty("out", 4 * 4096)
    for _ in range(2):
        sim.selftest(on, "read_at", input=source, output=target, threads=64)
    in_each = [launch["buffers"]["in"]["unique_sectors_read"] for launch in on.launches()]
    assert in_each == [8, 8]
    assert on.stats()["read_at"]["launches"] == 2
    on.reset_stats()
    assert on.stats() == {}


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 0), (2, 1), (8, 7), (32, 31), (33, 0), (0, 0)])
def test_bank_conflicts_of_words(sim, race_sim, stride, conflicts):
    # Stride 0 is a race between the lanes' stores; only the plain flavour lets it run.
    _, stats = run(sim if stride == 0 else race_sim, "shared_strided", n=stride, shared_bytes=8192)
    assert stats["shared_store_conflicts"] == stats["shared_load_conflicts"] == conflicts
    assert stats["shared_store_requests"] == stats["shared_load_requests"] == stats["barriers"] == 1


@pytest.mark.parametrize(("pitch", "conflicts"), [(16, 0), (32, 4), (64, 12), (128, 28), (144, 0), (80, 0)])
def test_bank_conflicts_of_vectors_and_matrices(sim, pitch, conflicts):
    _, stats = run(sim, "shared_vectors", n=pitch, shared_bytes=8192)
    assert stats["shared_store_conflicts"] == stats["shared_load_conflicts"] == conflicts
    _, stats = run(sim, "matrix_rows", n=pitch, shared_bytes=8192)
    assert stats["ldmatrix_conflicts"] == conflicts
    assert stats["ldmatrix"] == stats["warp_syncs"] == 1


def test_lanes_that_loop_unevenly_share_requests(sim):
    for seed in range(5):
        _, stats = run(sim, "uneven_loop", device={"seed": seed})
        # Three rounds of the loop, then all lanes.
        assert stats["global_load_requests"] == 4
        assert stats["global_sectors_read"] == 16


def test_counting_can_be_switched_off(sim):
    _, stats = run(sim, "copy_vectors", device={"count": False})
    assert stats["global_sectors_read"] == 0


def test_random_order_is_repeatable(sim):
    results = []
    for seed in (1, 1, 2):
        on = sim.Device(seed=seed)
        out = on.upload("out", np.zeros(1, np.uint32))
        try:
            sim.selftest(on, "two_barriers", input=out, output=out, threads=64)
        except sim.SimError as e:
            results.append(str(e))
    assert results[0] == results[1]
