# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole models: every method trains one model, every runner writes one text. Nothing is timed."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
BENCH = Path(__file__).resolve().parents[3] / "bench"


def run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bench_model(monkeypatch):
    """bench/model.py as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("model")


def refused(*arguments: str, monkeypatch) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as exit:
        bench_model(monkeypatch).parse(list(arguments))
    assert exit.value.code == 2
    return said.getvalue()


def rows_of(tmp_path: Path, *arguments: object) -> dict[str, dict]:
    output = tmp_path / "model.json"
    run(BENCH / "model.py", "--quick", "--dtype", "float32", "--output", output, *arguments)
    rows = json.loads(output.read_text())["rows"]
    for row in rows:
        assert row["failed"] is None
        assert min(row["raw_seconds"]) > 0
        assert row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"]
    assert len(rows) == len({row["peer"] for row in rows})
    return {row["peer"]: row for row in rows}


def test_every_method_trains_the_same_model(tmp_path: Path) -> None:
    names = [
        "frozen",
        "official",
        "sqft",
        "lors_cuda",
        "lors_cuda_bitmap",
        "lors_cuda_peft",
        "lors_cuda_24_gc",
        "lors_cuda_prefetch",
    ]
    rows = rows_of(tmp_path, "--tokens", "2x8", "--no-memory", "--methods", *names)
    assert rows.keys() == {*names, "peft_lora", "peft_lora_again"}
    first, second = rows["official"]["loss"]
    assert second < first
    for name in names[1:]:
        assert rows[name]["loss"][0] == pytest.approx(first, rel=1e-6), name
    for name in (name for name in names[1:] if name != "sqft"):  # which has the exact gradients
        assert rows[name]["loss"][1] == pytest.approx(second, rel=1e-6), name
    for name in ("frozen", "peft_lora"):  # no adapter, and one without a mask: other models
        assert abs(rows[name]["loss"][0] - first) > 1e-5 * first


def test_memory_is_counted_in_processes_of_their_own(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "--tokens", "1x8", "--methods", "official", "lors_cuda_24")
    sizes = {name: row["bytes"] for name, row in rows.items()}
    for size in sizes.values():
        assert size["total"] == size["model"] + size["optimizer"] + size["peak"]
        assert size["peak"] > 0
    assert sizes["lors_cuda_24"]["model"] < 0.7 * sizes["official"]["model"]  # embedding and head are a third of it
    assert sizes["official"]["optimizer"] == sizes["lors_cuda_24"]["optimizer"] > 0


def test_every_runner_writes_the_same_text(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "--generate")
    assert {"dense", "dense_again", "merged", "lors_cuda_24", "lors_cuda_24_cached"} <= rows.keys()
    adapted = {name: row for name, row in rows.items() if not name.startswith("dense")}
    assert {row["tokens_as_merged"] for row in adapted.values()} == {6}
    assert min(row["tokens_per_second"] for row in rows.values()) > 0


COUNTED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
import counted, llama, protocol

base = llama.pruned_llama(llama.QUICK_SHAPES["tiny"]).to(torch.bfloat16)
linears = {"up_proj": (96, 32)}
found = {}
for name, kind in counted.KINDS.items():
    model = llama.make(name, base, 4)
    digests = sum(b.nbytes for n, b in model.named_buffers() if n.endswith(("mask_digest", "inv_freq")))
    layer = next(module for n, module in model.named_modules() if n.endswith("layers.0.mlp.up_proj"))
    input = torch.randn(5, 32, dtype=torch.bfloat16, requires_grad=True)
    own = [*model.parameters(), *model.buffers()]
    saved = protocol.saved_bytes(lambda: layer(input), own)[1]["saved_beyond_arguments"]
    parts = counted.count(base, kind, 4, 5)
    found[name] = {
        "held": llama.held_bytes(model) - digests, "counted": parts["weights"] + parts["adapters"],
        "saved": saved, "counted saved": counted.saved_bytes(linears, kind, 4, 5),
    }
print(json.dumps(found))
"""


def test_what_is_counted_from_shapes_is_what_models_hold() -> None:
    for name, sizes in json.loads(run("-c", COUNTED, BENCH)).items():
        assert sizes["counted"] == sizes["held"], name
        assert sizes["counted saved"] == sizes["saved"], name


def test_memory_of_large_models(tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    run(BENCH / "model.py", "--memory", "--output", output)
    rows = {(row["model"], row["peer"]): row for row in json.loads(output.read_text())["rows"]}
    assert {row["how"] for row in rows.values()} == {"counted"}
    assert rows["Llama-3-8B", "official"]["bytes"]["weights"] == 2 * 8030261248  # the model's number of parameters
    assert rows["Llama-3-70B", "official"]["bytes"]["weights"] == 2 * 70553706496


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--device", "gpu"), "gpu is not a device to measure on; it must be cpu or cuda"),
        (("--device", "cuda"), f"torch {torch.__version__} finds no CUDA device here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(given, sentence, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sentence in refused(*given, monkeypatch=monkeypatch)


def test_the_device_is_for_training_steps_alone(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for part in ("--generate", "--memory"):
        said = refused("--device", "cuda", part, monkeypatch=monkeypatch)
        assert "--device cuda goes with training steps alone; leave out --generate and --memory, or --device" in said
    assert bench_model(monkeypatch).parse(["--device", "cuda"]).device == torch.device("cuda", 0)
    assert bench_model(monkeypatch).parse([]).device == torch.device("cpu")


def test_a_method_that_does_not_exist_is_named() -> None:
    command = [sys.executable, str(BENCH / "model.py"), "--quick", "--methods", "lora"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "lora is no method; give one of frozen, peft_lora" in done.stderr
