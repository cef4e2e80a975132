# SPDX-License-Identifier: Apache-2.0
"""`lors-cuda finetune` under torchrun: the run of one process, one writer, one sentence for an error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from adapter_directories import assert_same_files
from cli_calls import ENVIRONMENT, call, curve, finetune, tree
from lors_cuda.cli import main
from lors_cuda.cli._common import find_device
from models import refused

pytest_plugins = ["cli_fixtures", "pair"]

EXAMPLE = Path(__file__).parents[3] / "examples" / "train_distributed.py"


def command(rank: int, arguments: list[str], stop: int = 0) -> tuple[int, str, str]:
    """The command in this process of the pair, as torchrun would start it: exit code, stdout, stderr."""
    environment = {"TORCHELASTIC_RUN_ID": "pair", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if stop:
            from lors_cuda.cli._trainer import StepLog

            stack.enter_context(mock.patch.object(StepLog, "on_log", stop_after(stop, StepLog.on_log)))
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def stop_after(step: int, on_log: Callable[..., None]) -> Callable[..., None]:
    """What stands for a kill: an error in both processes, after the log and before the checkpoint."""

    def log_and_stop(self, args, state, control, **more):
        on_log(self, args, state, control, **more)
        if state.global_step == step:
            raise FloatingPointError("stopped by the test")

    return log_and_stop


def both(pair, *arguments, stop: int = 0) -> tuple[int, str, str]:
    """Both processes' exit code, which must be one, and what they printed together."""
    (code, out, err), (other, other_out, other_err) = pair.run(command, [str(a) for a in arguments], stop)
    assert code == other
    return code, out + other_out, err + other_err


@pytest.fixture(scope="module")
def alone(home) -> Path:
    """A run of one process on the batches that two take together."""
    output = home / "alone"
    assert call(*finetune(home, output, "--accumulate", "2", "--checkpoint-every", "2", "--json")) == 0
    return output


def assert_same_run(run: Path, expected: Path) -> None:
    ours, theirs = curve(run), curve(expected)
    assert [entry["step"] for entry in ours] == list(range(1, 7))
    for name, tolerance in [("loss", 1e-4), ("grad_norm", 1e-3), ("lr", 1e-12), ("tokens", 1e-12)]:
        assert [e[name] for e in ours] == pytest.approx([e[name] for e in theirs], rel=tolerance), name


def test_a_run_is_that_of_one_process_and_resumes(pair, home, alone, tmp_path):
    code, out, err = both(pair, *finetune(home, tmp_path / "run", "--checkpoint-every", "2"))
    assert (code, err) == (0, "")
    assert out.count("Model: ") == out.count("2 processes; 2 batches make a step.") == out.count("step      6") == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}
    assert_same_run(tmp_path / "run", alone)
    assert curve(alone)[-1]["loss"] < 0.95 * curve(alone)[0]["loss"]
    assert json.loads((tmp_path / "run/run.json").read_text())["result"]["processes"] == 2

    # Killed after step 5, resumed from step 4: the same files.
    stopped = finetune(home, tmp_path / "stopped", "--checkpoint-every", "2")
    code, _, err = both(pair, *stopped, stop=5)
    assert (code, err.count("stopped by the test"), err.count("\n")) == (1, 1, 1)
    assert len(curve(tmp_path / "stopped")) == 5
    assert both(pair, *stopped, "--resume")[0] == 0
    assert curve(tmp_path / "stopped") == curve(tmp_path / "run")
    assert_same_files(tmp_path / "stopped", tmp_path / "run")
    # Resuming goes by the same number of processes.
    assert call(*stopped, "--resume") == 1


def test_an_error_is_one_sentence(pair, home, tmp_path):
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/file").write_text("mine")
    wrong_data = tmp_path / "data.jsonl"
    wrong_data.write_text("{}\n")
    for arguments, code, sentence in [
        (finetune(home, tmp_path / "busy"), 1, "holds no fine-tuning run"),  # the writer alone sees it
        (finetune(home, tmp_path / "new", "--data", wrong_data), 1, "line 1 has nothing; it must have"),  # both see it
        (finetune(home, tmp_path / "new", "--device", "nonsense"), 1, "--device is 'nonsense'"),
        (finetune(home, tmp_path / "new", "--rank", "1000"), 1, "the rank must be between"),
        (finetune(home, tmp_path / "new", "--rank", "none"), 2, "is not an integer of at least 1"),
        (["eval", "--model", home / "sparse", "--data", home / "text.txt"], 2, "runs in one process, not under"),
    ]:
        got, out, err = both(pair, *arguments)
        assert got == code, err
        assert sentence in err
        assert err.startswith("lors-cuda: error: ")
        assert err.count("\n") == 1, err
        assert not out or out.startswith("Model: ")
    assert tree(tmp_path / "busy") == {"file": b"mine"}
    assert not (tmp_path / "new").exists()


def test_json_is_printed_once(pair, home, tmp_path):
    code, out, err = both(pair, *finetune(home, tmp_path / "run", "--init", "default", "--steps", "1", "--json"))
    assert (code, err) == (0, "")
    assert json.loads(out)["processes"] == 2


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "RANK": 3, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda") == torch.device("cuda")  # not started by torchrun: those variables are somebody else's
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert find_device("cuda") == torch.device("cuda", 1)
    assert find_device("cpu") == torch.device("cpu")
    refused(ValueError, lambda: find_device("cuda:0"), "each process has a GPU of its own")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(RuntimeError, lambda: find_device("cuda"), "2 processes on a machine with 1 GPU(s)", "--nproc-per-node 1")


# ---- torchrun itself ----


def torchrun(*arguments) -> subprocess.CompletedProcess[str]:
    """Two processes on a free port, which torchrun finds itself."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_torchrun_starts_and_ends_it(pair, home, alone, tmp_path):
    done = torchrun("-m", "lors_cuda", *finetune(home, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes; 2 batches make a step.") == 1
    assert_same_run(tmp_path / "run", alone)
    done = torchrun("-m", "lors_cuda", *finetune(home, tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.count("lors-cuda: error: ") == 1
    assert "already holds a run" in done.stderr


@pytest.mark.parametrize(("strategy", "part"), [("fsdp", 2), ("ddp", 1)])
def test_the_example_runs(pair, tmp_path, strategy, part):
    if not EXAMPLE.is_file():
        pytest.skip(f"{EXAMPLE} is not here: the tests are not run from a checkout")
    output = "".join(pair.run(run_example, str(tmp_path), strategy))
    held, total = map(int, re.search(r"each holds (\d+) of (\d+) bytes", output).groups())
    assert held == total // part
    losses = [float(text) for text in re.findall(r"loss (\S+)", output)]
    assert losses[-1] < 0.3 * losses[0]
    assert output.count("zeros kept: True") == 1


def run_example(rank: int, directory: str, strategy: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(str(EXAMPLE))["main"](Path(directory), strategy)
    return out.getvalue()
