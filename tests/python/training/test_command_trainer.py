# SPDX-License-Identifier: Apache-2.0
"""The command line's Trainer: what a step computes, its log, its evaluation, the plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelerate_state import own_accelerate  # noqa: F401  (a fixture)
from byte_model import TEXT, byte_llama, byte_tokenizer, full_disk
from lors_cuda.config import LoRSConfig
from lors_cuda.data import TokenDataset
from lors_cuda.evaluation import evaluate
from lors_cuda.model import get_lors_model
from lors_cuda.pruning import prune
from models import refused

for package in ("transformers", "accelerate", "matplotlib"):
    pytest.importorskip(package)

from lors_cuda.cli import _trainer  # noqa: E402  (it needs them)


@pytest.fixture(scope="module")
def text() -> TokenDataset:
    return TokenDataset.from_text(TEXT, byte_tokenizer(), 48)


@pytest.fixture(scope="module")
def padded() -> TokenDataset:
    return unequal()


def unequal(count: int = 7) -> TokenDataset:
    """Examples with 6, 12, 18, ... tokens to predict."""
    records = [(i, {"prompt": TEXT[i : i + 9], "completion": TEXT[40 : 45 + 6 * i]}) for i in range(count)]
    return TokenDataset.from_records(records, byte_tokenizer(), 64)


def adapted(**fields) -> nn.Module:
    """A sparse model with adapters; attention dropout makes training depend on the random state."""
    model = byte_llama(**{"attention_dropout": 0.1, **fields})
    prune(model, "2:4", method="magnitude")
    torch.manual_seed(7)
    return get_lors_model(model, LoRSConfig(r=4, lora_alpha=8))


def trainer_of(model: nn.Module, data: TokenDataset, directory: Path, **options: Any) -> Any:
    callbacks, eval_data = options.pop("callbacks", None), options.pop("eval_data", None)
    defaults = {"steps": 1, "batch_size": 4, "lr": 1e-2, "seed": 0, "device": torch.device("cpu")}
    arguments = _trainer.arguments(directory, **{**defaults, "save_strategy": "no", **options})
    return _trainer.CommandTrainer(model, arguments, data, eval_data, callbacks)


def trained(model: nn.Module, data: TokenDataset, directory: Path, **options: Any) -> list[dict[str, Any]]:
    trainer = trainer_of(model, data, directory, **options)
    trainer.train()
    return _trainer.steps_of(trainer.state)


def test_loss_falls_and_only_adapters_change(text, tmp_path):
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    entries = trained(model, text, tmp_path, steps=30, lr=5e-3)
    assert [entry["step"] for entry in entries] == list(range(1, 31))
    assert sum(e["loss"] for e in entries[-5:]) < 0.9 * sum(e["loss"] for e in entries[:5])
    assert {entry["tokens"] for entry in entries} >= {4 * 47}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert list(tmp_path.iterdir()) == []


def test_one_step_is_adamw_on_the_clipped_gradient(padded, tmp_path):
    model, oracle = adapted(attention_dropout=0.0), adapted(attention_dropout=0.0)
    (entry,) = trained(model, padded, tmp_path, batch_size=7, warmup_steps=0, max_grad_norm=0.01)
    oracle.train()
    loss = oracle(**padded.batch(range(7))).loss
    loss.backward()
    parameters = [p for p in oracle.parameters() if p.requires_grad]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert entry["tokens"] == padded.loss_tokens
    assert norm > 0.01
    for parameter in parameters:
        parameter.grad *= 0.01 / (norm + 1e-6)
    torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0).step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, oracle.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_accumulation_weighs_batches_by_their_tokens(padded, tmp_path):
    """Batches of unequal length in four parts give the step of one large batch."""
    whole, parts = adapted(attention_dropout=0.0), adapted(attention_dropout=0.0)
    (one,) = trained(whole, padded, tmp_path, batch_size=7)
    (four,) = trained(parts, padded, tmp_path, batch_size=2, gradient_accumulation_steps=4)
    assert four["tokens"] == one["tokens"]
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 4, "warmup_steps": 2}, [1 / 3, 2 / 3, 1, 0.5]),
        ({"steps": 4}, [0.5, 1, 0.75, 0.25]),  # 3 % of 4, rounded up
        ({"steps": 4, "warmup_steps": 2, "schedule": "constant"}, [1 / 3, 2 / 3, 1, 1]),
    ],
)
def test_learning_rate(text, tmp_path, options, expected):
    rates = [entry["lr"] for entry in trained(adapted(), text, tmp_path, **options)]
    assert rates == pytest.approx([1e-2 * factor for factor in expected])


def test_bfloat16_and_gradient_checkpointing_train(text, tmp_path):
    plain = trained(adapted(attention_dropout=0.0), text, tmp_path, steps=3)
    other = trained(adapted(attention_dropout=0.0), text, tmp_path, steps=3, bf16=True, gradient_checkpointing=True)
    assert [e["loss"] for e in other] == pytest.approx([e["loss"] for e in plain], rel=0.02)
    assert [e["loss"] for e in other] != [e["loss"] for e in plain]


def test_a_loss_that_cannot_be_normalised_over_batches_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(type(adapted()), "accepts_loss_kwargs", False, raising=False)
    assert trained(adapted(), text, tmp_path)[0]["tokens"] == 4 * 47
    refused(
        ValueError,
        lambda: trained(adapted(), text, tmp_path, gradient_accumulation_steps=2),
        "cannot normalise its loss", "without --accumulate",
    )  # fmt: skip


# ---- log, evaluation, plot ----


def test_the_log_is_written_from_the_checkpoint_and_goes_on(text, padded, tmp_path):
    path = tmp_path / "training.jsonl"
    path.write_text('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')  # of a killed run
    trainer = trainer_of(
        adapted(), text, tmp_path, steps=3, callbacks=[_trainer.StepLog(path)],
        eval_data=padded, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 2, 3, 3]
    for place in (4, 2):  # after the second step, and at the end
        assert entries.pop(place).keys() == {"step", "eval_loss", "eval_perplexity"}
    assert all(e.keys() == {"step", "loss", "grad_norm", "lr", "tokens", "seconds"} for e in entries)
    assert entries == _trainer.steps_of(trainer.state)
    assert all(entry["seconds"] > 0 for entry in entries)


def test_evaluation_weighs_tokens(text, padded, tmp_path):
    model = adapted()
    trainer = trainer_of(model, text, tmp_path, batch_size=2, eval_data=padded, eval_strategy="steps")
    trainer.train()
    measured = evaluate(model, padded, batch_size=7)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured.loss, rel=1e-6)
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(measured.perplexity, rel=1e-6)


def test_a_log_that_cannot_be_written_stops_with_a_sentence(text, tmp_path):
    log = _trainer.StepLog(tmp_path / "training.jsonl")
    with full_disk(100):
        refused(
            OSError,
            trainer_of(adapted(), text, tmp_path, steps=3, callbacks=[log]).train,
            "training.jsonl' could not be written",
        )


def test_plot_is_a_png_and_is_replaced_whole(tmp_path):
    path = tmp_path / "loss.png"
    entries = [{"step": step, "loss": 5 / step} for step in range(1, 100)]
    _trainer.plot_loss(entries, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    with full_disk(1000):
        refused(OSError, lambda: _trainer.plot_loss(entries, path), "loss.png", "could not be written")
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
