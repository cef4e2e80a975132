# SPDX-License-Identifier: Apache-2.0
"""What surrounds the numbers: the machine they were measured on, the JSON file, tables on the terminal, the targets."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from protocol import CPU, Protocol, load_average

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
TARGET_SHAPE, TARGET_RANK = (2048, 2048), 16
# How many times faster than the official formula, on two cores with AVX-512: (dtype, tokens) and (rank,).
LINEAR_TARGETS = {("float32", 128): 2.0, ("float32", 512): 1.3, ("float32", 2048): 1.05, ("bfloat16", 512): 1.6}
MERGE_TARGETS = {16: 5.0, 64: 2.5}
# On a GPU, the same for one linear.
CUDA_TARGET_SHAPE = (4096, 4096)
CUDA_LINEAR_TARGETS = {("bfloat16", 512): 2.0, ("bfloat16", 2048): 1.45, ("bfloat16", 8192): 1.2}


# --- where it was measured --------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = values.get("flags", "").split()
    return values.get("model name", platform.machine()), [name for name in CPU_FEATURES if name in flags]


@functools.cache
def have_lors_cuda() -> bool:
    """Whether lors_cuda can be imported; says once on stderr why not, as its rows will be missing."""
    try:
        import lors_cuda  # noqa: F401
    except ImportError as error:
        print(f"lors_cuda cannot be imported, its rows are missing: {error}", file=sys.stderr)
        return False
    return True


def _lors_cuda_version() -> str | None:
    """Of the installed package, or of one that is read from a folder and has no metadata."""
    if not have_lors_cuda():
        return None
    import lors_cuda

    return _version("lors-cuda") or lors_cuda.__version__


def _gpu(device: torch.device) -> dict[str, Any]:
    """What a row needs of a GPU; its clocks are left as they are found."""
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver,
        "torch_cuda": torch.version.cuda,
        "lors_cuda_fused": os.environ.get("LORS_CUDA_FUSED"),
    }


def environment(device: torch.device = CPU) -> dict[str, Any]:
    """Commit, processor, GPU, threads, versions and date: everything a row needs to be read a year later."""
    model, features = _cpu()
    changes = _git("status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "device": device.type,
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "cpu_model": model,
        "cpu_features": features,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": load_average(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "lors_cuda": _lors_cuda_version(),
        "lors_cuda_build": json.loads(torch.ops.lors.build_info()) if have_lors_cuda() else None,
    }


def describe(where: dict[str, Any]) -> str:
    commit = (where["commit"] or "no commit")[:12] + (" + changes" if where["uncommitted_changes"] else "")
    load = where["load_average_at_start"]
    gpu = where.get("gpu")  # files of before 2026-11-25 do not have it
    on = f"{gpu['name']}, driver {gpu['driver'] or '?'}, CUDA {gpu['torch_cuda']}; beside it " if gpu else ""
    # The kernels that LORS_CPU_CAPABILITY may have lowered.
    kernels = (where["lors_cuda_build"] or {}).get("cpu_capability")
    return (
        f"{on}{where['cpu_model']} ({', '.join(where['cpu_features']) or 'no AVX2'}), {where['threads']} threads of "
        f"{where['cpu_count']} cores, load {'?' if load is None else f'{load:.1f}'}; torch {where['torch']}, "
        f"lors_cuda {where['lors_cuda'] or 'not installed'}{f' ({kernels})' if kernels else ''}, "
        f"{commit}, {where['date']}"
    )


def write_json(
    path: Path,
    rows: Sequence[dict[str, Any]],
    where: dict[str, Any],
    protocol: dict[str, Any],
    append_to: Sequence[dict[str, Any]] = (),
) -> None:
    """One document per run, written to a temporary name and renamed: an interrupted run leaves the old file."""
    document = {
        "format": 1,
        "environment": {**where, "load_average_at_end": load_average()},
        "protocol": protocol,
        "rows": [*append_to, *rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(document_text(document))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def document_text(document: dict[str, Any]) -> str:
    """A document as JSON: one line per row, and one per other field."""

    def line(value: Any) -> str:
        # JSON has no NaN: a result that is not a number is written as null beside `failed`.
        return json.dumps(_finite(value), allow_nan=False)

    fields = [f"{line(key)}: {line(value)}" for key, value in document.items() if key != "rows"]
    fields.append('"rows": [\n' + ",\n".join(map(line, document["rows"])) + "\n]")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


# --- the command line both benches share ------------------------------------------------------------------------------


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the benchmarks of one weight."""
    add_run_arguments(parser)
    parser.add_argument("--shape", nargs=2, type=positive, metavar=("N", "K"), help="out_features, in_features")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="float32 bfloat16; on a GPU bfloat16")
    parser.add_argument("--density", type=float, help="share of nonzero weights, at random places; default: 2:4")
    add_device_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=usable_device, default=CPU, help="cpu (the default) or cuda")


