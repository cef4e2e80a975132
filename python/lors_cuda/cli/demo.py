# SPDX-License-Identifier: Apache-2.0
# lors-cuda demo: dense model -> pruned 2:4 -> repaired by LoRS and by two other methods -> merged, saved, reloaded.
# With --moe a mixture of experts, and LoRS alone: the other methods here know linears only, and codes hold no experts.
# Uses the library as the other commands do; _demo_peers.py has the comparison methods, _demo_report.py table and plot.
# What it promises is checked at the end: the exit code is 1, with a sentence, where a promise does not hold.
"""``lors-cuda demo``: the whole story on a small model and real text, offline."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from .._batches import running
from .._files import new_directory, replace_file
from .._library import build_info
from ..adapter_directory import require_safetensors
from ..checkpoint import load_adapter, save_adapter
from ..compressed_tensors.kept import QUANTIZED, quantize_linears
from ..config import LoRSConfig
from ..data import TokenDataset, load_data
from ..evaluation import evaluate
from ..gradient_init import estimate_gradients, init_from_gradients
from ..model import get_lors_model, merge_and_unload
from ..pruning import prune
from ..sparsity import measure_sparsity
from . import UsageError
from ._common import _quiet_transformers, layer_weight, load_model, positive_float, positive_int, say, seed_number
from ._demo_peers import AutogradMasking, PeerLinear, PlainLoRA, measure_steps, merge_layers, replace_layers
from ._demo_report import Row, notes, plot, table, whats_next
from ._demo_text import language_reference, split_topics
from ._model_files import save_model

MARKER_NAME = "demo.json"
_MADE_BY = "lors-cuda demo"
_HELD_OUT_BYTES = 16_000
_EVALUATED_AT_ONCE = 2048  # bytes
_HEADS = 4
_EXPERTS, _EXPERTS_PER_TOKEN = 8, 2  # with --moe; each as wide as half the dense MLP, so that a token costs the same
_OPTIONS = (
    "moe", "seed", "dense_steps", "steps", "lr", "rank", "layers", "hidden_size", "batch_size", "sequence_length",
)  # fmt: skip
_POINTS = 5  # of each curve, after the start
_ROUNDS = 15
# Equal weights give equal logits but for the order of float32 sums; this is far above that and far below any change.
_LOGIT_TOLERANCE = 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Method:
    """One way to fine-tune the pruned model; ``peer`` is None for LoRS.

    ``scheme``: how the pruned model is quantized before (`lors-cuda quantize`); "" if it is not.
    """

    name: str
    label: str
    color: str
    gradient: str = "lors"
    init: str = "default"
    scheme: str = ""
    peer: type[PeerLinear] | None = None


METHODS = (
    Method("lors", "LoRS", "tab:blue"),
    Method("lors-gradient-init", "LoRS, gradient init", "tab:green", init="gradient"),
    Method("lors-exact", "LoRS, exact gradient", "tab:purple", gradient="exact"),
    Method("lors-int4", "LoRS, int4 base", "tab:cyan", scheme="int4"),
    Method("sqft", "masked by autograd (SQFT)", "tab:orange", peer=AutogradMasking),
    Method("lora", "plain LoRA", "tab:red", peer=PlainLoRA),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--output", type=Path, default=Path("lors-demo"), metavar="DIR", help="where models, table and plot go"
    )
    parser.add_argument(
        "--moe", action="store_true",
        help="with a mixture of experts, a Qwen3-MoE, instead of a Llama; experts have a quarter of --rank",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="of the model's start, the adapters and the data order"
    )
    parser.add_argument("--dense-steps", type=positive_int, default=700, help="training steps of the dense model")
    parser.add_argument("--steps", type=positive_int, default=100, help="fine-tuning steps of each method")
    parser.add_argument("--lr", type=positive_float, default=2e-3, help="peak learning rate of the fine-tuning")
    parser.add_argument("--rank", type=positive_int, default=16, help="rank of the adapters; lora_alpha is twice it")
    parser.add_argument("--layers", type=positive_int, default=4, help="of the model")
    parser.add_argument("--hidden-size", type=positive_int, default=128, help="of the model, a multiple of 16")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="sequences per step")
    parser.add_argument("--sequence-length", type=positive_int, default=128, metavar="BYTES", help="of a sequence")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tell the story into a new directory, which takes its place when everything is written.

    Raises:
        RuntimeError: a promise does not hold (after everything was written).
    """
    if args.hidden_size % 16 or args.rank > args.hidden_size or args.sequence_length < 2:
        raise UsageError("--hidden-size must be a multiple of 16 and at least --rank, --sequence-length at least 2")
    import accelerate  # noqa: F401  (asked for before the work, not in it)

    require_safetensors()
    _quiet_transformers()
    _check_output(args.output)
    with new_directory(args.output.resolve(), replace=True) as directory:
        demo = _Demo(args, directory)
        result, broken = demo.run()
    say(args, whats_next(args))
    if broken:
        raise RuntimeError(f"{' '.join(broken)} Everything is in '{args.output}' to be looked at.")
    return result


