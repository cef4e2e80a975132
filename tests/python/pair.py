# SPDX-License-Identifier: Apache-2.0
# A pytest plugin of test_distributed_*.py. Two processes of one gloo group are started once and called many times: a
# start costs seconds. They meet through a file, so there is no port that could be taken.
"""Run a function in two processes at once."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_SECONDS = 120  # for one call; a healthy one takes a few


class Pair:
    """Two processes; after a failed call they are started anew, because they may be out of step."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._starts = folder, 0
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(rank, *arguments)`` in both processes; their results, or a test failure with the traceback."""
        answers = self.answers(function, *arguments)
        failures = [f"process {rank}: {answer}" for rank, (fine, answer) in enumerate(answers) if not fine]
        if failures:
            pytest.fail("\n".join(failures))
        return [answer for _, answer in answers]

    def answers(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """(whether it returned, its result or the traceback) of each process."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        answers = []
        for connection in self._connections:
            try:
                answers.append(connection.recv() if connection.poll(_SECONDS) else (False, "no answer in time"))
            except EOFError:
                answers.append((False, "the process ended"))
        if not all(fine for fine, _ in answers):
            self.stop()
        return answers

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = self._folder / f"store{self._starts}"
        self._starts += 1
        for rank in (0, 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(store), theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._connections.append(ours)


def _serve(rank: int, store: str, connection: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun sets it; without it accelerate warns
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=_SECONDS)
    )
    while True:
        function, arguments = connection.recv()
        faulthandler.dump_traceback_later(_SECONDS - 5)
        try:
            answer = True, function(rank, *arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Two processes; skips where torch has no torch.distributed."""
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    processes = Pair(tmp_path_factory.mktemp("pair"))
    yield processes
    processes.stop()
