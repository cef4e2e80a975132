# SPDX-License-Identifier: Apache-2.0
"""A few hundred cases of `make fuzz`, always the same, and that the fuzzer can fail."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz
import pytest


def test_any_bytes_are_refused_or_read_as_the_formats_say():
    counts = Counter(fuzz.run_case(0, case) for case in range(300))
    assert counts["random bytes", False] == counts["valid weights", True] == 100
    assert min(counts["changed weights", True], counts["changed weights", False]) >= 10


def test_a_door_that_takes_everything_is_found(monkeypatch):
    for check in ("check_sparse24", "check_bitmap"):
        monkeypatch.setattr(f"lors_cuda._stored_checks.{check}", lambda *args: None)
    with pytest.raises((AssertionError, RuntimeError), match=r"from_parts|pass the tensors of one SparseWeight"):
        Counter(fuzz.run_case(0, case) for case in range(300))


def test_a_read_beyond_a_tensor_ends_the_process():
    script = """
import ctypes, numpy, torch, fuzz
tensor = fuzz.guarded(numpy.ones(4, numpy.uint32), torch.int32)
print(tensor.sum().item(), flush=True)
ctypes.string_at(tensor.data_ptr(), 17)
"""
    where = Path(fuzz.__file__).parent
    run = subprocess.run([sys.executable, "-c", script], cwd=where, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "4", run.stderr
    assert run.returncode < 0