class _Demo:
    """One run: its options, where it writes, and what its parts share."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args, self.directory = args, directory
        self.began = time.perf_counter()
        self.shown = not args.json
        self.data: TokenDataset
        self.held_out: TokenDataset
        self.methods = tuple(one for one in METHODS if not args.moe or (one.peer is None and not one.scheme))
        self.broken: list[str] = []
        self.bases: dict[str, nn.Module] = {}  # what is fine-tuned, by its scheme

    def say(self, text: str) -> None:
        """Print for a person, with the time since the start."""
        if self.shown:
            print(f"[{time.perf_counter() - self.began:4.0f} s] {text}", flush=True)

    def run(self) -> tuple[dict[str, Any], list[str]]:
        """Everything up to the files; returns the result and the promises that do not hold, as sentences."""
        args = self.args
        self.say(
            f"lors_cuda {__version__} on {torch.get_num_threads()} thread(s), {build_info()['cpu_capability']}, torch "
            f"{torch.__version__}: repair a pruned language model and keep every zero. Offline."
        )
        tokenizer = self.prepare_text()
        dense = self.train_dense()
        dense_row = self.row_of("dense", "dense model", dense)
        self.say(f"      held-out perplexity {dense_row.perplexity:.3f} per byte")
        self.save(dense, "dense", tokenizer)

        too = ", its experts too" if args.moe else ""
        self.say(f"2/5  Prune it to 2:4 with Wanda{too}: of four weights in a row, two become zero.")
        calibration = self.data.shuffled_batches(args.batch_size, 8, args.seed)
        prune(dense, "2:4", method="wanda", batches=calibration, progress=self.shown)
        sparse = dense  # pruned in place; the dense one is on the disk
        pruned_row = self.row_of("pruned", "pruned to 2:4 (Wanda)", sparse)
        self.say(
            f"      held-out perplexity {pruned_row.perplexity:.3f}, sparsity "
            f"{pruned_row.sparsity:.2%} in the linears{' and experts' if args.moe else ''}, "
            f"{pruned_row.model_sparsity:.2%} in all weights"
        )
        self.save(sparse, "sparse", tokenizer)
        self.bases[""] = sparse
        for scheme in sorted({method.scheme for method in self.methods if method.scheme}):
            self.bases[scheme] = self.quantize(sparse, scheme)

        self.say(
            f"3/5  Repair it, {args.steps} steps with each method: same data, same order, rank {args.rank}, peak "
            f"learning rate {args.lr:g}."
        )
        adapted, rows = {}, []
        for method in self.methods:
            adapted[method.name], row = self.fine_tune(method, pruned_row)
            rows.append(row)
            self.say(f"      {method.label:<26} {row.perplexity:.3f}")

        self.say(f"4/5  Measure a step: {_ROUNDS} rounds through all methods, then one under the memory profiler.")
        batches = self.data.shuffled_batches(args.batch_size, _ROUNDS, args.seed)
        for row, cost in zip(rows, measure_steps(adapted, batches, _ROUNDS).values(), strict=True):
            row.ms_per_step, row.peak_bytes = cost.milliseconds, cost.peak_bytes

        self.say("5/5  Merge, save, read back from the disk, and compare.")
        checks = {}
        for method, row in zip(self.methods, rows, strict=True):
            if method.peer is None:
                checks[method.name] = self.merge_and_reload(method, row, adapted.pop(method.name), sparse)
            else:
                merge_layers(adapted[method.name])
                row.set_sparsity(measure_sparsity(adapted[method.name]))
        masked_again = [self.mask_again(adapted["lora"], sparse)] if "lora" in adapted else []
        return self.write([dense_row, pruned_row, *rows], masked_again, checks), self.broken

    # ---- the parts ----

    def prepare_text(self) -> Any:
        """Write and read the text; returns the tokenizer, whose tokens are bytes."""
        from transformers import ByT5Tokenizer  # needs no vocabulary file

        split = split_topics(language_reference(), _HELD_OUT_BYTES)
        train_bytes, held_out_bytes = split.train.encode(), split.held_out.encode()
        replace_file(self.directory / "train.txt", train_bytes)
        replace_file(self.directory / "heldout.txt", held_out_bytes)
        tokenizer = ByT5Tokenizer()
        self.data = load_data(self.directory / "train.txt", tokenizer, self.args.sequence_length)
        self.held_out = load_data(self.directory / "heldout.txt", tokenizer, self.args.sequence_length)
        self.say(
            f"Text: the language reference of Python {platform.python_version()}. {len(train_bytes):,} bytes of "
            f"{split.train_topics} topics to train on, {len(held_out_bytes):,} bytes of {split.held_out_topics} others "
            "held out; no paragraph is in both."
        )
        return tokenizer

    def train_dense(self) -> nn.Module:
        """Train a Llama, or a Qwen3-MoE, of transformers' own class from scratch."""
        from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

        args = self.args
        torch.manual_seed(args.seed)
        width = args.hidden_size * 8 // 3 // 16 * 16
        sizes: dict[str, Any] = {
            "hidden_size": args.hidden_size,
            "num_hidden_layers": args.layers,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _HEADS,
            "vocab_size": 384,  # of ByT5: 256 bytes and its special tokens
            "max_position_embeddings": args.sequence_length,
            "initializer_range": 0.06,  # with the default, 0.02, so narrow a model learns at half the speed
        }
        model: nn.Module
        if args.moe:
            sizes |= {"num_experts": _EXPERTS, "num_experts_per_tok": _EXPERTS_PER_TOKEN}
            sizes |= {"moe_intermediate_size": width // 32 * 16, "head_dim": args.hidden_size // _HEADS}
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, norm_topk_prob=True))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=width))
        kind = f"Qwen3-MoE of {_EXPERTS} experts, {_EXPERTS_PER_TOKEN} a token," if args.moe else "Llama"
        self.say(
            f"1/5  Train a dense {kind} from scratch: {args.layers} layers of width {args.hidden_size}, "
            f"{sum(p.numel() for p in model.parameters()):,} weights, {args.dense_steps} steps of "
            f"{args.batch_size * args.sequence_length} bytes."
        )
        every = max(1, args.dense_steps // 5)

        def report(entry: dict[str, Any]) -> None:
            if entry["step"] % every == 0:
                self.say(f"      step {entry['step']:>4}  training loss {entry['loss']:.3f}")

        # From scratch at this rate: with a shorter warmup the perplexity depends much on the order of the data.
        self.train(model, args.dense_steps, 4e-3, args.seed, report, warmup_steps=args.dense_steps // 7)
        return model

    def quantize(self, sparse: nn.Module, scheme: str) -> nn.Module:
        """A copy of the pruned model as codes, saved."""
        model = copy.deepcopy(sparse)
        quantize_linears(model, scheme, [layer.name for layer in measure_sparsity(sparse)])
        base = self.base_directory(scheme)
        base.mkdir()
        save_model(model, self.directory / "sparse", base, QUANTIZED)
        self.say(f"      rounded to {scheme} codes: held-out perplexity {self.perplexity(model):.3f}")
        return model

    def base_directory(self, scheme: str) -> Path:
        return self.directory / (f"sparse-{scheme}" if scheme else "sparse")

    def fine_tune(self, method: Method, pruned: Row) -> tuple[nn.Module, Row]:
        """Train one method's adapters on a copy of its base."""
        args = self.args
        model = copy.deepcopy(self.bases[method.scheme])
        start = self.perplexity(model) if method.scheme else pruned.perplexity
        config = LoRSConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            gradient=method.gradient,
            requantize=bool(method.scheme),
            rank_pattern={r"experts\.\w+": max(1, args.rank // 4)} if args.moe else {},
            alpha_pattern={r"experts\.\w+": 2 * max(1, args.rank // 4)} if args.moe else {},
        )
        gradients = None
        if method.init == "gradient":
            batches = self.data.shuffled_batches(args.batch_size, 8, args.seed)
            gradients = estimate_gradients(model, batches, config=config, progress=self.shown)
        torch.manual_seed(args.seed)  # the same lora_A for all methods that draw it
        get_lors_model(model, config)
        if gradients is not None:
            init_from_gradients(model, gradients)
        if method.peer is not None:
            replace_layers(model, method.peer)
        curve = [(0, start)]  # lora_B is zero at first
        marks = {round(args.steps * point / _POINTS) for point in range(1, _POINTS + 1)}

        def follow(entry: dict[str, Any]) -> None:
            if entry["step"] in marks:
                curve.append((entry["step"], self.perplexity(model)))

        self.train(model, args.steps, args.lr, args.seed + 1, follow)
        row = replace(
            pruned, name=method.name, label=method.label, perplexity=curve[-1][1], curve=curve, color=method.color
        )
        row.dashed = method.peer is not None
        if method.peer is None and not row.perplexity < start:
            self.broken.append(
                f"{method.label} has perplexity {row.perplexity:.3f}, which is not below the {start:.3f} it began with."
            )
        return model, row

    def merge_and_reload(self, method: Method, row: Row, model: nn.Module, sparse: nn.Module) -> dict[str, Any]:
        """Save adapter and merged model, read both from the disk, and compare them with the model in memory."""
        adapter, merged = self.directory / method.name / "adapter", self.directory / method.name / "merged"
        merged.mkdir(parents=True)
        save_adapter(model, adapter)
        expected = self.logits(model)
        base = self.base_directory(method.scheme)
        if method.scheme:
            save_model(model, base, merged, QUANTIZED)
        else:
            merge_and_unload(model)
            save_model(model, base, merged)
        reloaded = load_model(merged, "cpu")
        row.set_sparsity(measure_sparsity(reloaded))
        lost = sum(int(((weight != 0) & (pruned == 0)).sum()) for weight, pruned in _pruned_weights(reloaded, sparse))
        size = expected.abs().max().item()
        adapted_again = load_adapter(load_model(base, "cpu"), adapter)
        differences = {
            name: (self.logits(other) - expected).abs().max().item()
            for name, other in (("merged", reloaded), ("adapted", adapted_again))
        }
        if lost:
            self.broken.append(f"{method.label}: merging turned {lost} zeros into other values.")
        for name, difference in differences.items():
            if not difference <= _LOGIT_TOLERANCE * size:
                self.broken.append(
                    f"{method.label}: a logit of the {name} model read from the disk differs by {difference:.3g} from "
                    f"the model in memory (largest logit {size:.3g})."
                )
        self.say(
            f"      {method.label:<26} {lost} zeros lost; largest difference of a logit: merged "
            f"{differences['merged']:.2g}, reloaded adapter {differences['adapted']:.2g} (logits up to {size:.1f})"
        )
        return {"zeros_lost": lost, "largest_logit": size, "logit_difference": differences}

    def mask_again(self, merged: nn.Module, sparse: nn.Module) -> Row:
        """Plain LoRA's other way out: merge, then set the pruned weights to zero once more. Changes ``merged``."""
        with torch.no_grad():
            for weight, pruned in _pruned_weights(merged, sparse):
                weight.masked_fill_(pruned == 0, 0.0)
        return self.row_of("lora-masked", "plain LoRA, masked again", merged)

    # ---- what they use ----

    def train(
        self,
        model: nn.Module,
        steps: int,
        lr: float,
        seed: int,
        each: Callable[[dict[str, Any]], None],
        warmup_steps: int | None = None,
    ) -> None:
        """Train as `lors-cuda finetune` does, without checkpoints; ``each`` gets every step's entry."""
        from . import _trainer

        arguments = _trainer.arguments(
            self.directory, steps=steps, batch_size=self.args.batch_size, lr=lr, seed=seed,
            device=torch.device("cpu"), save_strategy="no",
            warmup_steps=warmup_steps,
        )  # fmt: skip
        report = _trainer.Report(bar=self.shown, each=each)
        with running(model, training=True):
            _trainer.CommandTrainer(model, arguments, self.data, callbacks=[report]).train()

    def perplexity(self, model: nn.Module) -> float:
        at_once = max(1, _EVALUATED_AT_ONCE // self.args.sequence_length)
        return evaluate(model, self.held_out, batch_size=at_once, progress=False).perplexity

    def row_of(self, name: str, label: str, model: nn.Module) -> Row:
        measured = measure_sparsity(model)
        return Row(name, label, self.perplexity(model), measured.sparsity, measured.model_sparsity)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        model.eval()
        logits: Tensor = model(input_ids=self.held_out.batch(range(min(8, len(self.held_out))))["input_ids"]).logits
        return logits

    def save(self, model: nn.Module, name: str, tokenizer: Any) -> None:
        model.save_pretrained(str(self.directory / name))  # type: ignore[operator]
        tokenizer.save_pretrained(str(self.directory / name))

    def write(self, rows: list[Row], masked_again: list[Row], checks: dict[str, Any]) -> dict[str, Any]:
        """Print and write the table, the plot and the numbers; returns the numbers."""
        args = self.args
        plot(rows, masked_again, self.directory / "demo.png", "linears and experts" if args.moe else "linears")
        rows = [*rows, *masked_again]
        text = f"{table(rows)}\n\n{notes(args, self.held_out.loss_tokens, _ROUNDS)}\n"
        replace_file(self.directory / "table.txt", text.encode())
        if self.shown:
            print(f"\n{text}", flush=True)
        result = {
            "output": str(args.output),
            "seconds": time.perf_counter() - self.began,
            "threads": torch.get_num_threads(),
            "options": {name: getattr(args, name) for name in _OPTIONS},
            "rows": [asdict(row) | checks.get(row.name, {}) for row in rows],
            "promises_kept": not self.broken,
        }
        versions = {"lors_cuda": __version__, "torch": torch.__version__, "python": platform.python_version()}
        content = {"made_by": _MADE_BY, **versions, **result, "files": [*_files(self.directory), MARKER_NAME]}
        replace_file(self.directory / MARKER_NAME, (json.dumps(content, indent=2) + "\n").encode())
        return result


def _check_output(output: Path) -> None:
    """Refuse an output directory that holds anything but an earlier demo."""
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"The output '{output}' is a file; choose another directory.")
    if output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"The output '{output}' is, or contains, the current directory; choose another one.")
    files = _files(output)
    if not files:
        return
    try:
        marker = json.loads((output / MARKER_NAME).read_text())
        known = marker["files"] if marker["made_by"] == _MADE_BY else []
    except (OSError, ValueError, KeyError, TypeError):
        known = []
    foreign = [name for name in files if name not in known]
    if foreign:
        raise FileExistsError(
            f"The output directory '{output}' holds '{foreign[0]}', which the demo did not make; nothing was written. "
            "Choose another directory."
        )


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def _pruned_weights(model: nn.Module, sparse: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight, the pruned model's weight) of every linear, and stack of experts, that was pruned."""
    for layer in measure_sparsity(sparse):
        yield layer_weight(model, layer.name), layer_weight(sparse, layer.name)
