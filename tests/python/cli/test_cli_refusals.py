# SPDX-License-Identifier: Apache-2.0
"""The command line's refusals: wrong usage, every bad input, and that nothing is overwritten or lost."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from byte_model import byte_llama, full_disk
from cli_calls import ENVIRONMENT, call, curve, failed, finetune, safetensors_torch, tree
from lors_cuda._files import new_directory
from lors_cuda.cli._finetune_options import check_options
from models import refused, tiny_llama

pytest_plugins = ["cli_fixtures"]

# ---- wrong usage: exit code 2 ----


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([], ["required: command"]),
        (["fly"], ["invalid choice: 'fly'", "'finetune'"]),
        (["finetune"], ["required: --model, --data, --output", "lors-cuda finetune --help"]),
        (["finetune", "--gradient", "true"], ["--gradient", "'true'", "'lors', 'exact'"]),
        (["finetune", "--layout", "4:2"], ["--layout", "'4:2'", "'bitmap'"]),
        (["finetune", "--init", "svd"], ["--init", "'svd'"]),
        (["finetune", "--rank", "0"], ["--rank", "'0' is not an integer of at least 1"]),
        (["finetune", "--lr", "nan"], ["--lr", "not a number greater than 0"]),
        (["finetune", "--resume", "--overwrite"], ["--overwrite", "not allowed with argument --resume"]),
        (["finetune", "--report-to", "email"], ["--report-to", "'email'", "'tensorboard', 'wandb'"]),
        (["finetune", "--bf16", "--fp16"], ["--fp16", "not allowed with argument --bf16"]),
        (["finetune", "--fsdp", "--deepspeed", "a.json"], ["--deepspeed", "not allowed with argument --fsdp"]),
        (["prune", "--pattern", "4:2"], ["--pattern", "of N:M"]),
        (["prune", "--method", "random"], ["--method", "'random'"]),
        (["prune", "--model", "a", "--output", "b"], ["--method wanda needs calibration text", "--data FILE"]),
        (["merge", "--model", "a"], ["--adapter, --output"]),
    ],
)
def test_wrong_usage(capsys, arguments, fragments):
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lors-cuda: error: ")
    assert captured.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in captured.err


@pytest.mark.parametrize(
    ("variable", "value", "advice"),
    [
        ("LORS_CPU_CAPABILITY", "foo", "set it to baseline, avx2, avx512 or avx512_bf16"),
        ("LORS_CPU_PRODUCT", 'a"b', "set it to float32 or native"),
        ("LORS_CPU_FUSED", "a\\b", "set it to always or never"),
        ("LORS_CUDA_FUSED", "yes", "set it to always or never"),
        ("LORS_SPARSE_PRODUCT", "fast", "set it to dense, sparse or auto"),
    ],
)
def test_environment_variables_with_unknown_values_are_one_line(variable, value, advice):
    environment = {**ENVIRONMENT, variable: value}
    command = [sys.executable, "-m", "lors_cuda", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"lors-cuda: error: {variable} is ")
    assert advice in done.stderr
    assert done.stderr.count("\n") == 1


# ---- bad input: exit code 1, one sentence, nothing written ----


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("none.txt", None, ["none.txt' does not exist"]),
        ("empty.txt", "", ["empty.txt' is empty"]),
        ("bad.jsonl", '{"text": "a"}\nnot json\n', ["bad.jsonl', line 2 is not JSON"]),
        ("fields.jsonl", '{"input": "a"}\n', ["line 1", '"prompt" and "completion"']),
        ("table.csv", "a,b", ["table.csv', line 1", '"completion"']),
        ("table.tsv", "a\tb", ["'.tsv'", ".csv or .parquet"]),
        ("emoji.jsonl", '{"text": "cut \\ud83d"}\n', ["emoji.jsonl', line 1", "lone surrogate"]),
        ("no.parquet", "a", ["no.parquet' is not a Parquet file"]),
    ],
)
def test_bad_data(home, tmp_path, capsys, name, content, fragments):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    run = tmp_path / "run"
    error = failed(capsys, "finetune", "--model", home / "sparse", "--data", path, "--output", run)
    assert all(fragment in error for fragment in fragments), error
    assert not run.exists()


def test_bad_models_and_tokenizers(home, tmp_path, capsys):
    data = ["--data", home / "text.txt"]
    assert "does not exist" in failed(capsys, "eval", "--model", tmp_path / "no", *data)
    (tmp_path / "empty").mkdir()
    assert "holds no model: it has no config.json" in failed(capsys, "eval", "--model", tmp_path / "empty", *data)

    bare = tmp_path / "bare"
    shutil.copytree(home / "sparse", bare, ignore=shutil.ignore_patterns("tokenizer*", "added*"))
    error = failed(capsys, "eval", "--model", bare, *data)
    assert "has no tokenizer" in error
    assert "--tokenizer" in error
    assert call("eval", "--model", bare, *data, "--tokenizer", home / "dense") == 0

    weights = bare / "model.safetensors"
    content = weights.read_bytes()
    tensors = safetensors_torch.load_file(weights)
    weights.write_bytes(content[:-1000])
    assert "could not be loaded" in failed(capsys, "eval", "--model", bare, *data)
    del tensors["model.norm.weight"]
    safetensors_torch.save_file(tensors, weights, metadata={"format": "pt"})
    assert "incomplete: 'model.norm.weight'" in failed(capsys, "eval", "--model", bare, *data)

    small = tmp_path / "small"
    tiny_llama().save_pretrained(small)
    error = failed(capsys, "eval", "--model", small, *data, "--tokenizer", home / "dense")
    assert "vocabulary has 64" in error
    error = failed(capsys, "eval", "--model", home / "sparse", *data, "--sequence-length", "4096")
    assert "--sequence-length is 4096" in error
    assert "at most 128" in error
    assert "--device is 'abacus'" in failed(capsys, "eval", "--model", home / "sparse", *data, "--device", "abacus")


def test_values_that_do_not_fit_the_model(home, tmp_path, capsys):
    run = tmp_path / "run"
    assert "r is 33" in failed(capsys, *finetune(home, run, "--rank", "33"))
    assert "matches no nn.Linear" in failed(capsys, *finetune(home, run, "--target-modules", "query"))
    assert "nothing is left to adapt" in failed(
        capsys, *finetune(home, run, "--target-modules", "q_proj", "--exclude-modules", "q_proj")
    )
    assert not run.exists()


def test_what_cannot_work_here(home, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    on_cpu = ["--device", "cpu"]
    assert "--fp16 needs a GPU, and the device is cpu. Use --bf16." in failed(
        capsys, *finetune(home, run, *on_cpu, "--fp16")
    )
    assert "--fsdp needs a GPU" in failed(capsys, *finetune(home, run, *on_cpu, "--fsdp"))
    assert "--deepspeed needs a GPU" in failed(capsys, *finetune(home, run, *on_cpu, "--deepspeed", "no.json"))
    assert "--warmup-steps is 7" in failed(capsys, *finetune(home, run, "--warmup-steps", "7"))
    error = failed(capsys, *finetune(home, run, "--eval-data", tmp_path / "no.txt"))
    assert "no.txt' does not exist" in error
    for name in ("tensorboard", "tensorboardX", "wandb", "deepspeed"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for reporter in ("tensorboard", "wandb"):
        error = failed(capsys, *finetune(home, run, "--report-to", reporter))
        assert f"--report-to {reporter} needs the package {reporter}, which is not installed" in error
    monkeypatch.undo()
    assert not run.exists()


def test_options_of_gpus_are_refused_with_the_way_out(tmp_path, monkeypatch):
    def check(device, **options):
        given = {"warmup_steps": None, "steps": 1, "device": device, "report_to": [], "deepspeed": None}
        given |= {"fp16": False, "fsdp": False, "method": "lors", "method_option": [], "rounding": "nearest", **options}
        check_options(argparse.Namespace(**given), torch.device(device))

    check("cuda:0", fp16=True)
    refused(ValueError, lambda: check("cuda:1"), "CUDA_VISIBLE_DEVICES=1 and --device cuda")
    refused(ValueError, lambda: check("cuda:0", fsdp=True), "start the command by torchrun")
    refused(ValueError, lambda: check("cuda:0", fsdp=True, method="sora"), "Leave --fsdp out")
    refused(ValueError, lambda: check("cuda:0", fsdp=True, rounding="stochastic"), "Leave --fsdp out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(ImportError, lambda: check("cuda", deepspeed=tmp_path), "needs the package deepspeed")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    refused(FileNotFoundError, lambda: check("cuda", deepspeed=tmp_path / "no"), "no' does not exist")
    path = tmp_path / "ds.json"
    for content, fragment in [("{", "is not JSON"), ("[]", "must be a JSON object")]:
        path.write_text(content)
        refused(ValueError, lambda: check("cuda", deepspeed=path), fragment)


def test_an_adapter_for_another_model(home, adapter, tmp_path, capsys):
    before = tree(adapter)
    merge = ["merge", "--adapter", adapter, "--output", tmp_path / "merged", "--model"]
    wider = tmp_path / "wider"
    byte_llama(intermediate_size=96).save_pretrained(wider)
    assert "but the model needs" in failed(capsys, *merge, wider)
    other_mask = tmp_path / "mask"
    prune = ["prune", "--model", home / "dense", "--output", other_mask, "--method", "magnitude"]
    assert call(*prune) == 0
    error = failed(capsys, *merge, other_mask)
    assert "another sparsity mask" in error
    assert "use --no-strict-mask to load it all the same" in error
    assert call("merge", *merge[1:4], tmp_path / "unchecked", "--model", other_mask, "--no-strict-mask") == 0
    assert "adapter_config.json" in failed(
        capsys, "eval", "--model", home / "sparse", "--data", home / "text.txt", "--adapter", tmp_path / "no"
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter, damaged)
    (damaged / "adapter_model.safetensors").write_bytes(before["adapter_model.safetensors"][:-100])
    error = failed(capsys, "merge", "--model", home / "sparse", "--adapter", damaged, "--output", tmp_path / "merged")
    assert "truncated or corrupted" in error
    assert not (tmp_path / "merged").exists()
    assert tree(adapter) == before


# ---- nothing is overwritten silently, nothing is lost ----


def test_output_directories_are_never_overwritten_silently(home, adapter, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    sparse, data = home / "sparse", home / "text.txt"
    prune = ["prune", "--method", "magnitude", "--model", sparse, "--output"]
    merge = ["merge", "--model", sparse, "--adapter", adapter, "--output"]
    for command in (prune, merge):
        assert "exists and is not empty" in failed(capsys, *command, foreign)
        assert "holds no model" in failed(capsys, *command, foreign, "--overwrite")
        assert "is, or contains, the input" in failed(capsys, *command, sparse, "--overwrite")
        assert "is, or contains, the input" in failed(capsys, *command, home, "--overwrite")
    for more in ([], ["--resume"], ["--overwrite"]):
        assert "holds no fine-tuning run" in failed(capsys, *finetune(home, foreign, *more))
        assert "is the model's directory" in failed(capsys, *finetune(home, sparse, *more))
    assert "is a file" in failed(capsys, *finetune(home, data))
    assert "is a file" in failed(capsys, *prune, data)
    assert tree(foreign) == {"thesis.tex": b"years of work"}
    (foreign / "config.json").write_text("{}")  # now it looks like a model
    for command in (prune, merge):
        assert "holds 'thesis.tex' beside a model" in failed(capsys, *command, foreign, "--overwrite")
    assert (foreign / "thesis.tex").read_text() == "years of work"
    before = tree(adapter)
    error = failed(capsys, *finetune(home, adapter))
    assert "--resume" in error
    assert "--overwrite" in error
    for option, value, fragment in [
        ("--seed", "1", "seed was 0, is 1"), ("--rank", "2", "r was 4, is 2"),
        ("--batch-size", "3", "batch_size was 4"),
        ("--init", "default", "init was 'gradient', is 'default'"), ("--data", home / "pairs.jsonl", "data was"),
    ]:  # fmt: skip
        error = failed(capsys, *finetune(home, adapter, "--resume", option, value))
        assert "other settings" in error
        assert fragment in error
    assert tree(adapter) == before


def test_a_run_of_the_former_training_loop(home, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"of the former loop")
    error = failed(capsys, *finetune(home, run, "--resume"))
    assert "checkpoint.pt' was written by an older lors_cuda" in error
    assert "--overwrite" in error
    assert "already holds a run" in failed(capsys, *finetune(home, run))
    assert tree(run) == {"checkpoint.pt": b"of the former loop"}
    assert call(*finetune(home, run, "--overwrite")) == 0
    assert not (run / "checkpoint.pt").exists()


@pytest.mark.filterwarnings("default::UserWarning")  # the command line prints it
def test_a_damaged_checkpoint_is_named_and_skipped(home, tmp_path, capsys):
    run = tmp_path / "run"
    command = finetune(home, run, "--checkpoint-every", "2")
    assert call(*command) == 0
    whole = curve(run)
    optimizer = run / "checkpoint-6/optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    capsys.readouterr()
    assert call(*command, "--resume") == 0
    captured = capsys.readouterr()
    assert captured.err == (
        f"lors-cuda: warning: '{run}/checkpoint-6' is incomplete: its optimizer.pt was cut short or changed; it is "
        "skipped.\n"
    )
    assert "step      4" not in captured.out
    assert curve(run) == whole
    (run / "run.json").write_text("{")
    assert "run.json', which says how the run was started, is missing or damaged" in failed(
        capsys, *command, "--resume"
    )


def test_overwrite_replaces_a_run_and_a_model(home, adapter, tmp_path):
    run, output = tmp_path / "run", tmp_path / "merged"
    shutil.copytree(adapter, run)
    (run / "notes.txt").write_text("mine")
    assert call(*finetune(home, run, "--overwrite", "--seed", "1", "--steps", "3")) == 0
    assert len(curve(run)) == 3
    assert (run / "notes.txt").read_text() == "mine"
    merge = ["merge", "--model", home / "sparse", "--output", output, "--adapter"]
    assert call(*merge, adapter) == 0
    first = tree(output)
    assert call(*merge, run, "--overwrite") == 0
    assert tree(output).keys() == first.keys()
    assert tree(output)["model.safetensors"] != first["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]


def test_a_full_disk_leaves_what_was_there(home, adapter, tmp_path, capsys):
    run, output = tmp_path / "run", tmp_path / "merged"
    shutil.copytree(adapter, run)
    merge = ["merge", "--model", home / "sparse", "--adapter", run, "--output"]
    assert call(*merge, output) == 0
    before, run_before = tree(output), tree(run)
    with full_disk(10_000):
        assert "could not be written" in failed(capsys, *merge, output, "--overwrite")
        assert "could not be written" in failed(capsys, *merge, tmp_path / "new")
        error = failed(capsys, *finetune(home, run, "--resume"))  # finished: only the outputs are written again
    assert "adapter" in error or str(run) in error
    assert "could not be" in error
    assert tree(output) == before
    assert tree(run) == run_before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]


def test_a_failing_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    output = tmp_path / "model"
    output.mkdir()
    (output / "old").write_text("old")
    rename = os.rename

    def fail_last(source, target):
        if Path(target) == output and Path(source).suffix == ".tmp":
            raise OSError(5, "Input/output error")
        rename(source, target)

    def replace():
        with new_directory(output, replace=True) as directory:
            (directory / "new").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_last)
        refused(OSError, replace, "could not be written (Input/output error)", "unchanged")
    assert tree(tmp_path) == {"model/old": b"old"}
    replace()
    assert tree(tmp_path) == {"model/new": b"new"}


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(home, adapter, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_bytes((adapter / "run.json").read_bytes())
    assert call(*finetune(home, run, "--resume")) == 0
    assert "starts from the beginning" in capsys.readouterr().out
    assert curve(run) == curve(adapter)


def test_processes_of_another_launcher_are_refused(home, tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "process 1 of 2 by its environment, and torchrun did not start it" in failed(
        capsys, *finetune(home, tmp_path / "run")
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", ["99999999999999999999999", "-1", "one"])
def test_seeds_that_are_none(home, tmp_path, capsys, seed):
    assert call(*finetune(home, tmp_path / "run", "--seed", seed)) == 2
    assert f"'{seed}' is not an integer" in capsys.readouterr().err


def test_devices_without_kernels_are_refused(home, tmp_path, capsys):
    error = failed(capsys, *finetune(home, tmp_path / "run", "--device", "xpu"))
    assert "--device is 'xpu', and there are no kernels for it" in error
