# SPDX-License-Identifier: Apache-2.0
"""transformers.Trainer on a converted model: mixed precision, checkpointing, accumulation, checkpoints, resuming."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accelerate_state import own_accelerate  # noqa: F401  (a fixture)
from byte_model import byte_tokenizer, full_disk
from cli_calls import tree
from lors_cuda import LoRSConfig, get_lors_model, load_adapter, merge_and_unload, named_lors_layers
from lors_cuda._files import explained
from lors_cuda.hf import LoRSTrainerMixin, last_checkpoint
from models import assert_unchanged, refused, snapshot, tiny_llama
from trainer_runs import STEPS, AdapterTrainer, checkpoint, converted, losses, make_trainer, transformers

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
RESUME_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradient", ["lors", "exact"])
def test_gradient_checkpointing_in_both_modes_changes_nothing(tmp_path, gradient, reentrant):
    plain = make_trainer(tmp_path, model=converted(gradient=gradient), bf16=True, save_strategy="no")
    start = adapters(plain.model)
    plain.train()
    trained = adapters(plain.model)
    assert all(not torch.equal(trained[name], start[name]) for name in start)
    trainer = make_trainer(
        tmp_path,
        model=converted(gradient=gradient),
        bf16=True,
        save_strategy="no",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    trainer.train()
    # What is recomputed is what was computed: the same operators on the same values, on the CPU bit for bit.
    assert losses(trainer) == losses(plain)
    assert_same(adapters(trainer.model), trained)


def test_a_bfloat16_model_trains_float32_adapters_and_merges_with_every_zero(tmp_path):
    model = get_lors_model(tiny_llama(dtype=torch.bfloat16), LoRSConfig(r=4, lora_alpha=8))
    masks = {name: layer.sparse_weight.mask() for name, layer in named_lors_layers(model)}
    start = adapters(model)
    trainer = make_trainer(tmp_path, model=model, bf16=True, save_strategy="no")
    trainer.train()
    trained = adapters(trainer.model)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert all(not torch.equal(trained[name], start[name]) for name in start)
    merged = merge_and_unload(trainer.model)
    for name, mask in masks.items():
        assert not merged.get_submodule(name).weight[~mask].any(), name


def test_gradient_accumulation_is_the_larger_batch(tmp_path):
    accumulated = make_trainer(tmp_path, save_strategy="no", max_steps=1)
    whole = make_trainer(
        tmp_path, save_strategy="no", max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    for trainer in (accumulated, whole):
        trainer.train()
    first, second = accumulated.state.log_history[0], whole.state.log_history[0]
    # Sums in another order: a few units of float32's last place, of numbers that are means over the same tokens.
    for key in ("loss", "grad_norm"):
        assert first[key] == pytest.approx(second[key], rel=16 * torch.finfo(torch.float32).eps), key


@pytest.mark.parametrize("kind", [AdapterTrainer, transformers.Trainer], ids=["mixin", "plain"])
@pytest.mark.parametrize("layout", ["2:4", "bitmap"])
def test_resumes_with_the_same_loss_curve(tmp_path, kind, layout):
    first = make_trainer(tmp_path, model=converted(layout=layout), kind=kind, bf16=True)
    first.train()
    files = {path.name for path in checkpoint(tmp_path).iterdir()}
    if kind is AdapterTrainer:
        assert files == ADAPTER_FILES | RESUME_FILES | {"checksums.json"}
    else:  # what the documentation says happens without the mixin
        assert {"model.safetensors", "config.json"} | RESUME_FILES <= files
    again = make_trainer(tmp_path, model=converted(layout=layout), kind=kind, bf16=True)
    again.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    assert len(losses(again)) == STEPS
    assert losses(again) == losses(first)
    assert_same(adapters(again.model), adapters(first.model))


def test_a_checkpoint_is_an_adapter_directory(tmp_path):
    trainer = make_trainer(tmp_path, model=converted(modules_to_save=["model.norm"]))
    trainer.train()
    model = load_adapter(tiny_llama(), checkpoint(tmp_path, STEPS))
    assert_same(adapters(model), adapters(trainer.model))
    trainer.save_model(str(tmp_path / "last"))
    assert {path.name for path in (tmp_path / "last").iterdir()} == ADAPTER_FILES


def test_the_tokenizer_is_saved_beside_the_adapter(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.processing_class = transformers.ByT5Tokenizer()
    trainer.save_model()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "ByT5Tokenizer"


def test_a_whole_checkpoint_is_resumed_through_the_mixin(tmp_path):
    first = make_trainer(tmp_path, kind=transformers.Trainer)
    first.train()
    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    assert losses(again) == losses(first)


def test_a_trainer_without_the_mixin_refuses_its_checkpoints(tmp_path):
    make_trainer(tmp_path).train()
    plain = make_trainer(tmp_path, kind=transformers.Trainer)
    refused(ValueError, lambda: plain.train(resume_from_checkpoint=str(checkpoint(tmp_path))), "checkpoint")


def test_resuming_on_another_mask_is_refused_and_changes_nothing(tmp_path):
    make_trainer(tmp_path).train()
    other = make_trainer(tmp_path, model=converted(seed=1))
    before = snapshot(other.model)
    refused(
        ValueError,
        lambda: other.train(resume_from_checkpoint=str(checkpoint(tmp_path))),
        "another sparsity mask",
        "layers.0.self_attn.q_proj",
    )
    assert_unchanged(other.model, before)


def test_importing_it_without_transformers_is_explained():
    code = "import sys; sys.modules['transformers'] = None; import lors_cuda; import lors_cuda.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: lors_cuda.hf needs transformers")
    assert "pip install 'lors-cuda[hf]'" in last


def test_a_process_that_is_not_to_save_writes_nothing(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer.save_model(str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_sharded_trainer_keeps_its_own_checkpoints(tmp_path, sharding):
    calls = []

    class Sharded:
        is_fsdp_enabled = is_deepspeed_enabled = False
        state = transformers.TrainerState(best_model_checkpoint=str(tmp_path))

        def _save(self, output_dir=None, state_dict=None):
            calls.append((output_dir, state_dict))

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            calls.append((resume_from_checkpoint, model))

        def _load_best_model(self):
            calls.append("best")

    class Adapter(LoRSTrainerMixin, Sharded):
        pass

    (tmp_path / "adapter_config.json").write_text("{}")  # even there
    trainer = Adapter()
    setattr(trainer, sharding, True)
    trainer._save("where", {"a": 1})
    trainer._load_from_checkpoint(str(tmp_path), "model")
    trainer._load_best_model()
    assert calls == [("where", {"a": 1}), (str(tmp_path), "model"), "best"]


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path,
        learning_rate=3.0,  # so high that the loss rises and the first checkpoint is the best
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith(f"-{STEPS}")
    assert_same(adapters(trainer.model), adapters(load_adapter(tiny_llama(), best)))
    assert Path(best).parent == tmp_path
    state = json.loads((Path(best) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best  # not where it was being written


# ---- checkpoints are complete or not there ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[float]]:
    """A run with checkpoints at steps 2, 4 and 6, and its losses; tests must not change it."""
    directory = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(directory, save_steps=2)
    trainer.train()
    return directory, losses(trainer)


def resumed(directory: Path) -> list[float]:
    trainer = make_trainer(directory, save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    return losses(trainer)


def test_true_resumes_from_the_newest(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-4"
    assert resumed(tmp_path / "run") == finished[1]


@pytest.mark.parametrize("name", sorted(ADAPTER_FILES | RESUME_FILES | {"checksums.json"}))
def test_a_checkpoint_cut_at_any_byte_is_skipped_and_named(finished, tmp_path, name):
    shutil.copytree(finished[0], tmp_path / "run")
    newest = tmp_path / "run/checkpoint-6"
    content = (newest / name).read_bytes()
    step = max(1, len(content) // 200)
    for length in [*range(0, len(content), step), len(content) - 1]:
        (newest / name).write_bytes(content[:length])
        with pytest.warns(UserWarning, match=rf"checkpoint-6' is incomplete: its {name} .*; it is skipped"):
            assert last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-4"
    (newest / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as long as it was
    with pytest.warns(UserWarning, match=f"its {name}"):
        assert last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-4"
    (newest / name).unlink()
    if name != "checksums.json":  # without it, it is judged as the Trainer's own
        with pytest.warns(UserWarning, match=f"its {name} is missing"):
            assert last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-4"
    if name == "optimizer.pt":
        with pytest.warns(UserWarning, match="skipped"):
            assert resumed(tmp_path / "run") == finished[1]
        assert last_checkpoint(tmp_path / "run") == newest  # it was written again


def test_an_incomplete_checkpoint_that_is_asked_for_is_refused(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    newest = tmp_path / "run/checkpoint-6"
    (newest / "optimizer.pt").write_bytes(b"")
    refused(
        ValueError,
        lambda: make_trainer(tmp_path / "run").train(resume_from_checkpoint=str(newest)),
        "checkpoint-6' is incomplete: its optimizer.pt was cut short or changed",
    )
    for path in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(path)
    call = lambda: make_trainer(tmp_path / "run").train(resume_from_checkpoint=True)  # noqa: E731
    refused(ValueError, call, "no complete checkpoint")


@pytest.mark.parametrize("writer", ["save_adapter", "state", "seal"])
def test_killed_while_it_saves(finished, tmp_path, writer):
    """A process that ends in the middle of a checkpoint leaves the one before, and says so when it goes on."""
    program = f"""
