# SPDX-License-Identifier: Apache-2.0
"""The mixin's Trainer and estimate_gradients in two processes: the results of one, resuming, errors that end both."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed_cases import assert_close, converted, trained_values
from test_command_trainer import adapted, trainer_of, unequal
from test_gradients import regression_batches, regression_loss, tiny_net
from torch import Tensor, nn

from byte_model import full_disk
from lors_cuda import estimate_gradients, init_from_gradients
from lors_cuda._distributed import OtherProcessFailed, ended_together, from_first, summed
from lors_cuda.cli import _trainer
from lors_cuda.evaluation import evaluate
from lors_cuda.hf import last_checkpoint
from models import batch, refused, tiny_llama

pytest_plugins = ["pair"]

# Two batches of one and of two examples of unequal length make a step of two processes or of one that accumulates.
BOTH = {"steps": 6, "lr": 5e-3, "batch_size": 2}


@contextlib.contextmanager
def launched(rank: int) -> Iterator[None]:
    """The environment that torchrun gives, which accelerate reads."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in values.items()}):
        yield


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def curve(trainer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in _trainer.steps_of(trainer.state)]


# ---- training ----


def train_two(rank: int, directory: str, accumulate: int) -> tuple[list, dict]:
    model = adapted(attention_dropout=0.0)
    if rank == 1:
        with torch.no_grad():  # as another machine might have started; the first process decides
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
    with launched(rank):
        trainer = trainer_of(model, unequal(8), Path(directory), gradient_accumulation_steps=accumulate, **BOTH)
        trainer.train()
    return curve(trainer), trained_parameters(model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_curve_is_that_of_one_process(pair, tmp_path, accumulate):
    (ours, parameters), (others, other_parameters) = pair.run(train_two, str(tmp_path), accumulate)
    assert ours == others
    assert_same(parameters, other_parameters)
    alone = adapted(attention_dropout=0.0)
    # Four batches, which two processes share without a rest.
    trainer = trainer_of(alone, unequal(8), tmp_path, gradient_accumulation_steps=2 * accumulate, **BOTH)
    trainer.train()
    expected = curve(trainer)
    assert [entry["tokens"] for entry in ours] == [entry["tokens"] for entry in expected]
    for name, tolerance in [("loss", 1e-5), ("grad_norm", 1e-4), ("lr", 1e-12)]:
        assert [e[name] for e in ours] == pytest.approx([e[name] for e in expected], rel=tolerance), name
    assert expected[-1]["loss"] < 0.97 * expected[0]["loss"]
    assert_close(parameters, trained_parameters(alone))


class StopAt(_trainer.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def stop_and_resume(rank: int, directory: str) -> None:
    """Bit for bit, dropout included: each process goes on with its own random state."""
    options = {**BOTH, "steps": 8, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    data, run = unequal(), Path(directory) / "run"
    with launched(rank):
        whole = adapted()
        trainer = trainer_of(whole, data, Path(directory) / "whole", **options)
        trainer.train()
        expected = curve(trainer)
        with pytest.raises(KeyboardInterrupt):
            trainer_of(adapted(), data, run, callbacks=[StopAt(6)], **options).train()
        assert last_checkpoint(run) == run / "checkpoint-4"
        model = adapted()
        trainer = trainer_of(model, data, run, **options)
        trainer.train(resume_from_checkpoint=True)
    assert curve(trainer) == expected
    assert_same(trained_parameters(model), trained_parameters(whole))
    assert {path.name for path in (run / "checkpoint-8").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert not (run / ".incomplete").exists()


def test_resuming_gives_the_same_curve_bit_for_bit(pair, tmp_path):
    pair.run(stop_and_resume, str(tmp_path))


def fail_in_one(rank: int, directory: str) -> None:
    data, run = unequal(), Path(directory)
    with launched(rank):
        # A loss that is not finite, in the second process alone: both stop before that step.
        model = adapted()
        trainer = trainer_of(model, data, run, **BOTH)
        forward = model.forward
        if rank == 1:
            model.forward = lambda **batch: poisoned(forward(**batch))
        before = trained_parameters(model)
        refused(FloatingPointError, trainer.train, "loss is nan", "at step 1")
        if rank == 0:  # process 1 gets its parameters
            assert_same(trained_parameters(model), before)
        # The same for a gradient.
        model = adapted()
        if rank == 1:
            model.model.layers[0].mlp.up_proj.lora_B.register_hook(lambda gradient: gradient * math.inf)
        trainer = trainer_of(model, data, run, **BOTH)
        refused(FloatingPointError, trainer.train, "gradient's norm", "at step 1")
        assert_same(trained_parameters(model), before)
        # A disk that is full, in the process that writes.
        trainer = trainer_of(adapted(), data, run, save_strategy="steps", **BOTH)
        kind, text = (OSError, "could not be written") if rank == 0 else (OtherProcessFailed, "Process 0 of 2")
        with full_disk(5_000) if rank == 0 else contextlib.nullcontext():
            refused(kind, trainer.train, text)
    if rank == 0:  # the other may look while this one removes what it wrote
        assert list(run.iterdir()) == []


def poisoned(output: Any) -> Any:
    output["loss"] = output["loss"] * math.nan
    return output


def test_an_error_in_one_process_ends_both(pair, tmp_path):
    pair.run(fail_in_one, str(tmp_path))


def say_it_once(rank: int) -> None:
    def fail():
        with launched(rank), mock.patch.dict(os.environ, {"TORCHELASTIC_RUN_ID": "x"}), ended_together(ValueError):
            raise ValueError("in both")

    refused(ValueError if rank == 0 else OtherProcessFailed, fail, "in both" if rank == 0 else "process 0 says why")


def test_what_ends_all_is_said_by_one(pair):
    pair.run(say_it_once)


def evaluate_two(rank: int, batch_size: int) -> Any:
    return evaluate(adapted(), unequal(), batch_size=batch_size, progress=False)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_perplexity_is_that_of_one_process(pair, batch_size):
    ours, others = pair.run(evaluate_two, batch_size)
    assert ours == others
    alone = evaluate(adapted(), unequal(), batch_size=7, progress=False)
    assert ours.tokens == alone.tokens
    assert ours.loss == pytest.approx(alone.loss, rel=1e-6)


def share(rank: int) -> None:
    assert summed(torch.tensor([rank + 1.0, 2.0])).tolist() == [3.0, 4.0]
    assert from_first({"rank": rank}) == {"rank": 0}


def test_sums_and_copies(pair):
    pair.run(share)


# ---- the gradient start ----


def estimate(rank: int, split: int) -> dict:
    batches = regression_batches(3)
    mine = batches[:split] if rank == 0 else batches[split:]
    return estimate_gradients(tiny_net(), mine, loss_fn=regression_loss)


@pytest.mark.parametrize("split", [2, 3])
def test_every_process_gets_the_mean_over_the_batches_of_all(pair, split):
    """Process 0 has two batches and process 1 one, or none: a mean of means would differ."""
    expected = estimate_gradients(tiny_net(), regression_batches(3), loss_fn=regression_loss)
    for gradients in pair.run(estimate, split):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name])


def start_from_gradients(rank: int) -> dict:
    model = tiny_llama()
    gradients = estimate_gradients(model, [batch(rank)])
    model = converted("2:4")
    init_from_gradients(model, gradients)
    return trained_values(model)


def test_the_start_is_the_same_in_every_process(pair):
    ours, others = pair.run(start_from_gradients)
    assert_same(ours, others)
    model = tiny_llama()
    gradients = estimate_gradients(model, [batch(0), batch(1)])
    expected = converted("2:4")
    init_from_gradients(expected, gradients)
    for name, value in trained_values(expected).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def fail_to_estimate(rank: int) -> None:
    batches = regression_batches(2)
    if rank == 1:
        batches[1][0][0] = math.nan
    kind, text = (ValueError, "batch 1 is nan") if rank == 1 else (OtherProcessFailed, "Process 1 of 2 failed")
    refused(kind, lambda: estimate_gradients(tiny_net(), batches, loss_fn=regression_loss), text)
    # Nobody has a batch.
    refused(ValueError, lambda: estimate_gradients(tiny_net(), [], loss_fn=regression_loss), "batches is empty")


def test_no_process_waits_for_one_that_failed(pair):
    pair.run(fail_to_estimate)


# ---- a process that is gone: the last test, because the pair must be started anew after it ----


def die_in_one(rank: int, directory: str) -> str:
    die = _trainer.TrainerCallback()
    die.on_step_end = lambda args, state, control, **_: os._exit(9) if rank == 1 and state.global_step == 2 else None

    def train():
        with launched(rank), ended_together(FloatingPointError):
            trainer_of(adapted(), unequal(), Path(directory), callbacks=[die], **BOTH).train()

    return refused(ConnectionError, train, "Another process ended")


def test_a_process_that_is_gone_ends_the_other(pair, tmp_path):
    (fine, text), (other_fine, other_text) = pair.answers(die_in_one, str(tmp_path))
    assert fine, text
    assert "so this one ends too" in text
    assert not other_fine
    assert other_text == "the process ended"
