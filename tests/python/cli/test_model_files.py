# SPDX-License-Identifier: Apache-2.0
"""What prune and merge write: everything beside the weights, through links, and where a directory cannot be renamed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from byte_model import full_disk
from cli_calls import call, curve, failed, finetune, linear_zeros, tree
from lors_cuda import load_sparse_checkpoint, save_sparse_checkpoint
from lors_cuda._files import new_directory, new_files, replace_file
from lors_cuda.cli._model_files import beside_weights
from models import refused

pytest_plugins = ["cli_fixtures"]

KEPT = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "image_processor.json",
    "spiece.model", "vocab.txt", "tokenizer.model.v3", "tokenizer.bin", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool.jinja", "LICENSE", "LICENSE.md", "USE_POLICY.md", "NOTICE", "README.md",
    "modeling_own.py", "configuration_own.py", "figures/loss.svg", "banner.png", "1_Pooling/config.json", "recipe.yaml",
)  # fmt: skip
LEFT = (
    "model-00001-of-00002.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth",
    "original/consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "model.gguf", "onnx/model.onnx",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "adapter_config.json",
    "adapter_model.safetensors", "checkpoint-3/config.json", "runs/events", "training.jsonl", ".git/HEAD",
    ".gitattributes", ".cache/huggingface/x", "__pycache__/modeling_own.pyc", "events.out.tfevents.1",
)  # fmt: skip


@pytest.fixture
def full(home, tmp_path) -> Path:
    """The sparse model with all that may stand beside it."""
    model = tmp_path / "full"
    shutil.copytree(home / "sparse", model)
    for name in (*KEPT, *LEFT):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(f"of {name}")
    (model / "adapter_config.json").unlink()  # transformers would read it
    (tmp_path / "blob").write_text("a file of a hub's cache")
    (model / "hub.txt").symlink_to(tmp_path / "blob")
    (model / "nowhere.txt").symlink_to(tmp_path / "gone")
    (model / "figures" / "back").symlink_to(model)
    return model


def test_what_training_left_is_not_beside_the_weights(tmp_path):
    for name in LEFT:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [entry.name for entry in beside_weights(tmp_path)] == ["onnx", "original"]  # of which nothing is copied


def test_everything_beside_the_weights_is_kept(home, adapter, full, tmp_path, capsys):
    merged, pruned = tmp_path / "merged", tmp_path / "pruned"
    merge = ["merge", "--model", full, "--adapter", adapter, "--output", merged]
    prune = ["prune", "--model", full, "--output", pruned, "--method", "magnitude"]
    for output, command in ((merged, merge), (pruned, prune)):
        assert call(*command) == 0
        written = tree(output)
        assert {name: written.get(name) for name in KEPT} == {name: f"of {name}".encode() for name in KEPT}
        assert written["hub.txt"] == b"a file of a hub's cache"
        assert not (output / "hub.txt").is_symlink()
        assert set(written) == {*KEPT, "hub.txt", *tree(home / "sparse")}
        assert json.loads(written["config.json"])["vocab_size"] == 384
        assert not (output / "onnx").exists()
        load_sparse_checkpoint(output)
        assert call(*command, "--overwrite") == 0  # what was written can be replaced
        assert tree(output).keys() == written.keys()
    assert "holds '1_Pooling' beside a model" in failed(
        capsys, "merge", "--model", home / "sparse", "--adapter", adapter, "--output", merged, "--overwrite"
    )  # which this model would not bring back


@pytest.mark.parametrize("before", ["empty", "model", "nothing"])
@pytest.mark.parametrize("relative", [False, True])
def test_output_through_a_link(home, adapter, tmp_path, monkeypatch, before, relative):
    monkeypatch.chdir(tmp_path)
    scratch, output = tmp_path / "disk" / "scratch", tmp_path / "output"
    scratch.parent.mkdir()
    output.symlink_to(Path("disk/scratch") if relative else scratch)
    merge = ["merge", "--model", home / "sparse", "--adapter", adapter, "--output", "output" if relative else output]
    if before == "empty":
        scratch.mkdir()
    elif before == "model":
        shutil.copytree(home / "sparse", scratch)
        merge.append("--overwrite")
    assert call(*merge) == 0
    assert output.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "output"]
    assert sorted(scratch.parent.iterdir()) == [scratch]
    assert linear_zeros(scratch).keys() == linear_zeros(home / "sparse").keys()


def test_a_run_through_links(home, adapter, tmp_path, capsys):
    disk, run = tmp_path / "disk", tmp_path / "run"
    run.symlink_to(disk)  # which is not there yet
    log = tmp_path / "log.jsonl"
    assert call(*finetune(home, run)) == 0
    assert run.is_symlink()
    assert curve(disk) == curve(adapter)
    (disk / "training.jsonl").rename(log)
    (disk / "training.jsonl").symlink_to(log)
    assert call(*finetune(home, run, "--resume")) == 0
    assert (disk / "training.jsonl").is_symlink()
    assert curve(disk) == curve(adapter)
    link = tmp_path / "model"
    link.symlink_to(home / "sparse")
    assert "is the model's directory" in failed(capsys, *finetune(home, link, "--overwrite"))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "could not be written" in failed(capsys, *finetune(home, loop))


def test_a_file_through_a_link(tmp_path):
    target, link = tmp_path / "disk" / "file", tmp_path / "link"
    link.symlink_to(target)
    target.parent.mkdir()
    for content in (b"new", b"newer"):
        replace_file(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    with full_disk():
        refused(OSError, lambda: replace_file(link, b"newest"), f"'{link}' could not be written")
    assert tree(tmp_path) == {"disk/file": b"newer", "link": b"newer"}


def test_a_mount_point_is_filled_and_not_renamed(home, tmp_path, monkeypatch):
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(mounted))
    rename = os.rename

    def checked(source, to):
        assert str(mounted) not in (str(source), str(to)), "Device or resource busy"
        rename(source, to)

    monkeypatch.setattr(os, "rename", checked)
    prune = ["prune", "--model", home / "dense", "--output", mounted, "--method", "magnitude"]
    for more in ([], ["--overwrite"]):
        assert call(*prune, *more) == 0
        assert tree(mounted).keys() == tree(home / "sparse").keys()
    before = tree(mounted)
    with full_disk(10_000):
        assert call(*prune, "--overwrite") == 1
    assert tree(mounted) == before
    model = load_sparse_checkpoint(home / "sparse")
    refused(FileExistsError, lambda: save_sparse_checkpoint(model, mounted), "is not an empty directory")

    def not_replacing():
        with new_directory(mounted):
            pass

    refused(OSError, not_replacing, "Directory not empty")
    assert tree(mounted) == before


def test_new_files_replace_those_of_a_directory_at_the_end(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "both").write_bytes(b"old")
    with new_files(tmp_path) as directory:
        (directory / "both").write_bytes(b"new")
        (directory / "below").mkdir()
        (directory / "below" / "deep").write_bytes(b"new")
        assert (tmp_path / "both").read_bytes() == b"old"
    expected = {"old": b"old", "both": b"new", "below/deep": b"new"}
    assert tree(tmp_path) == expected

    def interrupted():
        with new_files(tmp_path) as directory:
            (directory / "old").write_bytes(b"newer")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    refused(OSError, interrupted, f"'{tmp_path}' could not be written (the disk is full, or failed)")
    assert tree(tmp_path) == expected
