# SPDX-License-Identifier: Apache-2.0
"""The scripts in examples/: each runs by itself, offline, and does what it says."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lors_cuda
from accelerate_state import own_accelerate  # noqa: F401  (a fixture)

EXAMPLES = Path(__file__).parents[3] / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, found beside its neighbours as when it is run."""
    if not EXAMPLES.is_dir():
        pytest.skip(f"{EXAMPLES} is not here: the tests are not run from a checkout")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_sparse(directory: Path) -> None:
    """A plain transformers checkpoint with half of the linears' weights zero."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert len(layers) == 14
    for layer in layers:
        kept = (layer.weight.view(-1, 4) != 0).sum(dim=-1)
        assert int(kept.max()) == 2


@pytest.mark.parametrize(("name", "package"), [("train_with_trainer", "transformers"), ("train_with_trl", "trl")])
def test_trainer_examples(tmp_path, monkeypatch, capsys, name, package):
    pytest.importorskip(package)
    main = example(name, monkeypatch).main
    options = ["--output", str(tmp_path), "--steps", "8"]
    losses = main(options)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    if name == "train_with_trainer":
        assert "zeros: 50.00% over 14 linears" in capsys.readouterr().out
        assert_sparse(tmp_path / "merged")
    else:
        lors_cuda.load_adapter(sys.modules["small_model"].pruned_llama(), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "checkpoint-8")  # as if the run had been killed after the one before
    assert main([*options, "--resume"]) == losses
    if name == "train_with_trainer":
        shutil.rmtree(tmp_path / "checkpoint-8")
        assert main([*options, "--resume", "--reentrant"]) == losses


def test_trainer_example_with_a_checkpoint_of_ones_own(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    module = example("train_with_trainer", monkeypatch)
    module.pruned_llama().save_pretrained(tmp_path / "model")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "model")
    losses = module.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path), "--steps", "2"])
    assert len(losses) == 2
    assert_sparse(tmp_path / "merged")


def test_accelerate_example(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    main = example("train_with_accelerate", monkeypatch).main
    options = ["--output", str(tmp_path), "--epochs", "2"]
    losses = main(options)
    assert losses[-1] < losses[0] - 0.5
    assert_sparse(tmp_path / "merged")
    assert main([*options, "--resume"]) == losses[len(losses) // 2 :]


def test_three_lines(monkeypatch, capsys):
    example("three_lines", monkeypatch)
    assert "zeros kept: True" in capsys.readouterr().out
