# SPDX-License-Identifier: Apache-2.0
"""The command line as a person drives it: the whole way in processes, a kill and a resume, help and info."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from byte_model import byte_tokenizer
from cli_calls import (
    ENVIRONMENT,
    SHORT,
    call,
    curve,
    finetune,
    linear_zeros,
    lors_cuda,
    safetensors_torch,
    succeeded,
)
from lors_cuda import LoRSConfig, get_lors_model, load_sparse_checkpoint, save_adapter
from models import searched_models

pytest_plugins = ["cli_fixtures"]

# ---- the whole way ----


def test_pruned_model_is_two_of_four_and_has_its_tokenizer(home, tmp_path):
    sparse = tmp_path / "sparse"
    prune = ["prune", "--model", home / "dense", "--output", sparse, "--data", home / "text.txt"]
    output = succeeded(lors_cuda(*prune))
    assert "Sparsity 50.00% over 14 linears" in output
    assert "down_proj        2         4,096  50.00%" in output
    zeros = linear_zeros(sparse)
    assert len(zeros) == 14
    for name, zero in zeros.items():
        assert bool((zero.view(zero.shape[0], -1, 4).sum(-1) == 2).all()), name
    for file in ("tokenizer_config.json", "added_tokens.json"):
        assert (sparse / file).read_bytes() == (home / "dense" / file).read_bytes()


def test_kill_resume_merge_and_evaluate(home, tmp_path, capsys):
    """Killed by signal 9 in the middle, the same command with --resume ends where an undisturbed run ends."""
    options = ["--steps", "100", "--checkpoint-every", "10"]
    run = tmp_path / "run"
    command = [sys.executable, "-m", "lors_cuda", *map(str, finetune(home, run, *options))]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = run / "training.jsonl"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.read_bytes().count(b"\n") >= 25):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert 25 <= len(log.read_bytes().splitlines()) < 100, "the run ended before it was killed"
    assert not (run / "adapter_model.safetensors").exists()

    output = succeeded(lors_cuda(*finetune(home, run, *options, "--resume")))
    assert "Adapter, log and plot saved" in output
    reported = [int(line.split()[1]) for line in output.splitlines() if line.startswith("step")]
    assert reported[0] > 20, "it began anew instead of going on from its checkpoint"
    undisturbed = tmp_path / "undisturbed"
    assert call(*finetune(home, undisturbed, *options)) == 0
    assert curve(run) == curve(undisturbed)
    assert (run / "adapter_config.json").read_bytes() == (undisturbed / "adapter_config.json").read_bytes()
    # Not the bytes: safetensors writes the entries of its header in no fixed order.
    ours, theirs = (safetensors_torch.load_file(at / "adapter_model.safetensors") for at in (run, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint-100", "checkpoint-90", "loss.png", "run.json",
        "training.jsonl",
    ]  # fmt: skip

    sparse, merged = home / "sparse", tmp_path / "merged"
    output = succeeded(lors_cuda("merge", "--model", sparse, "--adapter", run, "--output", merged))
    assert "Mask unchanged in all 14 merged layers: zeros in all weights of the model" in output
    before, after = linear_zeros(sparse), linear_zeros(merged)
    assert all(torch.equal(before[name], after[name]) for name in before)

    def evaluated(*arguments):
        capsys.readouterr()
        assert call("eval", "--data", home / "text.txt", *SHORT, "--json", *arguments) == 0
        return json.loads(capsys.readouterr().out)

    adapted, plain = evaluated("--model", sparse, "--adapter", run), evaluated("--model", merged)
    assert adapted["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    assert adapted["perplexity"] < 0.5 * adapted["perplexity_without_adapter"]
    assert adapted["perplexity_without_adapter"] == evaluated("--model", sparse)["perplexity"]
    assert plain["sparsity"] == 0.5


def test_completion_only_data_and_the_other_options(home, tmp_path, capsys):
    sparse = tmp_path / "sparse"
    prune = ["prune", "--model", home / "dense", "--output", sparse, "--method", "magnitude", "--pattern", "62.5%"]
    assert call(*prune, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sparsity"] == 0.625
    run = tmp_path / "run"
    options = [
        "--model", sparse, "--data", home / "pairs.jsonl", "--output", run, "--steps", "4", "--json",
        "--init", "default", "--gradient", "exact", "--layout", "dense", "--alpha", "8", "--use-rslora",
        "--target-modules", "q_proj", "up_proj", "--accumulate", "2", "--schedule", "constant",
        "--warmup-steps", "0", "--seed", "3",
    ]  # fmt: skip
    assert call("finetune", *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["adapted_layers"] == 4
    completion_tokens = [len(str(n + 1)) + 1 for n in range(40)]
    # 40 pairs are 5 batches: two steps of two, one of one, and the first of the next epoch.
    assert 7 * 8 * min(completion_tokens) <= result["tokens"] <= 7 * 8 * max(completion_tokens)
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 8.0, True)
    assert config["lors"]["gradient"] == "exact"
    assert {entry["lr"] for entry in curve(run)} == {2e-4}
    assert call("eval", "--model", sparse, "--adapter", run, "--data", home / "pairs.jsonl") == 0
    assert "without the adapter" in capsys.readouterr().out


def test_packing_trains_on_the_same_tokens_in_fewer_steps(home, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--data", home / "pairs.jsonl", "--sequence-length", "64", "--batch-size", "8", "--steps", "1"]
    assert call("finetune", "--model", home / "sparse", "--output", run, *options, "--packing", "--json") == 0
    tokens = sum(len(str(n + 1)) + 1 for n in range(40))
    assert json.loads(capsys.readouterr().out)["tokens"] == tokens  # all 40 pairs
    assert call("finetune", "--model", home / "sparse", "--output", run, *options, "--resume") == 1
    assert "data was" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::UserWarning")
def test_conversations_go_through_prune_finetune_and_eval(home, tmp_path, capsys):
    chat = tmp_path / "chat.JSON"
    turns = [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]
    chat.write_text(json.dumps([{"conversations": turns * 2}] * 8, indent=1))
    (tmp_path / "tokenizer").mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = ["--data", chat, "--tokenizer", tmp_path / "tokenizer", "--json"]
    assert call("prune", "--model", home / "dense", "--output", tmp_path / "sparse", *data) == 0
    assert call("finetune", "--model", tmp_path / "sparse", "--output", tmp_path / "run", "--steps", "2", *data) == 0
    capsys.readouterr()
    assert call("eval", "--model", tmp_path / "sparse", "--adapter", tmp_path / "run", *data) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 8 * 2 * 2
    assert call("eval", "--model", tmp_path / "sparse", "--data", chat) == 0  # no template of its own
    shown = capsys.readouterr()
    assert shown.err.startswith("lors-cuda: warning: The tokenizer has no chat template.")
    assert shown.err.count("\n") == 1


def test_what_was_cut_is_said(home, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    records = [{"text": "x" * 40}, {"prompt": "x" * 40, "completion": "y"}, {"prompt": "x", "completion": ""}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert call("eval", "--model", home / "sparse", "--data", path, "--sequence-length", "16") == 0
    said = capsys.readouterr().out
    assert "1 text(s) longer than --sequence-length go on in further ones" in said
    assert "1 cut to fit into --sequence-length, 1 without a token to predict left out" in said


def test_evaluation_while_it_trains(home, tmp_path, capsys):
    run = tmp_path / "run"
    evaluated = finetune(home, run, "--eval-data", home / "text.txt", "--checkpoint-every", "4", "--bf16")
    assert call(*evaluated, "--gradient-checkpointing") == 0
    printed = capsys.readouterr().out
    assert printed.count("evaluation: loss") == 2
    entries = [json.loads(line) for line in (run / "training.jsonl").read_text().splitlines()]
    found = [entry for entry in entries if "eval_loss" in entry]
    assert [entry["step"] for entry in found] == [4, 6]
    assert found[1]["eval_perplexity"] < found[0]["eval_perplexity"]
    result = json.loads((run / "run.json").read_text())["result"]
    assert result["eval_perplexity"] == found[1]["eval_perplexity"]


def test_gradient_init_changes_the_start_and_not_the_output(home, tmp_path):
    runs = {}
    for init in ("gradient", "default"):
        assert call(*finetune(home, tmp_path / init, "--init", init)) == 0
        runs[init] = curve(tmp_path / init)
    assert runs["gradient"][0]["loss"] == runs["default"][0]["loss"]
    assert runs["gradient"][-1]["loss"] != runs["default"][-1]["loss"]


# ---- help, info, errors of the program itself ----


def test_help_and_info_need_torch_alone():
    program = (
        "import sys\n"
        "for name in ('transformers', 'accelerate', 'tokenizers', 'safetensors', 'tqdm', 'matplotlib', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        "from lors_cuda.cli import main\n"
        "codes = [main(['--help']), main(['--version']), main(['prune', '--help']), main(['finetune', '--help']),\n"
        "         main(['info']), main(['prune', '--model', '.', '--output', 'x', '--method', 'magnitude'])]\n"
        "print(codes)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 1]"
    for word in ("merge", "finetune", "--pattern", "--gradient", "linear_backward"):
        assert word in done.stdout


def test_info_says_which_kernels_serve_and_why_not(capsys):
    assert call("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["torch"] == torch.__version__
    assert all(kernel["cpu"] for kernel in info["kernels"].values())
    assert info["cuda"]["available"] == (info["cuda"]["reason"] is None)
    assert call("info") == 0
    shown = capsys.readouterr().out
    assert info["cpu"]["capability"] in shown
    if info["cuda"]["reason"] is not None:
        assert info["cuda"]["reason"] in shown
        assert not any(kernel["cuda"] for kernel in info["kernels"].values())


@pytest.mark.parametrize("package", ["transformers", "matplotlib", "accelerate"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(home, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert call(*finetune(home, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert error == (
        f"lors-cuda: error: this command needs the package {package}, which is not installed; run: pip install "
        "'lors-cuda[cli]'\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (KeyError("x"), "unexpected KeyError: 'x'; run it again with --debug to see where"),
        (ValueError("two\nlines"), "two lines"),
        (PermissionError(13, "Permission denied", "/some/file"), "Permission denied: '/some/file'"),
    ],
)
def test_every_failure_is_one_line(capsys, monkeypatch, problem, message):
    def fail(args):
        raise problem

    monkeypatch.setattr("lors_cuda.cli.info.run", fail)
    assert call("info") == 1
    assert capsys.readouterr().err == f"lors-cuda: error: {message}\n"
    assert call("info", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_eval_without_the_adapter_is_the_base_also_where_modules_were_trained(home, tmp_path, capsys):
    sparse, adapter = home / "sparse", tmp_path / "adapter"
    model = load_sparse_checkpoint(sparse)
    get_lors_model(model, LoRSConfig(r=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    save_adapter(model, adapter)
    measured = []
    for more in ([], ["--adapter", adapter]):
        capsys.readouterr()
        assert call("eval", "--model", sparse, "--data", home / "text.txt", *SHORT, "--json", *more) == 0
        measured.append(json.loads(capsys.readouterr().out))
    assert measured[1]["perplexity_without_adapter"] == measured[0]["perplexity"] != measured[1]["perplexity"]


def test_finetune_finds_its_targets_once(home, tmp_path, monkeypatch):
    walks = searched_models(monkeypatch)
    assert call(*finetune(home, tmp_path / "run", "--steps", "1", "--init-batches", "1")) == 0
    assert len(walks) == 1
