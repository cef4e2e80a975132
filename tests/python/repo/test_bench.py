# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own correctness: every peer against float64, the memory counters, the commands. Nothing is timed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[3] / "bench"


def load(name: str) -> ModuleType:
    """A module of bench/ under a name of its own; its folder on sys.path would shadow other modules for all tests."""
    spec = importlib.util.spec_from_file_location(f"lors_bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


peers = load("peers")
protocol = load("protocol")

EAGER = [name for name, peer in peers.PEERS.items() if not peer.compiled]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def problem_of(dtype: torch.dtype, tokens: int = 17):
    return peers.make_problem(tokens, (48, 80), 4, dtype, seed=7)


def errors(name: str, problem, formula: str | None = None) -> dict[str, float]:
    peer = peers.PEERS[name]
    results = peers.forward_backward(peer.make(), problem)
    expected = peers.truth(formula or peer.formula, problem)
    assert results.keys() == expected.keys()
    return {key: protocol.relative_error(results[key], expected[key]) for key in expected}


@DTYPES
@pytest.mark.parametrize("name", EAGER)
def test_peer_equals_its_formula(name: str, dtype: torch.dtype) -> None:
    for key, error in errors(name, problem_of(dtype)).items():
        assert error <= TOLERANCE[dtype], f"{name} {key}: {error}"


def test_compiled_peer_equals_its_formula() -> None:
    for key, error in errors("compiled", problem_of(torch.float32)).items():
        assert error <= TOLERANCE[torch.float32], f"{key}: {error}"


@pytest.mark.parametrize(("name", "other"), [("official", "exact"), ("lors_cuda", "exact"), ("sqft", "lors")])
def test_the_two_gradients_are_told_apart(name: str, other: str) -> None:
    found = errors(name, problem_of(torch.float64), other)
    assert found["output"] <= TOLERANCE[torch.float64]
    assert found["grad_input"] <= TOLERANCE[torch.float64]
    assert found["grad_lora_A"] > 0.1
    assert found["grad_lora_B"] > 0.1


@pytest.mark.parametrize("name", ["official", "official_upcast", "peft_lora", "lors_cuda"])
def test_peers_take_leading_dimensions(name: str) -> None:
    flat = problem_of(torch.float64, tokens=6)
    x = flat.input.detach().view(2, 3, -1).requires_grad_()
    output = peers.PEERS[name].make()(x, flat.weight, flat.lora_A, flat.lora_B, flat.scaling)
    (grad,) = torch.autograd.grad(output, x, flat.grad_output.view_as(output))
    expected = peers.truth(peers.PEERS[name].formula, flat)
    assert protocol.relative_error(output.detach().flatten(0, 1), expected["output"]) < 1e-13
    assert protocol.relative_error(grad.flatten(0, 1), expected["grad_input"]) < 1e-13


def saved(name: str, problem) -> dict[str, int]:
    function = peers.PEERS[name].make()
    arguments = [problem.input, problem.weight, problem.lora_A, problem.lora_B]
    _, sizes = protocol.saved_bytes(lambda: function(*problem.arguments()), arguments)
    return sizes


@pytest.mark.parametrize("name", ["official", "official_upcast", "lors_cuda", "lors_cuda_exact", "sqft_checkpointed"])
def test_recomputing_peers_keep_only_their_arguments(name: str) -> None:
    assert saved(name, problem_of(torch.float32))["saved_beyond_arguments"] == 0


def test_saved_bytes_counts_what_sqft_keeps() -> None:
    problem = problem_of(torch.float32)
    weights = problem.weight.numel()
    # The merged weight in float32 and the mask as bool; each once, though a tensor may be saved by several nodes.
    assert saved("sqft", problem)["saved_beyond_arguments"] == 5 * weights


def test_peak_counts_tensors_alive_together() -> None:
    def run() -> torch.Tensor:
        first = torch.ones(1 << 20)
        second = first + 1
        del first
        return second * second

    counted = protocol.peak_bytes(run)
    assert 0 <= counted["peak"] - 2 * (4 << 20) <= 64  # the scalar 1 is a tensor too
    resident = counted["peak_resident"]
    assert resident is None or resident >= 0.9 * counted["peak"]


def test_poisoned_memory_shows_unwritten_elements() -> None:
    with protocol.poisoned_memory():
        assert torch.empty(8).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert math.isnan(protocol.relative_error(torch.full((2,), math.nan), torch.ones(2, dtype=torch.float64)))


def test_measure_interleaves_and_pairs_rounds() -> None:
    calls: list[str] = []
    cases = {name: (lambda n=name: calls.append(n)) for name in ("base", "other")}
    timings = protocol.measure(cases, protocol.Protocol(rounds=4, warmups=2, min_seconds=0.0), baseline="base")
    assert list(timings) == ["base", "other", "base_again"]
    assert all(len(timing.seconds) == len(timing.ratios) == 4 for timing in timings.values())
    assert timings["base"].ratios == [1.0] * 4
    rounds = calls[6:]
    assert [sorted(rounds[i : i + 3]) for i in range(0, 12, 3)] == [["base", "base", "other"]] * 4


def test_measure_stops_at_the_budget_but_not_before_min_rounds() -> None:
    limits = protocol.Protocol(rounds=50, min_rounds=3, budget_seconds=0.0, min_seconds=0.0)
    timings = protocol.measure({"base": lambda: None}, limits, baseline="base")
    row = timings["base_again"].row()
    assert (row["rounds"], row["ratio_rounds"], row["rounds_wanted"], row["warmups"]) == (3, 3, 50, 1)
    assert len(row["raw_seconds"]) == 3


def test_quantiles() -> None:
    assert protocol.summary([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "p20": 1.8, "p80": 4.2}
    assert protocol.summary([]) is None


def command_of(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=240, **more)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return command_of(sys.executable, *arguments)


def test_linear_quick_writes_json_that_plots(tmp_path: Path) -> None:
    output = tmp_path / "out" / "linear.json"
    names = ["lors_cuda", "lors_cuda_exact", "sqft", "frozen_linear"]
    options = ["--quick", "--shape", 24, 40, "--tokens", 5, "--rank", 3, "--merge", "--output", output]
    done = command(BENCH / "linear.py", *options, "--peers", *names)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    assert output.read_text().count("\n") == len(document["rows"]) + 7  # one line per row
    assert {"commit", "cpu_model", "threads", "torch", "lors_cuda", "date"} <= document["environment"].keys()
    assert document["protocol"]["rounds"] >= 1
    linear = [row for row in document["rows"] if row["benchmark"] == "linear"]
    expected = {"official", "official_again", *names}
    assert {(row["dtype"], row["peer"]) for row in linear} == {
        (d, p) for d in ("float32", "bfloat16") for p in expected
    }
    for row in linear:
        assert row["failed"] is None
        assert len(row["raw_seconds"]) == row["rounds"] >= 1
        assert min(row["raw_seconds"]) > 0
        assert row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"]
        assert max(row["error"].values()) <= TOLERANCE[getattr(torch, row["dtype"])]
        assert row["bytes"]["peak"] > 0
    merges = {(row["dtype"], row["peer"]): row for row in document["rows"] if row["benchmark"] == "merge"}
    assert merges["float32", "lors_cuda"]["masked_positive_zero"] is True
    assert merges["bfloat16", "clone"]["floor_bytes"] == 2 * (2 * 24 * 40 + 3 * (24 + 40))

    pytest.importorskip("matplotlib")
    drawn = command(BENCH / "plot.py", output)
    assert drawn.returncode == 0, drawn.stderr
    for name in ("linear.png", "linear-merge.png"):
        assert (output.parent / name).read_bytes().startswith(b"\x89PNG")


def test_decode_quick_writes_a_row_of_every_layout_and_state(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    done = command(BENCH / "decode.py", "--quick", "--dtype", "bfloat16", "--output", output)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    ours = {f"{state}_{layout}" for state in ("live", "cached", "frozen") for layout in ("dense", "2:4", "bitmap")}
    assert {(row["tokens"], row["peer"]) for row in rows} == {
        (tokens, peer) for tokens in (1, 2) for peer in {*ours, "torch_dense", "torch_dense_again"}
    }
    for row in rows:
        assert row["error"]["output"] <= TOLERANCE[torch.bfloat16]
        assert row["page_faults"] >= 0


def test_experts_quick_holds_every_peer_to_its_formula(tmp_path: Path) -> None:
    output = tmp_path / "experts.json"
    done = command(BENCH / "experts.py", "--quick", "--dtype", "float32", "--output", output)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    steps = {"peft", "peft_again", "sqft", "lors_cuda", "lors_cuda_24", "lors_cuda_bitmap"}
    cached = {f"lors_cuda{layout}_cached" for layout in ("", "_24", "_bitmap")}
    dense = {f"dense_{name}" for name in ("grouped_mm", "grouped_mm_again", "batched_mm", "eager")}
    wanted = {("experts", tokens, peer) for tokens in (1, 8) for peer in steps}
    wanted |= {("experts_forward", 1, peer) for peer in cached | dense}
    assert {(row["benchmark"], row["tokens"], row["peer"]) for row in rows} == wanted
    for row in rows:
        assert len(row["error"]) == (7 if row["benchmark"] == "experts" else 1)
        assert max(row["error"].values()) <= TOLERANCE[torch.float32], row
        assert row["of_fastest"]["median"] > 0
    sizes = {row["peer"]: row["bytes"]["weight"] for row in rows if row["tokens"] == 8}
    assert sizes["lors_cuda_24"] < 0.6 * sizes["peft"]


def test_measure_counts_the_page_faults_of_a_call() -> None:
    def touch() -> None:
        memory = mmap.mmap(-1, 100 * mmap.PAGESIZE)
        for page in range(100):
            memory[page * mmap.PAGESIZE] = 1

    limits = protocol.Protocol(rounds=3, min_rounds=3, min_seconds=0.001)
    timings = protocol.measure({"base": lambda: None, "touch": touch}, limits, baseline="base")
    assert timings["touch"].row()["page_faults"] >= 100 > timings["base"].row()["page_faults"]


def test_linear_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    done = command(BENCH / "linear.py", "--quick", "--rank", 1000)
    assert done.returncode == 2
    assert "--rank 1000 is larger than the smaller side of --shape" in done.stderr


# --- bench/gpu/run.sh, as far as it goes without a GPU ----------------------------------------------------------------

RUN = BENCH / "gpu" / "run.sh"
# In the place of Python: says that there is a GPU, answers for what is no part, and fails as every benchmark.
STAND_IN = f"""#!/bin/bash
case "$1" in
  *describe.py) echo '{{"architecture": "90a"}}' > "$2" ;;
  *summary.py | -c | -m) exec {sys.executable} "$@" ;;
  *check.py) while [ "$1" != --output ]; do shift; done; echo '{{"rows": []}}' > "$2"; exit 1 ;;
  *) echo "no CUDA here"; exit 1 ;;
esac
"""


@pytest.mark.parametrize("plan", ["first", "second"])
def test_plans_fit_and_every_part_is_known(plan: str) -> None:
    done = command_of("bash", RUN, "--dry-run", plan)
    assert done.returncode == 0
    limits = dict(re.findall(r"^(\w+) +at most +(\d+) s", done.stdout, re.MULTILINE))
    assert "build" in limits
    assert sum(map(int, limits.values())) <= 540
    script = RUN.read_text()
    for name in limits:
        assert re.search(rf"^    (\w+ \| )*{name}( \| \w+)*\)", script, re.MULTILINE), f"run.sh has no part {name}"


def test_what_a_run_found_comes_back_whatever_fails(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in), "LORS_GPU_WORK": str(tmp_path / "work")}
    done = command_of("bash", RUN, "first", tmp_path / "out", "core", "check", "host", env=environment)
    assert done.returncode == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first.tar.gz"]
    with tarfile.open(tmp_path / "out" / "first.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        assert {"machine.json", "log.txt", "check.json", "summary.json", "summary.txt"} <= names
        summary = archive.extractfile("first/summary.json")
        assert summary is not None
        parts = {part["part"]: part["status"] for part in json.load(summary)}
    assert parts == {"core": "skipped", "check": "failed (1)", "host": "failed (1)"}


def test_a_machine_without_a_gpu_is_described(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = {**os.environ, "PYTHON": sys.executable, "LORS_GPU_WORK": str(tmp_path / "work")}
    done = command_of("bash", RUN, "first", tmp_path / "out", env=environment)
    assert done.returncode == 1
    assert "There is no GPU to run on" in done.stderr
    with tarfile.open(tmp_path / "out" / "first.tar.gz") as archive:
        assert "first/machine.json" in archive.getnames()


def test_the_build_without_cmake_has_the_tables_and_flags_of_cmake() -> None:
    script, cmake = (BENCH / "gpu" / "build.sh").read_text(), (BENCH.parent / "CMakeLists.txt").read_text()
    tables = re.findall(r"^ *lors_cpu_table\((\w+)(.*)\)", cmake, re.MULTILINE)
    assert len(tables) == 4
    for table, flags in tables:
        given = re.search(rf"['\"]({table}\b[^'\"]*)['\"]", script)
        assert given is not None, f"bench/gpu/build.sh lacks the CPU table {table}"
        own = [flag for flag in flags.split() if flag.startswith("-")]
        assert [flag for flag in given[1].split() if flag.startswith("-")] == own, f"flags of {table}"


def test_the_core_without_torch_compiles() -> None:
    compiler = shutil.which("c++")
    headers = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "include")
    if compiler is None or not headers.is_dir():
        pytest.skip("there is no C++ compiler, or no CUDA headers")
    include = ["-I", BENCH.parent / "csrc" / "core" / "include", "-isystem", headers]
    source = BENCH / "cpp" / "bench_cuda.cpp"
    done = command_of(
        compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *include, source
    )
    assert done.returncode == 0, done.stderr


def test_kernels_quick_takes_every_layout(tmp_path: Path) -> None:
    options = [
        "--quick",
        "--layout",
        "dense",
        "mask",
        "2:4",
        "bitmap",
        "--rank",
        3,
        "--only",
        "merge",
        "forward",
        "exact",
    ]
    done = command(BENCH / "gpu" / "kernels.py", *options, "--output", tmp_path / "kernels.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    ours = [row for row in rows if row["peer"] == "lors_cuda"]
    assert {(row["kernel"], row["layout"]) for row in ours} == set(
        itertools.product(("merge", "forward", "exact"), ("dense", "mask", "2:4", "bitmap"))
    )
    assert all(row["failed"] is None and row["error"] < 1e-2 for row in ours)
