# SPDX-License-Identifier: Apache-2.0
"""The command line as a person drives it: the whole way in processes, a kill and a resume, and every bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from byte_model import TEXT, byte_llama, byte_tokenizer, full_disk
from lors_cuda.cli import main
from models import tiny_llama

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
safetensors_torch = pytest.importorskip("safetensors.torch")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHORT = ["--sequence-length", "48", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the processes: sums depend on the number of threads in their last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lors_cuda(*arguments, **options) -> subprocess.CompletedProcess[str]:
    """Run `python -m lors_cuda` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "lors_cuda", *map(str, arguments)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False, **options,
    )  # fmt: skip


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def call(*arguments) -> int:
    """The same in this process."""
    return main([str(argument) for argument in arguments])


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def linear_zeros(directory: Path) -> dict[str, torch.Tensor]:
    tensors = safetensors_torch.load_file(directory / "model.safetensors")
    return {name: tensor == 0 for name, tensor in tensors.items() if name.endswith("proj.weight")}


def curve(run: Path) -> list[dict]:
    entries = [json.loads(line) for line in (run / "training.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A dense model with a tokenizer, a text, and what `prune` makes of them."""
    home = tmp_path_factory.mktemp("cli")
    byte_llama().save_pretrained(home / "dense")
    byte_tokenizer().save_pretrained(home / "dense")
    (home / "text.txt").write_text(TEXT)
    (home / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(40))
    )
    output = succeeded(
        lors_cuda("prune", "--model", home / "dense", "--output", home / "sparse", "--data", home / "text.txt")
    )
    assert "Sparsity 50.00% over 14 linears" in output
    assert "down_proj      2         4,096  50.00%" in output
    return home


def finetune(home: Path, output: Path, *more) -> list:
    return [
        "finetune", "--model", home / "sparse", "--data", home / "text.txt", "--output", output, "--rank", "4",
        "--lr", "3e-3", "--steps", "6", *SHORT, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(home) -> Path:
    """A short finished run; tests must not change it."""
    output = home / "adapter"
    assert call(*finetune(home, output, "--json")) == 0
    return output


# ---- the whole way ----


def test_pruned_model_is_two_of_four_and_has_its_tokenizer(home):
    zeros = linear_zeros(home / "sparse")
    assert len(zeros) == 14
    for name, zero in zeros.items():
        assert bool((zero.view(zero.shape[0], -1, 4).sum(-1) == 2).all()), name
    for file in ("tokenizer_config.json", "added_tokens.json"):
        assert (home / "sparse" / file).read_bytes() == (home / "dense" / file).read_bytes()


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
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint.pt", "loss.png", "run.json", "training.jsonl"
    ]  # fmt: skip

    sparse, merged = home / "sparse", tmp_path / "merged"
    output = succeeded(lors_cuda("merge", "--model", sparse, "--adapter", run, "--output", merged))
    assert "Mask unchanged in all 14 merged linears: sparsity 50.0000% before, 50.0000% after" in output
    before, after = linear_zeros(sparse), linear_zeros(merged)
    assert all(torch.equal(before[name], after[name]) for name in before)

    def evaluated(*arguments):
        capsys.readouterr()
        assert call("eval", "--data", home / "text.txt", *SHORT, "--json", *arguments) == 0
        return json.loads(capsys.readouterr().out)

    adapted, plain = evaluated("--model", sparse, "--adapter", run), evaluated("--model", merged)
    assert adapted["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    assert adapted["perplexity"] < 0.5 * adapted["perplexity_without_adapter"]
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
    assert 2 * 8 * min(completion_tokens) * 4 <= result["tokens"] <= 2 * 8 * max(completion_tokens) * 4
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 8.0, True)
    assert config["lors"]["gradient"] == "exact"
    assert {entry["lr"] for entry in curve(run)} == {2e-4}
    assert call("eval", "--model", sparse, "--adapter", run, "--data", home / "pairs.jsonl") == 0
    assert "without the adapter" in capsys.readouterr().out


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
        "for name in ('transformers', 'tokenizers', 'safetensors', 'tqdm', 'matplotlib'): sys.modules[name] = None\n"
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


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
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
        (KeyboardInterrupt(), "interrupted"),
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


# ---- bad input: exit code 1, one sentence, nothing written ----


def failed(capsys, *arguments) -> str:
    capsys.readouterr()
    assert call(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("lors-cuda: error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("none.txt", None, ["none.txt' does not exist"]),
        ("empty.txt", "", ["empty.txt' is empty"]),
        ("bad.jsonl", '{"text": "a"}\nnot json\n', ["bad.jsonl', line 2 is not JSON"]),
        ("fields.jsonl", '{"input": "a"}\n', ["line 1", '"prompt" and "completion"']),
        ("table.csv", "a,b", ["'.csv'", ".txt or .jsonl"]),
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
    assert "not available in this version" in failed(capsys, *finetune(home, run, "--layout", "2:4"))
    assert not run.exists()


def test_an_adapter_for_another_model(home, adapter, tmp_path, capsys):
    before = tree(adapter)
    merge = ["merge", "--adapter", adapter, "--output", tmp_path / "merged", "--model"]
    wider = tmp_path / "wider"
    byte_llama(intermediate_size=96).save_pretrained(wider)
    assert "but the model needs" in failed(capsys, *merge, wider)
    other_mask = tmp_path / "mask"
    prune = ["prune", "--model", home / "dense", "--output", other_mask, "--method", "magnitude"]
    assert call(*prune) == 0
    assert "another sparsity mask" in failed(capsys, *merge, other_mask)
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
    before = tree(adapter)
    error = failed(capsys, *finetune(home, adapter))
    assert "--resume" in error
    assert "--overwrite" in error
    assert "steps was 6, is 7" in failed(capsys, *finetune(home, adapter, "--resume", "--steps", "7"))
    assert tree(adapter) == before


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


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(home, adapter, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_bytes((adapter / "run.json").read_bytes())
    assert call(*finetune(home, run, "--resume")) == 0
    assert "starts from the beginning" in capsys.readouterr().out
    assert curve(run) == curve(adapter)
