# SPDX-License-Identifier: Apache-2.0
"""How a peer is timed and its memory counted: warm-ups, shuffled interleaved rounds, per-round ratios, an A/A pair.

Knows nothing of what runs: a case is a name and a callable, and the device whose time counts. README.md says in words
what each number counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import random
import resource
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import lors_cuda

CPU = torch.device("cpu")
AGAIN = "_again"  # suffix of the baseline's twin, whose ratio is the noise of the run


@dataclass(frozen=True)
class Protocol:
    """How long to measure. The defaults are those of a reported number; `quick` only shows that everything runs."""

    rounds: int = 15
    min_rounds: int = 3  # measured even where one call exceeds the budget
    warmups: int = 20
    min_seconds: float = 0.005  # timed work per round: short calls are repeated
    budget_seconds: float = 30.0  # per peer; a peer leaves the rounds once it has spent this
    seed: int = 0

    @classmethod
    def quick(cls) -> Protocol:
        return cls(rounds=3, min_rounds=1, warmups=1, min_seconds=0.0005, budget_seconds=5.0)


@dataclass
class Timing:
    """The rounds of one case. `seconds[i]` is the mean of `repetitions` calls in the case's i-th round."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # baseline seconds / own seconds of the same round
    faults: list[float] = field(default_factory=list)  # minor page faults of a call, the mean of the round's
    repetitions: int = 1
    warmups: int = 0
    rounds_wanted: int = 0

    def row(self) -> dict[str, Any]:
        """The timing part of a JSON row: raw times, their quantiles, and those of the per-round ratios."""
        return {
            "seconds": summary(self.seconds),
            "ratio": summary(self.ratios),
            "page_faults": quantile(self.faults, 0.5) if self.faults else None,
            "rounds": len(self.seconds),
            "ratio_rounds": len(self.ratios),
            "rounds_wanted": self.rounds_wanted,
            "repetitions": self.repetitions,
            "warmups": self.warmups,
            "raw_seconds": self.seconds,
            "raw_ratios": self.ratios,
        }


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile with linear interpolation between neighbours; `values` must not be empty."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summary(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": quantile(values, 0.5), "p20": quantile(values, 0.2), "p80": quantile(values, 0.8)}


# --- time -------------------------------------------------------------------------------------------------------------


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Python's collector would strike at random inside somebody's round."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def call_seconds(run: Callable[[], object], repetitions: int, device: torch.device = CPU) -> float:
    """Mean seconds of one call: by the clock, or on a GPU between two events of its own, queued around all of them.

    Calls are queued one after another without waiting, so where Python is slower than the GPU, Python's time counts.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repetitions):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repetitions
    start = perf_counter()
    for _ in range(repetitions):
        run()
    return (perf_counter() - start) / repetitions


def page_faults() -> int:
    """Minor page faults of this process so far: pages that it wrote to for the first time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _warm_up(run: Callable[[], object], protocol: Protocol, device: torch.device = CPU) -> tuple[int, int]:
    """Calls made, and repetitions that fill `min_seconds`; slow peers get fewer warm-ups, never none."""
    spent, fastest, calls = 0.0, math.inf, 0
    while calls < max(protocol.warmups, 1):
        seconds = call_seconds(run, 1, device)
        calls += 1
        spent += seconds
        fastest = min(fastest, seconds)
        if spent > protocol.budget_seconds / 5:
            break
    repetitions = max(1, math.ceil(protocol.min_seconds / fastest))
    if device.type == "cuda" and repetitions > 1:
        # A call by itself also waits for the GPU to take it up; in a row they are faster, and more of them are needed.
        calls += repetitions
        repetitions = max(1, math.ceil(protocol.min_seconds / call_seconds(run, repetitions, device)))
    return calls, repetitions