import os, sys
from pathlib import Path
sys.path[:0] = {sys.path!r}
import lors_cuda.hf, torch, transformers
from trainer_runs import AdapterTrainer, make_trainer
trainer = make_trainer(Path({str(tmp_path)!r}), save_steps=2)
def ending(call):
    def then_end(*args, **kwargs):
        result = call(*args, **kwargs)
        if trainer.state.global_step == 4:
            os._exit(9)
        return result
    return then_end
if {writer!r} == "save_adapter": lors_cuda.hf.save_adapter = ending(lors_cuda.hf.save_adapter)
if {writer!r} == "seal": lors_cuda.hf.seal = ending(lors_cuda.hf.seal)
if {writer!r} == "state": transformers.TrainerState.save_to_json = ending(transformers.TrainerState.save_to_json)
trainer.train()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".incomplete", "checkpoint-2"]
    with pytest.warns(UserWarning, match=r"\.incomplete/checkpoint-4' was being written when the run ended"):
        assert resumed(tmp_path) == finished[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("free", [0, 5_000, 20_000])
def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(finished, tmp_path, free):
    class Fill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                disk.__enter__()

    disk = full_disk(free)
    trainer = make_trainer(tmp_path, save_steps=2, save_total_limit=1, callbacks=[Fill()])
    trainer.remove_callback(transformers.PrinterCallback)  # its output is captured in a file
    try:
        message = refused(OSError, trainer.train, "checkpoint-4' could not be written", "before is unchanged")
    finally:
        disk.__exit__(None, None, None)
    assert message.count("could not be written") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert resumed(tmp_path) == finished[1]


def test_a_full_disk_while_the_adapter_is_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.processing_class = byte_tokenizer()
    trainer.save_model()
    before = tree(tmp_path)
    assert {*ADAPTER_FILES, "tokenizer_config.json"} <= set(before)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)
    for free in (0, 5_000):  # training_args.bin, by torch, has about this many bytes
        with full_disk(free):
            message = refused(OSError, trainer.save_model, f"'{tmp_path}' could not be written", "before is unchanged")
        assert message.count("could not be written") == 1
        assert tree(tmp_path) == before
    trainer.save_model()
    assert tree(tmp_path)["adapter_model.safetensors"] != before["adapter_model.safetensors"]


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0",
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "basic_ios::clear: iostream error",
    ],
)
def test_torch_s_errors_of_a_full_disk_are_known(tmp_path, words):
    def fail():
        with explained(tmp_path):
            raise RuntimeError(words)

    assert str(refused(OSError, fail, "the disk is full, or failed")).startswith(f"'{tmp_path}' could not be written")


