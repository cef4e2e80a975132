# SPDX-License-Identifier: Apache-2.0
# Text files -> tokens -> batches of a causal language model: input_ids, attention_mask, labels (-100: no loss).
# Used by the command line and the demo. Knows no model; the model itself shifts the labels by one.
"""Data for fine-tuning and evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100  # the label that torch's and transformers' cross entropy skip


@dataclass(frozen=True)
class TokenDataset(Dataset[dict[str, Tensor]]):
    """Tokenised examples, each at most ``sequence_length`` long, as a Trainer takes them; its ``data_collator`` is
    :meth:`collate`.

    Attributes:
        examples: (input_ids, labels) pairs, int32 [L] each, 2 <= L <= sequence_length; labels are the input's ids
            where the loss counts and -100 elsewhere. The model predicts labels[1:] from input_ids[:-1].
        pad_token_id: fills input_ids after the end of an example; masked, so its value has no influence.
        source: where the data came from, for messages.
        truncated: how many examples lost tokens to fit into ``sequence_length``.
        skipped: how many examples had no token to predict and were left out.
    """

    examples: Sequence[tuple[Tensor, Tensor]]
    pad_token_id: int = 0
    source: str = "the data"
    truncated: int = 0
    skipped: int = 0

    @classmethod
    def from_text(cls, text: str, tokenizer: Any, sequence_length: int, *, source: str = "the text") -> TokenDataset:
        """Pack one running text into consecutive sequences of ``sequence_length`` tokens; the last may be shorter.

        The text is tokenised at once, begun with the tokenizer's own first token (BOS) if it sets one. The loss
        counts on every token that has one before it in its sequence. A rest of a single token is dropped.

        Raises:
            ValueError: ``sequence_length`` is below 2, or the text has fewer than two tokens.
        """
        _check_length(sequence_length)
        if not text.strip():
            raise ValueError(f"{source} is empty; it must hold text.")
        ids = torch.tensor(_first_tokens(tokenizer) + _tokenize(tokenizer, text), dtype=torch.int32)
        pieces = [piece for piece in torch.split(ids, sequence_length) if len(piece) >= 2]
        if not pieces:
            raise ValueError(f"{source} gives {len(ids)} token(s); at least 2 are needed to predict one from another.")
        return cls([(piece, piece) for piece in pieces], _pad_token(tokenizer), source)

    @classmethod
    def from_records(
        cls,
        records: Iterable[tuple[int, Any]],
        tokenizer: Any,
        sequence_length: int,
        *,
        source: str = "the records",
    ) -> TokenDataset:
        """Make examples of records ``{"text": ...}`` or ``{"prompt": ..., "completion": ...}``, also mixed.

        Every text and completion is ended with the tokenizer's EOS token, if it has one, so that the model learns to
        stop. ``text``: the loss counts on all of it, and a text longer than ``sequence_length`` becomes several
        examples. ``prompt`` + ``completion``: one example, the loss counts on the completion only. If it is too long,
        the prompt loses tokens from its start (BOS stays) down to half of ``sequence_length``, and then the completion
        loses tokens from its end.

        Args:
            records: (line number, record) pairs; the number is for messages.

        Raises:
            ValueError: a record has other fields or fields that are no strings (its line is named), or no record has a
                token to predict.
        """
        _check_length(sequence_length)
        first = _first_tokens(tokenizer)
        last = [] if getattr(tokenizer, "eos_token_id", None) is None else [int(tokenizer.eos_token_id)]
        examples: list[tuple[Tensor, Tensor]] = []
        truncated = skipped = count = 0
        for line, record in records:
            count += 1
            prompt, completion = _fields(record, f"{source}, line {line}")
            if prompt is None:
                ids = torch.tensor(first + _tokenize(tokenizer, completion) + last, dtype=torch.int32)
                pieces = [(piece, piece) for piece in torch.split(ids, sequence_length) if len(piece) >= 2]
            else:
                head, tail = first + _tokenize(tokenizer, prompt), _tokenize(tokenizer, completion) + last
                kept_head, kept_tail = _fit(head, tail, len(first), sequence_length)
                truncated += len(kept_head) + len(kept_tail) < len(head) + len(tail)
                ids = torch.tensor(kept_head + kept_tail, dtype=torch.int32)
                labels = ids.clone()
                labels[: len(kept_head)] = IGNORED
                pieces = [(ids, labels)] if bool((labels[1:] != IGNORED).any()) else []
            skipped += not pieces
            examples += pieces
        if count == 0:
            raise ValueError(f"{source} is empty; it must hold at least one record.")
        if not examples:
            raise ValueError(f"{source} has no usable tokens: none of its {count} record(s) has a token to predict.")
        return cls(examples, _pad_token(tokenizer), source, truncated, skipped)

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def loss_tokens(self) -> int:
        """Number of tokens on which the loss counts."""
        return sum(count_loss_tokens(labels) for _, labels in self.examples)

    @cached_property
    def max_token_id(self) -> int:
        """The largest token id, to be compared with the size of the model's vocabulary."""
        return max(int(ids.max()) for ids, _ in self.examples)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all ids and labels, as hex: equal exactly for equal data in equal order."""
        digest = hashlib.sha256()
        for ids, labels in self.examples:
            digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
            digest.update(b"" if labels is ids else labels.numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Example ``index`` as :meth:`collate` takes it: input_ids and labels."""
        input_ids, labels = self.examples[index]
        return {"input_ids": input_ids, "labels": labels}

    def collate(self, examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Pad examples to the longest of them: the ``data_collator`` of a Trainer.

        Returns:
            input_ids, attention_mask (1 = token, 0 = padding) and labels (-100 on padding): int64 [len(examples), L].
        """
        shape = (len(examples), max(len(example["input_ids"]) for example in examples))
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[row, :length] = example["input_ids"]
            attention_mask[row, :length] = 1
            labels[row, :length] = example["labels"]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The examples at ``indices``, padded by :meth:`collate`."""
        return self.collate([self[index] for index in indices])

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Every example once, in order."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    def shuffled_batches(self, batch_size: int, count: int, seed: int) -> list[dict[str, Tensor]]:
        """The first ``count`` batches of the data shuffled by ``seed``; at most one pass over the data."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return [self.batch(chosen.tolist()) for chosen in order.split(batch_size)[:count]]


def load_data(path: str | os.PathLike[str], tokenizer: Any, sequence_length: int) -> TokenDataset:
    """Load a ``.txt`` (see :meth:`TokenDataset.from_text`) or ``.jsonl`` (:meth:`TokenDataset.from_records`) file.

    Args:
        path: UTF-8 text. Blank lines of a ``.jsonl`` file are skipped.
        tokenizer: a transformers tokenizer.
        sequence_length: the largest number of tokens in an example, at least 2.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another extension, is no UTF-8, is empty, has no usable tokens, or has a line that is not
            JSON or lacks a field (the line number is given).
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"'{path}' has the extension '{path.suffix}'; data files are .txt or .jsonl.")
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"The data file '{path}' {kind}; give a .txt or .jsonl file.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"'{path}' is not UTF-8 text: line {line} has the byte 0x{content[error.start]:02x} at offset "
            f"{error.start}. Convert it to UTF-8."
        ) from None
    if not text.strip():
        raise ValueError(f"The data file '{path}' is empty; it must hold text.")
    if path.suffix == ".txt":
        return TokenDataset.from_text(text, tokenizer, sequence_length, source=f"'{path}'")
    return TokenDataset.from_records(_json_lines(text, path), tokenizer, sequence_length, source=f"'{path}'")