def measure(
    cases: Mapping[str, Callable[[], object]],
    protocol: Protocol,
    *,
    baseline: str,
    device: torch.device = CPU,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time the cases in shuffled, interleaved rounds, with ratios to `baseline` taken round by round.

    The baseline runs twice in every round; its twin is returned as `baseline + AGAIN`. A case that has spent its budget
    leaves after `min_rounds`, so that a round's times are always taken next to each other; its `rounds` says how many.
    """
    runs = {**cases, baseline + AGAIN: cases[baseline]}
    timings: dict[str, Timing] = {}
    spent = dict.fromkeys(runs, 0.0)
    with _without_garbage_collection():
        for name, run in runs.items():
            if progress:
                progress(f"warm-up {name}")
            calls, repetitions = _warm_up(run, protocol, device)
            timings[name] = Timing(repetitions=repetitions, warmups=calls, rounds_wanted=protocol.rounds)
        # The twin must be timed exactly like the baseline.
        timings[baseline + AGAIN].repetitions = timings[baseline].repetitions
        shuffle = random.Random(protocol.seed)
        for index in range(protocol.rounds):
            order = [name for name in runs if index < protocol.min_rounds or spent[name] < protocol.budget_seconds]
            shuffle.shuffle(order)
            for name in order:
                if progress:
                    progress(f"round {index + 1}/{protocol.rounds} {name}")
                timing = timings[name]
                faults = page_faults()
                seconds = call_seconds(runs[name], timing.repetitions, device)
                timing.faults.append((page_faults() - faults) / timing.repetitions)
                timing.seconds.append(seconds)
                spent[name] += seconds * timing.repetitions
    for timing in timings.values():
        # Cases only ever leave, so the i-th times of two cases are of the same round.
        pairs = zip(timings[baseline].seconds, timing.seconds, strict=False)
        timing.ratios = [reference / own for reference, own in pairs]
    return timings


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], Tensor], arguments: Sequence[Tensor]) -> tuple[Tensor, dict[str, int]]:
    """Run a forward; its output, and the bytes autograd keeps for backward, each storage counted once.

    `saved` counts every storage kept; `saved_beyond_arguments` leaves out those of the arguments (the input, the
    weight, the adapters), which live on in any case.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    beyond = sum(size for pointer, size in kept.items() if pointer not in own)
    return output, {"saved": sum(kept.values()), "saved_beyond_arguments": beyond}


def peak_bytes(run: Callable[[], object], device: torch.device = CPU) -> dict[str, int | None]:
    """The memory peaks of one `run`, counted in two ways that should agree.

    `peak`: the most bytes alive at once of tensors allocated during the run, from the profiler's memory events. Sees
    every allocation through torch's CPU allocator, those of C++ ops included; not what a library takes from malloc.
    `peak_resident`: how far the process's resident memory rose, whoever allocated; None where the system does not tell.
    On a GPU `peak` comes from torch's caching allocator, which serves the ops of C++ too, and there is no other count.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return {"peak": torch.cuda.max_memory_allocated(device) - before, "peak_resident": None}
    lors_cuda.release_scratch()  # so that the run allocates it, and it counts
    # Kineto prints a line on stderr at every start and stop; the level is read when the first profile starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            resident = _run_with_resident_peak(run)
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    memory.sort(key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0)))
    alive = peak = 0
    for event in memory:
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return {"peak": peak, "peak_resident": resident}


def _run_with_resident_peak(run: Callable[[], object]) -> int | None:
    gc.collect()
    before = resident_bytes(trim=True)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak, VmHWM
    except OSError:  # not writable
        before = None
    result = run()
    peak = None if before is None else _status_bytes("VmHWM")
    del result
    return None if peak is None or before is None else max(0, peak - before)


def resident_bytes(*, trim: bool = False) -> int | None:
    """The process's resident memory; None where the system does not tell.

    Args:
        trim: first return the pages that the C library holds back, which it may hand out again.
    """
    if trim and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def minor_faults(run: Callable[[], object]) -> int:
    """Page faults of one call that needed no disk: pages of fresh memory, which the system hands out zeroed."""
    before = page_faults()
    run()
    return page_faults() - before


# --- error ------------------------------------------------------------------------------------------------------------


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element an op forgets to write shows in its error."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # To warn is enough for the fill. To insist would refuse cuBLAS unless set up otherwise than when it is timed.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected|| in float64; NaN anywhere in `value` gives NaN, a wrong shape an error."""
    if value.shape != expected.shape:
        raise ValueError(f"a result has shape {tuple(value.shape)}, its formula gives {tuple(expected.shape)}")
    norm = expected.norm()
    return float((value.double() - expected).norm() / norm) if norm else float(value.double().norm())


def last_level_cache_bytes(device: torch.device = CPU) -> int:
    """The GPU's L2, or the largest cache of the first core, as Linux reports it; 32 MiB where it does not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text and text[-1] in units and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=32 << 20)


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