def add_run_arguments(parser: argparse.ArgumentParser, rounds: int = 15, budget: float = 30.0) -> None:
    """Of every benchmark: how long it measures and where the rows go."""
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--min-rounds", type=positive, default=3, help="measured even by a peer beyond its budget")
    parser.add_argument("--budget", type=float, default=budget, metavar="SECONDS", help="timed work per peer and case")
    parser.add_argument("--threads", type=positive, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--append", action="store_true", help="keep the rows that --output holds already")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, measures nothing")


def usable_device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is not a device to measure on; it must be cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} finds no CUDA device here")
    return torch.device(text, 0) if text == "cuda" else CPU


def rows_before(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that --append keeps."""
    if not (arguments.append and arguments.output and arguments.output.exists()):
        return []
    rows: list[dict[str, Any]] = json.loads(arguments.output.read_text())["rows"]
    return rows


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def protocol_from(arguments: argparse.Namespace) -> Protocol:
    if arguments.quick:
        return Protocol.quick()
    return Protocol(
        rounds=arguments.rounds,
        min_rounds=min(arguments.min_rounds, arguments.rounds),
        budget_seconds=arguments.budget,
        seed=arguments.seed,
    )


def progress(text: str) -> None:
    """One line that overwrites itself; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="" if text else "\r", file=sys.stderr, flush=True)


def case_label(row: dict[str, Any]) -> str:
    """What a row was measured on, as a heading of a table or a plot."""
    kind = row["benchmark"]
    if kind == "merge":
        return f"{row['dtype']}, r = {row['rank']}"
    if kind == "model":
        return f"{row['model']}, {row['dtype']}, {row['batch']} x {row['length']} tokens"
    if kind in ("decode", "experts"):
        return f"{row['dtype']}, {row['tokens']} token{'s' if row['tokens'] > 1 else ''}"
    if kind == "experts_forward":
        return f"{row['dtype']}, 1 token, forward"
    if kind in ("generate", "memory"):
        return f"{row['model']}, {row['dtype']}"
    return f"{row['tokens']} tokens"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    rows = [header, ["-" * width for width in widths], *lines]

    def align(row: Sequence[str]) -> str:
        return "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )

    return "\n".join(align(row) for row in rows)


def milliseconds(stats: dict[str, float] | None) -> str:
    if stats is None:
        return "-"
    return f"{stats['median'] * 1e3:.3f} [{stats['p20'] * 1e3:.3f}, {stats['p80'] * 1e3:.3f}]"


def times(stats: dict[str, float] | None) -> str:
    return "-" if stats is None else f"{stats['median']:.2f} [{stats['p20']:.2f}, {stats['p80']:.2f}]"


def page_faults(row: dict[str, Any]) -> str:
    """Of one call; rows of before 2026-11-27 do not have them."""
    faults = row.get("page_faults")
    return "-" if faults is None else f"{faults:.0f}"


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"


def verdict(target: float | None, stats: dict[str, float] | None) -> str:
    if target is None or stats is None:
        return ""
    return f">= {target:g} {'met' if stats['median'] >= target else 'missed'}"


def target_note(where: dict[str, Any]) -> str | None:
    """Why a met or missed target may mean little here: the targets are stated for one kind of machine."""
    if where["device"] == "cuda":
        name = where["gpu"]["name"]
        return None if "H200" in name else f"The targets are stated for an H200; this run is on: {name}."
    if where["threads"] == 2 and "avx512f" in where["cpu_features"]:
        return None
    return "The targets are stated for 2 threads on a processor with AVX-512; this run is on another kind."
