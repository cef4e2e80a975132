# SPDX-License-Identifier: Apache-2.0
"""finetune goes on: for more steps than a run was started for, and from an adapter."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from byte_model import byte_llama
from cli_calls import call, curve, failed, finetune, safetensors_torch, tree
from lors_cuda import LoRSConfig, get_lors_model, load_adapter, load_sparse_checkpoint, save_adapter

pytest_plugins = ["cli_fixtures"]

CONSTANT = ["--schedule", "constant", "--init", "default"]


def weights(run):
    return safetensors_torch.load_file(run / "adapter_model.safetensors")


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("first", "steps"), [(3, 5), (4, 9)])  # in an epoch and at its end: 16 texts of 4 in a batch
def test_more_steps_are_one_long_run(home, tmp_path, capsys, first, steps):
    text = tmp_path / "short.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} green bottles"}) + "\n" for n in range(16)))
    run, long = tmp_path / "run", tmp_path / "long"
    command = finetune(home, run, *CONSTANT, "--data", text)
    assert call(*command, "--steps", first) == 0
    assert call(*command, "--steps", steps, "--resume") == 0
    assert capsys.readouterr().err == ""
    assert call(*finetune(home, long, *CONSTANT, "--data", text), "--steps", steps) == 0
    assert curve(run) == curve(long)
    assert [entry["step"] for entry in curve(run)] == list(range(1, steps + 1))
    assert same(weights(run), weights(long))
    content = json.loads((run / "run.json").read_text())
    assert content["identity"]["steps"] == content["result"]["steps"] == steps
    assert content["identity"] == json.loads((long / "run.json").read_text())["identity"]

    before = tree(run)
    error = failed(capsys, *command, "--steps", first, "--resume")
    assert f"has trained {steps} steps already, and --steps is {first}. Give --steps {steps} or more" in error
    assert tree(run) == before
    assert call(*command, "--steps", steps, "--resume") == 0
    assert f"All {steps} steps are trained already" in capsys.readouterr().out
    assert curve(run) == curve(long)
    assert same(weights(run), weights(long))


@pytest.mark.filterwarnings("default::UserWarning")  # the command line prints it
def test_what_differs_from_one_long_run_is_said(home, tmp_path, capsys):
    run = tmp_path / "run"
    command = finetune(home, run, "--init", "default")
    assert call(*command) == 0
    assert call(*command, "--steps", "8", "--resume") == 0
    error = capsys.readouterr().err
    assert error.startswith(
        "lors-cuda: warning: The cosine rate of this run was to reach 0 at step 6. After step 6 it is"
    )
    assert error.count("\n") == 1
    rates = [entry["lr"] for entry in curve(run)]
    assert rates[5] < 1e-3 < 3e-3  # the end of the first schedule
    assert rates[6] == pytest.approx(3e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 5 / 7)).item()))  # of 8 steps

    warm = tmp_path / "warm"
    command = finetune(home, warm, *CONSTANT, "--steps", "2")
    assert call(*command) == 0
    (warm / "run.json").write_text((warm / "run.json").read_text().replace('"warmup_steps": 1', '"warmup_steps": 2'))
    capsys.readouterr()
    assert call(*command, "--steps", "3", "--resume") == 0
    assert "one run of 3 steps is the same with --warmup-steps 2" in capsys.readouterr().err
    assert "warmup_steps was 2, is 1" in failed(capsys, *command, "--steps", "4", "--resume", "--warmup-steps", "1")


def test_a_run_starts_from_an_adapter(home, tmp_path, capsys):
    start, run = tmp_path / "start", tmp_path / "run"
    model = load_sparse_checkpoint(home / "sparse")
    config = LoRSConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, gradient="exact",
        use_rslora=True, layout="bitmap", modules_to_save=["norm"],
    )  # fmt: skip
    get_lors_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_adapter(model, start)
    before = tree(start)
    command = finetune(home, run, "--adapter", start, "--steps", "2", "--lr", "1e-12", "--bf16")
    at = command.index("--rank")
    del command[at : at + 2]
    assert call(*command) == 0
    assert tree(start) == before
    ours, theirs = weights(run), weights(start)
    assert ours.keys() == theirs.keys()  # the norm is trained whole again
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)  # two steps at a rate of nothing
    written, own = (json.loads((at / "adapter_config.json").read_text()) for at in (run, start))
    assert written == own | {"base_model_name_or_path": written["base_model_name_or_path"]}
    loaded = load_adapter(load_sparse_checkpoint(home / "sparse"), run)
    assert loaded.model.layers[0].mlp.up_proj.r == 2
    assert call(*command, "--resume") == 0

    capsys.readouterr()
    (tmp_path / "new").mkdir()
    for more, fragment in [
        (["--rank", "8"], "--rank was given, and the adapter in '{}', from which training starts, has 3. Leave --rank"),
        (["--alpha", "3"], "has 7"),
        (["--gradient", "lors"], "has exact"),
        (["--layout", "auto"], "has bitmap"),
        (["--target-modules", "q_proj"], "--target-modules was given, and"),
        (["--rank-pattern", "q_proj=2"], "--rank-pattern was given"),
        (["--init", "gradient"], "has its own. Leave --init out"),
    ]:
        error = failed(capsys, *command, "--output", tmp_path / "new", *more)
        assert fragment.format(start) in error
    assert not list((tmp_path / "new").iterdir())
    assert "adapter was '" in failed(
        capsys, "finetune", "--model", home / "sparse", "--data", home / "text.txt", "--output", run, "--resume",
        "--steps", "2", "--lr", "1e-12", "--bf16",
    )  # fmt: skip
    assert "is the adapter's directory" in failed(capsys, *command, "--output", start, "--overwrite")
    checkpoint = run / "checkpoint-2"
    assert "would remove the adapter" in failed(capsys, *command, "--adapter", checkpoint, "--overwrite")
    assert checkpoint.is_dir()


def test_an_adapter_to_start_from_must_belong_to_the_base(home, adapter, tmp_path, capsys):
    plain = ["finetune", "--data", home / "text.txt", "--output", tmp_path / "run", "--steps", "1", "--batch-size", "2"]
    plain += ["--sequence-length", "48", "--tokenizer", home / "sparse", "--adapter"]
    shallow, masked = tmp_path / "shallow", tmp_path / "masked"
    byte_llama(layers=1).save_pretrained(shallow)
    error = failed(capsys, *plain, adapter, "--model", shallow)
    assert "the adapter belongs to another model" in error
    prune = ["prune", "--model", home / "dense", "--output", masked, "--method", "magnitude"]
    assert call(*prune) == 0
    error = failed(capsys, *plain, adapter, "--model", masked)
    assert "another sparsity mask" in error
    assert "--no-strict-mask" in error
    assert not (tmp_path / "run").exists()
    assert "adapter_config.json' does not exist" in failed(capsys, *plain, tmp_path / "no", "--model", masked)
    assert call(*plain, adapter, "--model", masked, "--no-strict-mask") == 0
    shutil.rmtree(tmp_path / "run")


def test_ranks_and_saved_modules_by_name(home, tmp_path, capsys):
    run = tmp_path / "run"
    command = finetune(home, run, "--steps", "1", "--init", "default", "--target-modules", r".*\.(q|up)_proj")
    assert (
        call(*command, "--rank-pattern", "up_proj=2", "--alpha-pattern", "up_proj=3", "--modules-to-save", "norm") == 0
    )
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {"up_proj": 2}, {"up_proj": 3.0})
    assert len(config["target_modules"]) == 4
    assert config["modules_to_save"] == ["norm"]
    capsys.readouterr()
    for wrong in ("up_proj", "=2", "up_proj=0"):
        assert call(*command, "--rank-pattern", wrong) == 2
        assert "argument --rank-pattern: " in capsys.readouterr().err
