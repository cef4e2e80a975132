# SPDX-License-Identifier: Apache-2.0
# What several commands share: types of options, loading a model and its tokenizer from a directory, printing.
# Heavy packages are imported inside the functions.
"""Shared parts of the commands."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._batches import device_of, running
from .._distributed import is_first, launched
from .._library import build_info
from .._linears import weight_of
from .._records import ENDINGS
from ..compressed_tensors import load_sparse_checkpoint
from ..compressed_tensors.checkpoint import first_line
from ..config import ALL_LINEAR, LoRSConfig
from ..data import TokenDataset, load_data
from ..experts import is_experts, stack_of
from ..sparsity import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..sparsity import LayerSparsity, ModelSparsity

DEFAULT_SEQUENCE_LENGTH = 512


def positive_int(text: str) -> int:
    """An option's value that is an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return value


def non_negative_int(text: str) -> int:
    """An option's value that is an integer of at least 0."""
    return 0 if text == "0" else positive_int(text)


def seed_number(text: str) -> int:
    """An option's value that torch takes as a seed: an integer from 0 to 2^63 - 1."""
    number = non_negative_int(text)
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer below 2^63")
    return number


def positive_float(text: str) -> float:
    """An option's value that is a finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number greater than 0")
    return value


def pattern_entry(number: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """The type of an option's values "NAME=NUMBER"."""

    def entry(text: str) -> tuple[str, Any]:
        name, separator, value = text.rpartition("=")
        if not separator or not name:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER")
        return name, number(value)

    return entry


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --mask-from and --device."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="directory of the model")
    parser.add_argument(
        "--mask-from", type=Path, metavar="DIR", help="sparse model that a quantized --model was made from: its zeros"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: CUDA if its kernels support this GPU")


def add_data(parser: argparse.ArgumentParser, *, required: bool = True, batch_size: int = 8) -> None:
    """--data, --tokenizer, --batch-size and --sequence-length."""
    parser.add_argument(
        "--data", type=Path, required=required, metavar="FILE", help=f"text or records: {', '.join(ENDINGS)}"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="directory of the tokenizer, if not the model's")
    parser.add_argument("--batch-size", type=positive_int, default=batch_size, help="sequences per forward pass")
    parser.add_argument(
        "--sequence-length",
        type=positive_int,
        metavar="TOKENS",
        help=f"longest sequence; {DEFAULT_SEQUENCE_LENGTH}, or the model's maximum, where not given",
    )


def add_targets(parser: argparse.ArgumentParser) -> None:
    """--target-modules, --target-parameters and --exclude-modules."""
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="name suffixes, or one regular expression for whole names; every linear but the output head, and all "
        "experts, if neither is given",
    )
    parser.add_argument(
        "--target-parameters", nargs="+", metavar="NAME",
        help="weights of experts, by name suffixes such as experts.down_proj",
    )  # fmt: skip
    parser.add_argument(
        "--exclude-modules", nargs="+", metavar="NAME", help="name suffixes of what is left as it is, such as experts"
    )


def target_config(args: argparse.Namespace, **fields: Any) -> LoRSConfig:
    """A configuration with the targets that `add_targets` asks for; of rank 1, which all linears have, unless given."""
    targets = args.target_modules
    if (
        targets is not None
        and len(targets) == 1
        and (targets == [ALL_LINEAR] or not re.fullmatch(r"[\w.-]*", targets[0]))
    ):
        targets = targets[0]
    chosen = {name: getattr(args, name) for name in ("target_parameters", "exclude_modules")}
    return LoRSConfig(target_modules=targets, **chosen, **{"r": 1, **fields})


