# SPDX-License-Identifier: Apache-2.0
"""lors_cuda.hf on models of lors_cuda.peft: what the callback checks, and checkpoints with the mixin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accelerate_state import own_accelerate  # noqa: F401  (a fixture)
from lors_cuda.hf import SparsityCallback
from models import logits, refused, tiny_llama
from peft_models import LoRSLoraConfig, compressed, layers, lors_peft, peft
from trainer_runs import STEPS, checkpoint, losses, make_trainer, transformers

DAMAGED = "base_model.model.model.layers.1.mlp.up_proj"
UNPRUNED = "model.layers.1.mlp.up_proj"


def one_unpruned() -> nn.Module:
    """A base of which one linear has no zeros: its weight stays dense."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(UNPRUNED).weight[:] = torch.randn(model.get_submodule(UNPRUNED).weight.shape)
    return model


def peft_llama(base: str = "linear", layout: str = "auto") -> nn.Module:
    model = one_unpruned() if base == "one unpruned" else compressed(tiny_llama(), base)
    config = LoRSLoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", layout=layout)
    return peft.get_peft_model(model, config)


class Damage(transformers.TrainerCallback):
    """Writes to the base weight of one layer in the fourth step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == 4:
            with torch.no_grad():
                model.get_submodule(DAMAGED).stored_values.fill_(1.0)


def run(tmp_path, model, *callbacks):
    callbacks = [*callbacks, SparsityCallback(every=2)]
    return make_trainer(tmp_path, model=model, kind=transformers.Trainer, save_strategy="no", callbacks=callbacks)


BASES = [("one unpruned", "auto"), ("linear", "dense"), ("linear", "2:4"), ("2:4", "auto"), ("bitmap", "auto")]


@pytest.mark.parametrize(("base", "layout"), BASES)
def test_a_changed_base_weight_is_found(tmp_path, base, layout):
    trainer = run(tmp_path, peft_llama(base, layout), Damage())
    dense = base == "one unpruned" or layout == "dense"
    assert (layers(trainer.model)[UNPRUNED].sparse_weight.layout == "dense") == dense
    refused(RuntimeError, trainer.train, f"Layer '{DAMAGED}': weight_values is frozen", "between step 2 and step 4")


@pytest.mark.parametrize(("base", "layout"), BASES[1:])
def test_the_sparsity_is_the_merged_weights(tmp_path, base, layout):
    trainer = run(tmp_path, peft_llama(base, layout))
    with torch.no_grad():  # the first kept weight becomes an exact zero when the adapter is merged
        layer = layers(trainer.model)[UNPRUNED]
        column = int(layer.sparse_weight.mask()[0].nonzero()[0])
        layer.lora_A["default"].weight.zero_()[0, column] = 1.0
        layer.lora_B["default"].weight.zero_()[0, 0] = -layer.sparse_weight.to_dense()[0, column] / 2
        layer.lora_A["default"].weight.requires_grad_(False)
        layer.lora_B["default"].weight.requires_grad_(False)
    trainer.train()
    logged = {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry}
    assert list(logged) == [2, 4, STEPS]
    targets = list(layers(trainer.model))
    merged = trainer.model.merge_and_unload()
    weights = [merged.get_submodule(name).weight for name in targets]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert logged[STEPS] == zeros / total > 0.5


def test_a_merge_that_loses_a_zero_is_found(tmp_path, monkeypatch):
    right = lors_peft.LoRSLoraLinear.merged_dense

    def wrong(layer):
        merged = right(layer)
        row, column = (~layer.sparse_weight.mask()).nonzero()[5].tolist()
        merged[row, column] = -0.25
        return merged

    monkeypatch.setattr(lors_peft.LoRSLoraLinear, "merged_dense", wrong)
    trainer = run(tmp_path, peft_llama("2:4"))
    refused(RuntimeError, trainer.train, "the merged weight is -0.25 in row", "off the mask, at step 2")


def test_disabled_and_inactive_adapters_are_not_merged():
    model = peft_llama("2:4")
    layer = layers(model)[UNPRUNED]
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1.0)
    base = layer.sparse_weight.to_dense()
    assert not torch.equal(layer.merged_dense(), base)
    with model.disable_adapter():
        assert torch.equal(layer.merged_dense(), base)
    model.add_adapter("second", LoRSLoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("second")
    assert torch.equal(layer.merged_dense(), base)


def test_the_mixin_leaves_checkpoints_to_peft(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    first = make_trainer(tmp_path, model=peft_llama(), **options)
    first.train()
    again = make_trainer(tmp_path, model=peft_llama(), **options)
    again.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    assert losses(again) == losses(first)
    best = lors_peft.from_pretrained(tiny_llama(), first.state.best_model_checkpoint)
    assert torch.equal(logits(best), logits(first.model.eval()))
