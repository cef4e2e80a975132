# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: no temporary file stays, one line says how to go on, and the exit code is the shell's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cli_calls import ENVIRONMENT, call, curve, finetune, tree

pytest_plugins = ["cli_fixtures"]

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def stop_in(monkeypatch, place: str, number: int, after: int = 0) -> None:
    """Send this process a signal when the function at ``place`` is called, after some calls, and has done its work."""
    module, _, name = place.rpartition(".")
    original, calls = getattr(sys.modules[module], name), []

    def stopped(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(args)
        if len(calls) > after:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(place, stopped)


def said(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("lors-cuda: error: ")
    assert error.count("\n") == 1, error
    return error.removeprefix("lors-cuda: error: ").strip()


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_merge_and_prune(home, adapter, tmp_path, capsys, monkeypatch, number, overwrite):
    from lors_cuda.cli import _model_files  # noqa: F401

    output = tmp_path / "output"
    prune = ["prune", "--model", home / "dense", "--method", "magnitude", "--output", output]
    merge = ["merge", "--model", home / "sparse", "--adapter", adapter, "--output", output]
    if overwrite:
        assert call(*prune) == 0
    before = tree(tmp_path)
    handlers = [signal.getsignal(one) for one in CODES]
    capsys.readouterr()
    for command in (prune, merge):
        with monkeypatch.context() as patch:
            stop_in(patch, "lors_cuda.cli._model_files.write_model", number)
            assert call(*command, *["--overwrite"][: int(overwrite)]) == CODES[number]
        what = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
        assert said(capsys) == f"{what}; nothing was written. The same command begins again"
        assert [signal.getsignal(one) for one in CODES] == handlers
    assert tree(tmp_path) == before
    assert sorted(tmp_path.iterdir()) == [output] * overwrite


def test_between_the_two_renames_of_an_overwrite(home, tmp_path, capsys, monkeypatch):
    output = tmp_path / "output"
    prune = ["prune", "--model", home / "dense", "--method", "magnitude", "--output", output]
    assert call(*prune) == 0
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        stop_in(patch, "os.rename", signal.SIGTERM)
        assert call(*prune, "--overwrite") == 143
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", CODES)
def test_finetune(home, tmp_path, capsys, monkeypatch, number):
    run = tmp_path / "run"
    command = finetune(home, run, "--init", "default", "--checkpoint-every", "2")
    from lors_cuda import hf

    with monkeypatch.context() as patch:
        stop_in(patch, "lors_cuda.cli.finetune.load_model", number)
        assert call(*command) == CODES[number]
    assert said(capsys).endswith("nothing was written. The same command begins again")
    assert list(tmp_path.iterdir()) == []

    with monkeypatch.context() as patch:
        stop_in(patch, "lors_cuda.hf._check_finite", number)  # in the first step
        assert call(*command) == CODES[number]
    assert said(capsys).endswith("no checkpoint was complete yet: the same command with --resume begins again")

    with monkeypatch.context() as patch:
        stop_in(patch, "lors_cuda.hf.save_adapter", number, after=1)  # within the second
        assert call(*command, "--overwrite") == CODES[number]
    expected = "the same command with --resume instead of --overwrite goes on after step 2"
    assert said(capsys).endswith(f"; {expected}")
    left = sorted(path.name for path in run.iterdir())
    assert left == ["checkpoint-2", "run.json", "training.jsonl"]
    assert call(*command, "--resume") == 0
    assert len(curve(run)) == 6
    assert hf.last_checkpoint(run).name == "checkpoint-6"


def test_a_second_interrupt_ends_at_once():
    program = (
        "import os, signal, sys\n"
        "from lors_cuda.cli import info, main\n"
        "def run(args):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"  # as from `timeout`: not a person who waits no longer
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('not reached')\n"
        "info.run = run\n"
        "sys.exit(main(['info']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it runs in the background
    try:
        from lors_cuda.cli import info

        monkeypatch.setattr(info, "run", lambda args: os.kill(os.getpid(), signal.SIGINT))
        assert call("info") == 0
    finally:
        signal.signal(signal.SIGINT, before)
