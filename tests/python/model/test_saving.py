# SPDX-License-Identifier: Apache-2.0
"""A model that is not merged is not saved as an ordinary checkpoint, which would load with random weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from lors_cuda import (
    LoRSConfig,
    SparseLinear,
    get_lors_model,
    load_adapter,
    load_sparse_checkpoint,
    merge_and_unload,
    save_adapter,
)
from models import assert_unchanged, fill_adapters, logits, refused, snapshot, tiny_llama, trained

transformers = pytest.importorskip("transformers")


def refuses(model, directory, *fragments: str) -> None:
    for save in (model.save_pretrained, lambda where: model.push_to_hub("nobody/nothing")):
        refused(ValueError, lambda save=save: save(directory), "loads with random weights", *fragments)
    assert not directory.exists()


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_an_unmerged_model_is_refused_and_the_ways_out_work(tmp_path, layout):
    model = trained(layout=layout)
    before, expected = snapshot(model), logits(model)
    refuses(model, tmp_path / "no", "save_adapter(model", "merge_and_unload(model).save_pretrained")
    refuses(model.model, tmp_path / "no")  # the model inside it is one of transformers too
    assert_unchanged(model, before)
    save_adapter(model, tmp_path / "adapter")
    merge_and_unload(model).save_pretrained(tmp_path / "merged")
    assert "save_pretrained" not in vars(model)
    torch.testing.assert_close(logits(load_adapter(tiny_llama(), tmp_path / "adapter")), expected)
    torch.testing.assert_close(logits(load_sparse_checkpoint(tmp_path / "merged")), expected)


def test_every_way_to_a_converted_model_is_guarded(tmp_path):
    save_adapter(trained(), tmp_path / "adapter")
    refuses(load_adapter(tiny_llama(), tmp_path / "adapter"), tmp_path / "no")
    for copied in (copy.deepcopy(trained()), pickle.loads(pickle.dumps(trained())), torch.compile(trained())):
        refuses(copied, tmp_path / "no")
    one = trained()
    two = copy.deepcopy(one)
    merge_and_unload(one)
    refuses(two, tmp_path / "no")
    one.save_pretrained(tmp_path / "merged")


def test_layers_that_are_left_sparse_are_named():
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = SparseLinear.compress(mlp.up_proj)
    get_lors_model(model, LoRSConfig(r=4, target_modules=["q_proj"]))
    merge_and_unload(model)
    refused(ValueError, lambda: model.save_pretrained("no"), "'model.layers.0.mlp.up_proj'", "to_linear()")


def test_a_deleted_model_is_freed_at_once():
    model = trained()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_checkpoint_of_before_is_called_unmerged(tmp_path):
    model = trained()
    type(model).save_pretrained(model, tmp_path)
    refused(ValueError, lambda: load_sparse_checkpoint(tmp_path), "was saved unmerged", "merge_and_unload")


def test_trainers_checkpoints_resume_and_do_not_open_as_models(tmp_path):
    from trainer_runs import checkpoint, make_trainer

    first = make_trainer(tmp_path, kind=transformers.Trainer)
    first.train()
    files = {path.name for path in checkpoint(tmp_path).iterdir()}
    assert {"model.safetensors", "config.json"} <= files
    for open_as_model in (
        transformers.AutoModelForCausalLM.from_pretrained,
        type(first.model).from_pretrained,
        load_sparse_checkpoint,
    ):
        refused(ValueError, lambda call=open_as_model: call(checkpoint(tmp_path)), "LoRS layers that are not merged")
    again = make_trainer(tmp_path, kind=transformers.Trainer)
    again.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name))
    refused(ValueError, lambda: first.save_model(str(tmp_path / "last")), "LoRSTrainerMixin")
    assert not (tmp_path / "last" / "config.json").exists()


def test_the_base_inside_a_peft_model_is_refused_and_its_adapter_saved(tmp_path):
    peft = pytest.importorskip("peft")
    from lors_cuda.peft import LoRSLoraConfig

    model = peft.get_peft_model(tiny_llama(), LoRSLoraConfig(r=4, target_modules=["q_proj"]))
    fill_adapters(model)
    refuses(model.get_base_model(), tmp_path / "no", "merge_and_unload().save_pretrained")
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_sparse_checkpoint(tmp_path / "merged")), logits(merged))
    # transformers' own door writes the adapter by itself
    model = tiny_llama()
    model.add_adapter(LoRSLoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "own")
    assert {path.name for path in (tmp_path / "own").glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
