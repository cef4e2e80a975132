# SPDX-License-Identifier: Apache-2.0
"""The training loop: what a step computes, resuming bit for bit, stopping with a sentence, perplexity, files."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from byte_model import TEXT, byte_llama, byte_tokenizer, full_disk
from lors_cuda.config import LoRSConfig
from lors_cuda.data import TokenDataset
from lors_cuda.model import get_lors_model
from lors_cuda.pruning import prune
from lors_cuda.training import TrainingConfig, evaluate, train
from lors_cuda.training_files import CHECKPOINT_NAME, LOG_NAME, StepLog, plot_loss, read_log
from models import refused


@pytest.fixture(scope="module")
def text() -> TokenDataset:
    return TokenDataset.from_text(TEXT, byte_tokenizer(), 48)


@pytest.fixture(scope="module")
def padded() -> TokenDataset:
    records = [(i, {"prompt": TEXT[i : i + 9], "completion": TEXT[40 : 45 + 6 * i]}) for i in range(7)]
    return TokenDataset.from_records(records, byte_tokenizer(), 64)


def adapted(**fields) -> nn.Module:
    """A sparse model with adapters; attention dropout makes training depend on the random state."""
    model = byte_llama(**{"attention_dropout": 0.1, **fields})
    prune(model, "2:4", method="magnitude")
    torch.manual_seed(7)
    return get_lors_model(model, LoRSConfig(r=4, lora_alpha=8))


def curve(entries):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def trained_parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class StopHere(Exception):
    pass


def stop_at(step):
    def check(entry):
        if entry["step"] == step:
            raise StopHere

    return check


# ---- a step ----


def test_loss_falls_and_only_adapters_change(text):
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval()
    entries = train(model, text, TrainingConfig(steps=30, lr=5e-3, batch_size=4))
    assert [entry["step"] for entry in entries] == list(range(1, 31))
    assert sum(e["loss"] for e in entries[-5:]) < 0.9 * sum(e["loss"] for e in entries[:5])
    assert all(entry["tokens"] == 4 * 47 for entry in entries if entry["tokens"] % 47 == 0)
    assert not model.training
    assert model.config.use_cache
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_one_step_is_adamw_on_the_clipped_gradient(padded):
    config = TrainingConfig(steps=1, lr=1e-2, warmup_steps=0, schedule="constant", batch_size=3, max_grad_norm=0.01)
    model, oracle = adapted(attention_dropout=0.0), adapted(attention_dropout=0.0)
    (entry,) = train(model, padded, config)
    (batch,) = padded.shuffled_batches(3, 1, config.seed)
    oracle.train()
    loss = oracle(**batch).loss
    loss.backward()
    parameters = [p for p in oracle.parameters() if p.requires_grad]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert entry["loss"] == loss.item()
    assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 0.01
    for parameter in parameters:
        parameter.grad *= 0.01 / (norm + 1e-6)
    torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0).step()
    for name, parameter in trained_parameters(model).items():
        torch.testing.assert_close(parameter, oracle.get_parameter(name), rtol=1e-4, atol=1e-7)


def test_accumulation_weighs_batches_by_their_tokens(padded):
    """Batches of unequal length in three parts give the step of one large batch."""
    whole, parts = adapted(attention_dropout=0.0), adapted(attention_dropout=0.0)
    (one,) = train(whole, padded, TrainingConfig(steps=1, batch_size=6, lr=1e-2))
    (three,) = train(parts, padded, TrainingConfig(steps=1, batch_size=2, accumulate=3, lr=1e-2))
    assert three["tokens"] == one["tokens"]
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert three["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_learning_rate():
    cosine = TrainingConfig(steps=100, warmup_steps=10)
    factors = [cosine.lr_factor(step) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert 0 < factors[0] < 0.1
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    constant = TrainingConfig(steps=100, schedule="constant")
    assert [constant.lr_factor(step) for step in range(2, 6)] == [0.75, 1.0, 1.0, 1.0]
    assert TrainingConfig(steps=1, warmup_steps=0).lr_factor(0) == 1.0


def test_global_random_state_is_left_alone(text):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train(adapted(), text, TrainingConfig(steps=1))
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), expected)
    state = torch.get_rng_state()
    model = adapted()
    torch.set_rng_state(state)
    train(model, text, TrainingConfig(steps=1, seed=9))
    assert torch.equal(torch.get_rng_state(), state)


# ---- resuming ----

RESUMED = TrainingConfig(steps=12, lr=3e-3, batch_size=4, accumulate=2, checkpoint_every=4)


@pytest.fixture(scope="module")
def uninterrupted(text):
    model = adapted()
    entries = train(model, text, RESUMED)
    return curve(entries), trained_parameters(model)


@pytest.mark.parametrize("stopped_at", [3, 4, 7, 11])
def test_resuming_gives_the_same_curve_bit_for_bit(text, uninterrupted, tmp_path, stopped_at):
    with pytest.raises(StopHere):
        train(adapted(), text, RESUMED, directory=tmp_path, on_step=stop_at(stopped_at))
    assert [entry["step"] for entry in read_log(tmp_path / LOG_NAME)] == list(range(1, stopped_at + 1))
    with open(tmp_path / LOG_NAME, "a") as log:
        log.write('{"step": 99, "lo')  # as a kill would leave it
    model = adapted()
    steps_done = []
    entries = train(model, text, RESUMED, directory=tmp_path, resume=True, on_step=steps_done.append)
    # stop_at raises before the checkpoint of its own step is written
    assert steps_done[0]["step"] == (stopped_at - 1) // 4 * 4 + 1
    expected_curve, expected_parameters = uninterrupted
    assert curve(entries) == expected_curve
    assert curve(read_log(tmp_path / LOG_NAME)) == expected_curve
    assert_same(trained_parameters(model), expected_parameters)


def test_resuming_a_finished_run_changes_nothing(text, uninterrupted, tmp_path):
    train(adapted(), text, RESUMED, directory=tmp_path)
    log = (tmp_path / LOG_NAME).read_bytes()
    model = adapted()
    entries = train(model, text, RESUMED, directory=tmp_path, resume=True)
    assert curve(entries) == uninterrupted[0]
    assert_same(trained_parameters(model), uninterrupted[1])
    assert (tmp_path / LOG_NAME).read_bytes() == log


def test_starting_anew_forgets_the_old_checkpoint(text, tmp_path):
    train(adapted(), text, RESUMED, directory=tmp_path)
    with pytest.raises(StopHere):
        train(adapted(), text, RESUMED, directory=tmp_path, on_step=stop_at(2))
    assert not (tmp_path / CHECKPOINT_NAME).exists()
    assert len(read_log(tmp_path / LOG_NAME)) == 2


@pytest.fixture
def finished(text, tmp_path):
    train(adapted(), text, TrainingConfig(steps=2), directory=tmp_path, identity={"init": "default"})
    return tmp_path


def test_resuming_with_other_settings_is_refused(text, padded, finished):
    def resume(config=TrainingConfig(steps=2), data=text, init="default"):  # noqa: B008
        return train(adapted(), data, config, directory=finished, resume=True, identity={"init": init})

    assert len(resume(TrainingConfig(steps=2, checkpoint_every=1))) == 2
    refused(ValueError, lambda: resume(TrainingConfig(steps=3)), "other settings", "steps was 2, is 3")
    refused(ValueError, lambda: resume(TrainingConfig(steps=2, seed=1)), "seed was 0, is 1")
    refused(ValueError, lambda: resume(init="gradient"), "init was 'default', is 'gradient'")
    refused(ValueError, lambda: resume(data=padded), "data was")
    with pytest.raises(ValueError, match="another model"):
        train(
            get_lors_model(byte_llama(), LoRSConfig(r=2)),
            text, TrainingConfig(steps=2), directory=finished, resume=True, identity={"init": "default"},
        )  # fmt: skip


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("damage", ["truncated", "text", "pickle"])
def test_a_damaged_checkpoint_is_refused(text, finished, damage, capsys):
    path = finished / CHECKPOINT_NAME
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[:-200], "text": b"hello", "pickle": pickle.dumps(Malicious(), protocol=2)}[damage]
    )
    call = lambda: train(adapted(), text, TrainingConfig(steps=2), directory=finished, resume=True)  # noqa: E731
    refused(ValueError, call, CHECKPOINT_NAME, "truncated or corrupted")
    assert "must not run" not in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_checkpoint(text, uninterrupted, tmp_path):
    model = adapted()
    with pytest.raises(StopHere):
        train(model, text, RESUMED, directory=tmp_path, on_step=stop_at(6))
    before = (tmp_path / CHECKPOINT_NAME).read_bytes()

    def until_full(entry):
        if entry["step"] == 8:  # its checkpoint finds the disk full; the log is small enough
            disk.__enter__()

    disk = full_disk(20_000)
    try:
        message = refused(
            OSError,
            lambda: train(adapted(), text, RESUMED, directory=tmp_path, resume=True, on_step=until_full),
            CHECKPOINT_NAME, "could not be written", "before is unchanged",
        )  # fmt: skip
    finally:
        disk.__exit__(None, None, None)
    assert "File too large" in message
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT_NAME, LOG_NAME]
    entries = train(adapted(), text, RESUMED, directory=tmp_path, resume=True)
    assert curve(entries) == uninterrupted[0]


# ---- stopping ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(text, tmp_path, value):
    model = adapted()
    weight = model.model.norm.weight

    def poison(entry):
        if entry["step"] == 3:
            weight.data[0] = value
            poison.parameters = trained_parameters(model)

    config = TrainingConfig(steps=6, checkpoint_every=2)
    refused(
        FloatingPointError,
        lambda: train(model, text, config, directory=tmp_path, on_step=poison),
        "loss is nan" if value != math.inf else "loss is", "at step 4", "learning rate",
    )  # fmt: skip
    assert_same(trained_parameters(model), poison.parameters)
    assert [entry["step"] for entry in read_log(tmp_path / LOG_NAME)] == [1, 2, 3]


def test_a_gradient_that_is_not_finite_stops_before_the_step(text):
    model = adapted()
    before = trained_parameters(model)
    model.model.layers[0].mlp.up_proj.lora_B.register_hook(lambda gradient: gradient * math.inf)
    refused(FloatingPointError, lambda: train(model, text, TrainingConfig(steps=2)), "gradient's norm", "at step 1")
    assert_same(trained_parameters(model), before)


def test_refusals(text):
    model = byte_llama().requires_grad_(False)
    refused(ValueError, lambda: train(model, text, TrainingConfig()), "nothing to train")
    for fields, fragment in [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"schedule": "linear"}, "'cosine' or 'constant'"),
        ({"steps": 3, "warmup_steps": 4}, "between 0 and steps = 3"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
    ]:
        refused(ValueError, lambda fields=fields: TrainingConfig(**fields), fragment)


# ---- perplexity ----


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_perplexity_weighs_tokens_and_ignores_padding(padded, batch_size):
    model = byte_llama()
    model.train()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in padded.examples:
            log_probabilities = model(input_ids=ids.long()[None]).logits[0].double().log_softmax(-1)
            for position in range(1, len(ids)):
                if labels[position] >= 0:
                    total -= log_probabilities[position - 1, labels[position]].item()
                    count += 1
    measured = evaluate(model, padded, batch_size=batch_size)
    assert measured.tokens == count == padded.loss_tokens
    assert measured.loss == pytest.approx(total / count, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert model.training


def test_perplexity_of_a_broken_model_is_an_error(padded):
    model = byte_llama()
    model.model.norm.weight.data[0] = math.nan
    refused(FloatingPointError, lambda: evaluate(model, padded), "batch 1", "nan")


# ---- files ----


def test_log_is_read_up_to_the_first_line_that_is_not_whole(tmp_path):
    path = tmp_path / LOG_NAME
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n{"step": 3, "lo')
    assert [entry["step"] for entry in read_log(path)] == [1, 2]
    assert read_log(tmp_path / "none.jsonl") == []
    with StepLog(tmp_path, 1) as log:
        log.append({"step": 2, "loss": 1.0})
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.0}\n'


def test_plot_is_a_png_and_is_replaced_whole(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    entries = [{"step": step, "loss": 5 / step} for step in range(1, 100)]
    plot_loss(entries, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    with full_disk(1000):
        refused(OSError, lambda: plot_loss(entries, path), "loss.png", "could not be written")
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
