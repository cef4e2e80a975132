# SPDX-License-Identifier: Apache-2.0
"""The files of an adapter directory: damaged, missing, and not written."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys

import pytest
import torch
from torch import nn

from adapter_directories import FILES, Q_PROJ, edit_config
from lors_cuda.checkpoint import load_adapter, save_adapter
from lors_cuda.config import LoRSConfig
from lors_cuda.linear import LoRSLinear
from lors_cuda.model import get_lors_model
from models import assert_unchanged, fill_adapters, logits, refused, snapshot, tiny_llama, tiny_net, trained

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file


def damaged_tensors(directory, change) -> None:
    tensors = load_file(directory / FILES[1])
    change(tensors)
    save_file(tensors, directory / FILES[1])


KEY = f"base_model.model.{Q_PROJ}"
DAMAGE = {
    "truncated payload": (lambda d: os.truncate(d / FILES[1], 3000), ("is truncated or corrupted", FILES[1])),
    "truncated header": (lambda d: os.truncate(d / FILES[1], 100), ("is truncated or corrupted", FILES[1])),
    "empty file": (lambda d: os.truncate(d / FILES[1], 0), ("is truncated or corrupted", FILES[1])),
    "truncated json": (lambda d: os.truncate(d / FILES[0], 50), ("is truncated or corrupted", FILES[0])),
    "binary json": (lambda d: (d / FILES[0]).write_bytes(b"\xff\xfe\x00"), ("is truncated or corrupted", FILES[0])),
    "json list": (lambda d: (d / FILES[0]).write_text("[1]"), ("its peft_type is 'list'",)),
    "other type": (lambda d: edit_config(d, peft_type="IA3"), ("its peft_type is 'IA3'",)),
    "r a string": (lambda d: edit_config(d, r="four"), ("does not describe a LoRS adapter", "r must be an integer")),
    "bad lors": (lambda d: edit_config(d, lors=3), ("no mask fingerprints",)),
    "newer": (
        lambda d: edit_config(d, lors={"format_version": 2, "mask_fingerprints": {}}),
        ("format version 2", "reads 1"),
    ),
    "half a pair": (
        lambda d: damaged_tensors(d, lambda t: t.pop(f"{KEY}.lora_B.weight")),
        (f"'{Q_PROJ}' has only one of lora_A and lora_B",),
    ),
    "no pairs": (lambda d: damaged_tensors(d, lambda t: t.clear()), ("has no lora_A and lora_B",)),
    "foreign key": (
        lambda d: damaged_tensors(d, lambda t: t.update(x=torch.ones(2))),
        ("'x' does not begin with 'base_model.model.'",),
    ),
    "stray tensor": (
        lambda d: damaged_tensors(d, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        ("a tensor 'lm_head.weight', which is in none of the model's modules_to_save",),
    ),
    "integer": (
        lambda d: damaged_tensors(d, lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 32).int()})),
        (f"lora_A of '{Q_PROJ}' has dtype torch.int32",),
    ),
    "wrong shape": (
        lambda d: damaged_tensors(d, lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(33, 4)})),
        (f"lora_B of '{Q_PROJ}' has shape [33, 4], but the model needs [32, 4]",),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("convert_first", [False, True])
def test_a_damaged_directory_is_refused(saved, damage, convert_first):
    _, directory = saved
    break_it, fragments = DAMAGE[damage]
    break_it(directory)
    model = tiny_llama()
    if convert_first:
        get_lors_model(model, LoRSConfig(r=4, lora_alpha=8))
    before = snapshot(model)
    refused(ValueError, lambda: load_adapter(model, directory), *fragments)
    assert_unchanged(model, before)


def test_a_flipped_bit_is_found(saved):
    _, directory = saved
    data = bytearray((directory / FILES[1]).read_bytes())
    data[-5] ^= 0x10
    (directory / FILES[1]).write_bytes(data)
    refused(ValueError, lambda: load_adapter(tiny_llama(), directory), FILES[1], "checksum")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, name):
    _, directory = saved
    (directory / name).unlink()
    refused(FileNotFoundError, lambda: load_adapter(tiny_llama(), directory), name, "does not exist")


def test_a_missing_directory_is_named(tmp_path):
    refused(FileNotFoundError, lambda: load_adapter(tiny_llama(), tmp_path / "no"), "no/adapter_config.json")


def train_on(model: nn.Module) -> None:
    fill_adapters(model, seed=9)


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_full_disk_leaves_the_old_adapter(saved, monkeypatch, failing_call):
    model, directory = saved
    old = {name: (directory / name).read_bytes() for name in FILES}
    train_on(model)
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_adapter(model, directory)
    assert caught.value.errno == errno.ENOSPC
    assert str(directory) in str(caught.value)
    monkeypatch.undo()
    assert sorted(os.listdir(directory)) == FILES, "a temporary file was left behind"
    assert {name: (directory / name).read_bytes() for name in FILES} == old
    load_adapter(tiny_llama(), directory)
    save_adapter(model, directory)
    assert (directory / FILES[1]).read_bytes() != old[FILES[1]]


def test_a_write_that_stops_in_the_middle_leaves_the_old_adapter(saved):
    model, directory = saved
    old = {name: (directory / name).read_bytes() for name in FILES}
    train_on(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel itself stops the write after 4 KiB
    try:
        with pytest.raises(OSError, match="could not be written"):
            save_adapter(model, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(directory)) == FILES
    assert {name: (directory / name).read_bytes() for name in FILES} == old


def test_the_configuration_is_renamed_last(saved, monkeypatch):
    model, directory = saved
    renamed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (renamed.append(new.name), replace(old, new)))
    save_adapter(model, directory)
    assert renamed == FILES[::-1]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(OSError, match="could not be written"):
        save_adapter(trained(), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


def test_a_model_without_layers_cannot_be_saved(tmp_path):
    refused(ValueError, lambda: save_adapter(tiny_net(), tmp_path), "no LoRS layers")
    refused(TypeError, lambda: save_adapter("model", tmp_path), "torch.nn.Module")
    refused(TypeError, lambda: load_adapter("model", tmp_path), "torch.nn.Module")
    assert os.listdir(tmp_path) == []


def test_mixed_scaling_rules_cannot_be_saved(tmp_path):
    net = nn.Sequential(
        LoRSLinear.from_linear(nn.Linear(8, 8), r=2, use_rslora=True), LoRSLinear.from_linear(nn.Linear(8, 8), r=2)
    )
    refused(ValueError, lambda: save_adapter(net, tmp_path), "use_rslora")


def test_without_safetensors_the_command_is_named(saved, monkeypatch):
    model, directory = saved
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(ImportError, lambda: save_adapter(model, directory), "pip install safetensors")
    refused(ImportError, lambda: load_adapter(tiny_llama(), directory), "pip install safetensors")


def test_a_directory_can_be_moved(saved, tmp_path):
    model, directory = saved
    shutil.move(directory, tmp_path / "elsewhere")
    assert torch.equal(logits(load_adapter(tiny_llama(), tmp_path / "elsewhere")), logits(model))


def test_a_config_with_products_loads(saved):
    model, directory = saved
    edit_config(directory, products="sparse")
    other = load_adapter(tiny_llama(), directory)
    assert torch.equal(logits(other), logits(model))