def add_adapter(parser: argparse.ArgumentParser, help: str, *, required: bool = False) -> None:
    """--adapter and --no-strict-mask."""
    parser.add_argument("--adapter", type=Path, required=required, metavar="DIR", help=help)
    parser.add_argument(
        "--no-strict-mask",
        dest="strict_mask",
        action="store_false",
        help="load an adapter of another sparsity mask, or of none that is known",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """--force."""
    parser.add_argument(
        "--force",
        dest="strict_values",
        action="store_false",
        help="load an adapter that was trained on base weights of other values, or is merged already",
    )


def say(args: argparse.Namespace, text: str) -> None:
    """Print for a person, from one process; nothing under --json."""
    if not args.json and is_first():
        print(text, flush=True)


def load_model(
    directory: Path,
    device: str = "auto",
    *,
    any_architecture: bool = False,
    quantized: str = "keep",
    mask_from: Path | None = None,
) -> nn.Module:
    """Load a causal language model, or with ``any_architecture`` any model of transformers, from a directory, in its
    own dtype, onto a device; never from the network. Quantised weights stay so unless told otherwise.

    Raises:
        RuntimeError: the device cannot be used; and as load_sparse_checkpoint.
    """
    target = find_device(device)
    _quiet_transformers()
    model = load_sparse_checkpoint(
        directory, any_architecture=any_architecture, quantized=quantized, mask_from=mask_from
    )
    moved: nn.Module = model.to(target)
    return moved


def load_tokenizer(directory: Path) -> Any:
    """Load a tokenizer from a directory; never from the network.

    Raises:
        FileNotFoundError: no such directory, or no tokenizer in it. ValueError: it cannot be loaded.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"The tokenizer directory '{directory}' does not exist.")
    # Asked first: transformers answers with a page about sentencepiece, or goes on with an empty vocabulary.
    if not any(directory.glob("tokenizer*")) and not any(directory.glob("vocab.*")):
        raise FileNotFoundError(
            f"'{directory}' has no tokenizer (tokenizer.json, tokenizer_config.json, tokenizer.model or a vocab file). "
            "Copy the tokenizer's files there, or name its directory with --tokenizer."
        )
    transformers = _quiet_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"The tokenizer in '{directory}' could not be loaded: {first_line(error)}") from error


def load_dataset(
    args: argparse.Namespace, model: nn.Module, path: Path | None = None, *, packing: bool = False
) -> TokenDataset:
    """Load --data, or ``path``, with the model's tokenizer and check that both fit the model.

    Raises:
        ValueError: --sequence-length exceeds what the model can take, a token id exceeds its vocabulary, or the model
            does not keep packed examples apart; and as load_tokenizer and load_data.
    """
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None) or DEFAULT_SEQUENCE_LENGTH
    length = args.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, longest)
    if length > longest:
        raise ValueError(f"--sequence-length is {length}, but the model in '{args.model}' takes at most {longest}.")
    data = load_data(args.data if path is None else path, tokenizer, length)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and data.max_token_id >= vocabulary:
        raise ValueError(
            f"The tokenizer gives token {data.max_token_id}, but the model's vocabulary has {vocabulary}: they do not "
            "belong together. Name the right one with --tokenizer."
        )
    if not packing:
        return data
    check_packing(model)
    return data.packed(length)


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Refuse a model in which packing changes an example; found out by running it on a few tokens.

    Raises:
        ValueError: an example sees what is packed before it, or does not begin at position 0.
    """
    size = getattr(getattr(model, "config", None), "vocab_size", None) or 8
    second = torch.arange(8) % size
    batch = torch.stack([torch.cat([first, second]) for first in (torch.zeros_like(second), second.flip(0))])
    device = device_of(model)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(8).repeat(len(ids), ids.shape[1] // 8)
        result: torch.Tensor = model(input_ids=ids.to(device), position_ids=positions.to(device)).logits[:, -8:]
        return result

    with running(model, training=False):
        try:
            packed, alone = logits(batch), logits(second[None])
        except TypeError:
            same = False  # it takes no position_ids
        else:
            # Behind two other examples the same sums are formed; alone, the same in another order.
            scale, eps = float(alone.abs().max()), torch.finfo(alone.dtype).eps
            same = torch.allclose(packed[0], packed[1], rtol=0.0, atol=1e-5 * scale)
            same = same and torch.allclose(packed[0], alone[0], rtol=0.0, atol=eps**0.5 * scale)
    if not same:
        raise ValueError(
            f"{type(model).__name__} does not keep examples apart that --packing puts into one sequence: their loss "
            "would be another. Train without --packing."
        )


def describe_data(data: TokenDataset) -> str:
    """One line about a dataset: how much, and what was cut or left out."""
    text = f"{len(data)} sequences, {data.loss_tokens} tokens to predict"
    if data.packs is not None:
        text += f", {len(data.examples)} examples packed into them"
    if data.continued:
        text += f", {data.continued} text(s) longer than --sequence-length go on in further ones"
    if data.truncated:
        text += f", {data.truncated} cut to fit into --sequence-length"
    if data.skipped:
        text += f", {data.skipped} without a token to predict left out"
    return text


def sparsity_table(sparsity: ModelSparsity) -> str:
    """Layers of one name (q_proj, ...) in one row: how many, their weights, and the range of their sparsity.

    Experts always have their rows, also where other layers were asked for; the last row is the whole model.
    """
    groups: dict[str, list[LayerSparsity]] = {}
    experts = [layer for layer in sparsity.experts if layer not in sparsity.layers]
    for layer in (*sparsity.layers, *experts):
        name = layer.name.rpartition(".")[2]
        groups.setdefault(f"experts: {name}" if layer.kind == EXPERTS else name, []).append(layer)
    everything = (*sparsity.layers, *sparsity.rest)
    width = max(len(name) for name in [*groups, "all weights"])
    rows = [f"{'layers':<{width}}  count       weights   zeros"]
    for name, group in groups.items():
        weights = sum(layer.weights for layer in group)
        low, high = min(layer.sparsity for layer in group), max(layer.sparsity for layer in group)
        zeros = f"{low:.2%}" if f"{low:.2%}" == f"{high:.2%}" else f"{low:.2%} to {high:.2%}"
        rows.append(f"{name:<{width}}  {len(group):>5}  {weights:>12,}  {zeros}")
    weights = sum(layer.weights for layer in everything)
    rows.append(f"{'all weights':<{width}}  {len(everything):>5}  {weights:>12,}  {sparsity.model_sparsity:.2%}")
    return "\n".join(rows)


def layer_weight(model: nn.Module, name: str) -> torch.Tensor:
    """The weight of the layer ``name`` of a plain model, [N, K]; of a stack of experts [E N, K]."""
    module, _, stack = name.rpartition(".")
    experts = model.get_submodule(module)
    return stack_of(experts, stack).flatten(0, 1) if is_experts(experts) else weight_of(model.get_submodule(name))


def find_device(name: str) -> torch.device:
    """The device of --device; under torchrun, where it names no GPU by number, each process its own.

    Raises:
        ValueError, RuntimeError: it names no device, or one that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and build_info()["cuda_available"] else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; it must be a device such as cpu or cuda:0.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device is {name!r}, but torch finds no CUDA device; use --device cpu.")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}, and there are no kernels for it; use cpu or cuda.")
    if device.type == "cuda" and launched():
        if device.index is not None:
            raise ValueError(f"--device is {name!r}, but under torchrun each process has a GPU of its own; use cuda.")
        wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if wanted > there:
            raise RuntimeError(
                f"torchrun has started {wanted} processes on a machine with {there} GPU(s); use --nproc-per-node "
                f"{there}, or --device cpu."
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def _quiet_transformers() -> Any:
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
