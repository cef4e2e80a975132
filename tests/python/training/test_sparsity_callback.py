# SPDX-License-Identifier: Apache-2.0
"""lors_cuda.hf.SparsityCallback: silent on a sound run, loud on every kind of damage."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from accelerate_state import own_accelerate  # noqa: F401  (a fixture)
from lors_cuda import LoRSLinear, SparseLinear, merge_and_unload, sparsity_callback
from lors_cuda.hf import SparsityCallback
from models import refused, tiny_llama
from trainer_runs import STEPS, checkpoint, converted, make_trainer, transformers

DAMAGED = "model.layers.1.mlp.up_proj"


class Damage(transformers.TrainerCallback):
    """Calls `what(layer)` on one layer at the end of a step, as a stray write in a user's code would."""

    def __init__(self, what, step: int = 4) -> None:
        self.what, self.step = what, step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.what(model.get_submodule(DAMAGED))


class Listener(transformers.TrainerCallback):
    """Stands where the Trainer's own reporters do, before the user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def smallest_change(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of the last number."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    tensor.view(-1).view(integers)[-1] ^= 1


def open_a_zero(layer: SparseLinear) -> None:
    """Give a pruned weight of an implicit mask a value, as weight decay towards something else would."""
    place = (layer.weight_values == 0).nonzero()[0]
    layer.weight_values[tuple(place)] = 0.5


def sparsity_log(trainer) -> dict[int, float]:
    return {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry}


def measured_sparsity(model) -> float:
    layers = [layer.merge() for layer in model.modules() if isinstance(layer, LoRSLinear)]
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    return zeros / sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_a_sound_run_is_left_alone_and_its_sparsity_logged(tmp_path, layout):
    trainer = make_trainer(
        tmp_path, model=converted(layout=layout), save_strategy="no", callbacks=[SparsityCallback(every=2)]
    )
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert list(sparsity_log(trainer)) == [2, 4, 6]
    assert sparsity_log(trainer)[6] == measured_sparsity(trainer.model) == 0.5
    whole = [entry["model_sparsity"] for entry in trainer.state.log_history if "model_sparsity" in entry]
    merged = merge_and_unload(trainer.model)
    matrices = [parameter for parameter in merged.parameters() if parameter.dim() > 1]
    assert whole[2] == sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices) < 0.5


@pytest.mark.parametrize("kind", ["mixin", "plain"])
def test_what_other_listeners_see(tmp_path, kind):
    before, after = Listener(), Listener()
    trainer = make_trainer(
        tmp_path,
        save_strategy="no",
        callbacks=[before, SparsityCallback(every=STEPS), after],
        **({} if kind == "mixin" else {"kind": transformers.Trainer}),
    )
    trainer.train()
    assert sparsity_log(trainer) == {STEPS: 0.5}
    assert [entry["sparsity"] for entry in after.seen if "sparsity" in entry] == [0.5]
    assert [entry["sparsity"] for entry in before.seen if "sparsity" in entry] == ([0.5] if kind == "mixin" else [])


@pytest.mark.parametrize(
    ("layout", "what", "tensor"),
    [
        ("dense", open_a_zero, "weight_values"),
        ("dense", lambda layer: smallest_change(layer.weight_values), "weight_values"),
        ("2:4", lambda layer: smallest_change(layer.weight_values), "weight_values"),
        ("2:4", lambda layer: layer.weight_index.copy_(layer.weight_index.roll(1)), "weight_index"),
        ("bitmap", lambda layer: smallest_change(layer.weight_mask), "weight_mask"),
        ("bitmap", lambda layer: layer.weight_values.mul_(1.001), "weight_values"),
        ("2:4", lambda layer: layer.half(), "weight_values"),
    ],
    ids=["opened zero", "dense value", "2:4 value", "2:4 mask", "bitmap mask", "bitmap values", "dtype"],
)
def test_damage_stops_training_before_the_checkpoint(tmp_path, layout, what, tensor):
    trainer = make_trainer(
        tmp_path,
        model=converted(layout=layout),
        callbacks=[Damage(what), SparsityCallback(every=100)],
        save_steps=2,
    )
    message = refused(RuntimeError, trainer.train, f"Layer '{DAMAGED}': {tensor} is frozen", "Training was stopped")
    assert "between step 2 and step 4" in message
    assert checkpoint(tmp_path, 2).is_dir()
    assert not checkpoint(tmp_path, 4).exists()


def test_layers_that_vanish_are_found(tmp_path):
    class Merge(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            merge_and_unload(model)

    trainer = make_trainer(tmp_path, save_strategy="no", callbacks=[Merge(), SparsityCallback(every=1)])
    refused(RuntimeError, trainer.train, "'model.layers.0.self_attn.q_proj' is no LoRS layer any more at step 1")


def test_damage_after_the_last_due_step_is_found_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path,
        save_strategy="no",
        callbacks=[Damage(lambda layer: layer.weight_values.zero_(), step=STEPS), SparsityCallback(every=4)],
    )
    refused(RuntimeError, trainer.train, f"Layer '{DAMAGED}'", "between step 4 and step 6")


def test_a_bias_and_a_layer_without_adapter_are_checked_too(tmp_path):
    model = converted(exclude_modules=["up_proj"])
    linear = model.get_submodule(DAMAGED)
    linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    model.model.layers[1].mlp.up_proj = SparseLinear.compress(linear)
    trainer = make_trainer(
        tmp_path,
        model=model,
        save_strategy="no",
        callbacks=[Damage(lambda layer: layer.bias.add_(1e-3)), SparsityCallback(every=1)],
    )
    refused(RuntimeError, trainer.train, f"Layer '{DAMAGED}': bias is frozen", "between step 3 and step 4")
    assert sparsity_log(trainer)[3] == 0.5


def test_a_merge_that_loses_a_zero_is_found(tmp_path, monkeypatch):
    right, calls = LoRSLinear.merged_dense, []

    def wrong(layer):
        merged = right(layer)
        calls.append(layer)
        if len(calls) == 3:
            row, column = (~layer.sparse_weight.mask()).nonzero()[5].tolist()
            merged[row, column] = -0.25
        return merged

    monkeypatch.setattr(LoRSLinear, "merged_dense", wrong)
    trainer = make_trainer(tmp_path, save_strategy="no", callbacks=[SparsityCallback(every=2)])
    message = refused(RuntimeError, trainer.train, "the merged weight is -0.25 in row", "off the mask, at step 2")
    assert "'model.layers.0.self_attn.v_proj'" in message


def test_refusals(tmp_path):
    refused(ValueError, lambda: SparsityCallback(every=0), "every is 0", "at least 1")
    refused(TypeError, lambda: SparsityCallback(every=2.5), "every is 2.5", "whole number")
    refused(TypeError, lambda: SparsityCallback(every=True), "every is True")
    trainer = make_trainer(tmp_path, model=tiny_llama(), callbacks=[SparsityCallback()])
    refused(ValueError, trainer.train, "no LoRS layers", "get_lors_model")


def test_sharded_layers_are_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = converted()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        torch.distributed.fsdp.fully_shard(model.model.layers[1], mesh=mesh)
        call = functools.partial(
            SparsityCallback().on_train_begin, None, transformers.TrainerState(), None, model=model
        )
        refused(ValueError, call, "'model.layers.1.self_attn.q_proj' are sharded over several processes")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.int64])
def test_any_single_change_changes_the_checksum(monkeypatch, dtype):
    monkeypatch.setattr(sparsity_callback, "_CHUNK", 8)  # so that 27 numbers are four chunks
    generator = random.Random(0)
    tensor = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = sparsity_callback._checksum(tensor)
    assert sparsity_callback._checksum(tensor.clone()) == whole
    assert sparsity_callback._checksum(tensor.t().contiguous().t()) == whole  # of the values, not of how they lie
    seen = {whole}
    for place in range(tensor.numel()):
        changed = tensor.clone()
        bits = changed.view(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        bits[place] ^= 1 << generator.randrange(8 * dtype.itemsize - 1)
        seen.add(sparsity_callback._checksum(changed))
    assert whole not in seen - {whole}
    assert len(seen) > tensor.numel() // 2
    for distance in (1, 8):  # neighbours, and the same place of the next chunk
        swapped = tensor.clone().view(-1)
        first = next(i for i in range(26 - distance) if swapped[i] != swapped[i + distance])
        swapped[[first, first + distance]] = swapped[[first + distance, first]]
        assert sparsity_callback._checksum(swapped) != whole
