# SPDX-License-Identifier: Apache-2.0
"""train and estimate_gradients in two processes: the results of one, resuming, and errors that end both."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from distributed_cases import assert_close, converted, shard, trained_values
from test_gradients import regression_batches, regression_loss, tiny_net
from test_training import StopHere, adapted, assert_same, curve, stop_at, trained_parameters
from torch.nn.parallel import DistributedDataParallel

from byte_model import TEXT, byte_tokenizer, full_disk
from lors_cuda import estimate_gradients, init_from_gradients
from lors_cuda._distributed import OtherProcessFailed, copy_from_first, from_first, sum_gradients
from lors_cuda.data import TokenDataset
from lors_cuda.training import TrainingConfig, train
from lors_cuda.training_files import CHECKPOINT_NAME, LOG_NAME, read_log
from models import batch, refused, tiny_llama

pytest_plugins = ["pair"]

BOTH = TrainingConfig(steps=6, lr=5e-3, batch_size=3)  # of unequal length: see padded()
CHECKPOINTED = TrainingConfig(steps=8, lr=3e-3, batch_size=3, accumulate=2, checkpoint_every=4)


def padded() -> TokenDataset:
    records = [(i, {"prompt": TEXT[i : i + 9], "completion": TEXT[40 : 45 + 6 * i]}) for i in range(7)]
    return TokenDataset.from_records(records, byte_tokenizer(), 64)


# ---- training ----


def train_two(rank: int, accumulate: int) -> tuple[list, dict]:
    model = adapted(attention_dropout=0.0)
    if rank == 1:
        with torch.no_grad():  # as another machine might have started; the first process decides
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
    config = TrainingConfig(steps=6, lr=5e-3, batch_size=3, accumulate=accumulate)
    return curve(train(model, padded(), config)), trained_parameters(model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_curve_is_that_of_one_process(pair, accumulate):
    (ours, parameters), (others, other_parameters) = pair.run(train_two, accumulate)
    assert ours == others
    assert_same(parameters, other_parameters)
    alone = adapted(attention_dropout=0.0)
    config = TrainingConfig(steps=6, lr=5e-3, batch_size=3, accumulate=2 * accumulate)
    expected = curve(train(alone, padded(), config))
    assert [entry["tokens"] for entry in ours] == [entry["tokens"] for entry in expected]
    for name, tolerance in [("loss", 1e-5), ("grad_norm", 1e-4), ("lr", 1e-12)]:
        assert [e[name] for e in ours] == pytest.approx([e[name] for e in expected], rel=tolerance), name
    assert expected[-1]["loss"] < 0.97 * expected[0]["loss"]
    assert_close(parameters, trained_parameters(alone))


def stop_and_resume(rank: int, directory: str) -> None:
    """Bit for bit, dropout included: each process goes on with its own random state."""
    data, mine = padded(), Path(directory) / str(rank)
    mine.mkdir()
    whole = adapted()
    expected = curve(train(whole, data, CHECKPOINTED))
    with pytest.raises(StopHere if rank == 0 else OtherProcessFailed):
        train(adapted(), data, CHECKPOINTED, directory=mine, on_step=stop_at(6) if rank == 0 else None)
    # Only the first process has files; the others need none.
    assert (rank == 0) == (mine / CHECKPOINT_NAME).exists() == (mine / LOG_NAME).exists()
    model = adapted()
    entries = train(model, data, CHECKPOINTED, directory=mine, resume=True)
    assert curve(entries) == expected
    assert_same(trained_parameters(model), trained_parameters(whole))
    if rank == 0:
        assert curve(read_log(mine / LOG_NAME)) == expected


def test_resuming_gives_the_same_curve_bit_for_bit(pair, tmp_path):
    pair.run(stop_and_resume, str(tmp_path))
    refused(ValueError, lambda: train(adapted(), padded(), CHECKPOINTED, directory=tmp_path / "0", resume=True),
            "other settings", "processes was 2, is 1")  # fmt: skip


def fail_in_one(rank: int, directory: str) -> None:
    data = padded()
    # A loss that is not finite, in the second process alone.
    model = adapted()
    before = trained_parameters(model)
    if rank == 1:
        model.model.norm.weight.data[0] = math.nan
    kind, text = (FloatingPointError, "at step 1") if rank == 1 else (OtherProcessFailed, "Process 1 of 2 failed")
    refused(kind, lambda: train(model, data, BOTH), text)
    assert_same(trained_parameters(model), before)
    # A gradient that is not finite is so in both, after it was added up; one says so.
    model = adapted()
    if rank == 1:
        model.model.layers[0].mlp.up_proj.lora_B.register_hook(lambda gradient: gradient * math.inf)
    kind, text = (FloatingPointError, "gradient's norm") if rank == 0 else (OtherProcessFailed, "Process 0 of 2")
    refused(kind, lambda: train(model, data, BOTH), text)
    assert_same(trained_parameters(model), before)
    # A disk that is full, in the process that writes.
    kind, text = (OSError, "could not be written") if rank == 0 else (OtherProcessFailed, "Process 0 of 2")
    with full_disk(20_000):
        refused(kind, lambda: train(adapted(), data, BOTH, directory=Path(directory)), text)


def test_an_error_in_one_process_ends_both(pair, tmp_path):
    pair.run(fail_in_one, str(tmp_path))


def refuse_wrappers(rank: int) -> None:
    data = padded()
    refused(ValueError, lambda: train(DistributedDataParallel(adapted()), data, BOTH), "pass model.module")
    model = converted("2:4")
    shard(model)
    refused(ValueError, lambda: train(model, data, BOTH), "sharded by fully_shard", "whole copy")


def test_wrapped_models_are_refused(pair):
    pair.run(refuse_wrappers)


# ---- what training is made of ----


def add_gradients(rank: int) -> None:
    """A parameter that one process does not reach, one that none reaches, and two dtypes."""
    shapes = [((3,), torch.float32), ((2, 2), torch.float32), ((2,), torch.bfloat16), ((1,), torch.float32)]
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
    parameters[0].grad = torch.full((3,), 1.0 + rank)
    if rank == 1:
        parameters[1].grad = torch.arange(4.0).view(2, 2).T  # not contiguous
    parameters[2].grad = torch.full((2,), 0.5 + rank, dtype=torch.bfloat16)
    sum_gradients(parameters)
    assert parameters[0].grad.tolist() == [3.0] * 3
    assert parameters[1].grad.tolist() == [[0.0, 2.0], [1.0, 3.0]]
    assert parameters[2].grad.tolist() == [2.0] * 2
    assert parameters[2].grad.dtype == torch.bfloat16
    assert parameters[3].grad is None
    tensors = [torch.tensor([rank + 5]), torch.full((2, 2), float(rank))]
    copy_from_first(tensors)
    assert tensors[0].tolist() == [5]
    assert not tensors[1].any()
    assert from_first({"rank": rank}) == {"rank": 0}


def test_sums_and_copies(pair):
    pair.run(add_gradients)


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


def die_in_one(rank: int) -> str:
    data = padded()

    def die(entry):
        if rank == 1 and entry["step"] == 2:
            os._exit(9)

    return refused(ConnectionError, lambda: train(adapted(), data, BOTH, on_step=die), "Another process ended")


def test_a_process_that_is_gone_ends_the_other(pair):
    (fine, text), (other_fine, other_text) = pair.answers(die_in_one)
    assert fine, text
    assert "so this one ends too" in text
    assert not other_fine
    assert other_text == "the process ended"