def test_older_checkpoints_go_after_the_new_one_is_there(tmp_path, monkeypatch):
    seen = []
    replace = os.rename

    def renamed(source, target):
        replace(source, target)
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))

    monkeypatch.setattr(os, "rename", renamed)
    make_trainer(tmp_path, save_steps=2, save_total_limit=1).train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


# ---- what is not finite stops ----


class Poison(transformers.TrainerCallback):
    """Makes the model's next loss not finite, and keeps what is trained as it is then."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.adapters: dict[str, torch.Tensor] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.model.norm.weight.data[0] = self.value
            self.adapters = adapters(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, value):
    poison = Poison(value)
    trainer = make_trainer(tmp_path, save_steps=2, callbacks=[poison])
    refused(FloatingPointError, trainer.train, "The loss is ", "at step 4", "learning rate")
    assert_same(adapters(trainer.model), poison.adapters)
    assert len(losses(trainer)) == 3
    assert last_checkpoint(tmp_path) == checkpoint(tmp_path, 2)


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    trainer = make_trainer(tmp_path)
    before = adapters(trainer.model)
    trainer.model.model.layers[0].mlp.up_proj.lora_B.register_hook(lambda gradient: gradient * math.inf)
    refused(FloatingPointError, trainer.train, "gradient's norm", "at step 1")
    assert_same(adapters(trainer.model), before)