def count_loss_tokens(labels: Tensor) -> int:
    """Number of tokens on which a causal model's loss counts: labels [..., L] after its shift by one."""
    return int((labels[..., 1:] != IGNORED).sum())


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): it also breaks at characters such as U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"'{path}', line {number} is not JSON ({error.msg} at column {error.colno}); every line of a .jsonl "
                "file must be one JSON object."
            ) from None


def _fields(record: Any, where: str) -> tuple[str | None, str]:
    """(None, text), or (prompt, completion)."""
    needed = 'an object with "text", or with "prompt" and "completion"'
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {_json_kind(record)}; it must be {needed}.")
    names = {"text", "prompt", "completion"} & record.keys()
    if names not in ({"text"}, {"prompt", "completion"}):
        has = ", ".join(f'"{name}"' for name in sorted(names)) if names else "none of these"
        raise ValueError(f"{where} has {has}; it must be {needed}.")
    for name in sorted(names):
        if not isinstance(record[name], str):
            raise ValueError(f'{where}: "{name}" is a JSON {_json_kind(record[name])}; it must be a string.')
    return (None, record["text"]) if "text" in names else (record["prompt"], record["completion"])


def _json_kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _fit(head: list[int], tail: list[int], fixed: int, length: int) -> tuple[list[int], list[int]]:
    """Shorten a prompt from its start (but its ``fixed`` first tokens) and a completion from its end to ``length``."""
    if len(head) + len(tail) <= length:
        return head, tail
    head_length = min(len(head), max(length - len(tail), length // 2))
    dropped = len(head) - head_length
    fixed = min(fixed, head_length)
    return head[:fixed] + head[fixed + dropped :], tail[: length - head_length]


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: tokenizers warn about texts longer than the model, and these are cut afterwards.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _first_tokens(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer itself begins every text with it, else []."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [int(bos)] if bos is not None and list(tokenizer("").input_ids)[:1] == [bos] else []


def _pad_token(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    return 0


def _check_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise ValueError(
            f"sequence_length is {sequence_length}; it must be at least 2 to predict a token from another."
        )
