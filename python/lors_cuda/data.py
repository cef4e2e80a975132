# SPDX-License-Identifier: Apache-2.0
# Data files -> tokens -> batches of a causal language model: input_ids, attention_mask, labels (-100: no loss).
# Used by the command line and the demo. Knows no model; the model itself shifts the labels by one.
# _records.py reads the files, _chat.py the conversations.
"""Data for fine-tuning and evaluation."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._chat import ChatTemplate, as_messages
from ._records import check_data_path, check_unicode, kind_of, list_of, read_records, read_text, string_of

IGNORED = -100  # the label that torch's and transformers' cross entropy skip
Example = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TokenDataset(Dataset[dict[str, Tensor]]):
    """Tokenised examples, each at most ``sequence_length`` long, as a Trainer takes them; its ``data_collator`` is
    :meth:`collate`.

    Every example begins with the tokenizer's BOS token, if it begins texts with one, and never with two.

    Attributes:
        examples: (input_ids, labels) pairs, int32 [L] each, 2 <= L <= sequence_length; labels are the input's ids
            where the loss counts and -100 elsewhere. The model predicts labels[1:] from input_ids[:-1].
        pad_token_id: fills input_ids after the end of an example; masked, so its value has no influence.
        source: where the data came from, for messages.
        truncated: how many examples lost tokens to fit into ``sequence_length``.
        skipped: how many examples had no token to predict and were left out.
        continued: how many texts were longer than ``sequence_length`` and became several examples.
        packs: the examples that share a sequence (see :meth:`packed`); None: each has its own.
    """

    examples: Sequence[Example]
    pad_token_id: int = 0
    source: str = "the data"
    truncated: int = 0
    skipped: int = 0
    continued: int = 0
    packs: Sequence[Sequence[int]] | None = None

    @classmethod
    def from_text(cls, text: str, tokenizer: Any, sequence_length: int, *, source: str = "the text") -> TokenDataset:
        """Cut one running text into consecutive sequences of ``sequence_length`` tokens; the last may be shorter.

        The text is tokenised at once. The loss counts on every token that has one before it in its sequence. A rest
        of a single token is dropped.

        Raises:
            ValueError: ``sequence_length`` is below 2, or the text has fewer than two tokens.
        """
        _check_length(sequence_length)
        if not text.strip():
            raise ValueError(f"{source} is empty; it must hold text.")
        check_unicode(text, source)
        tokens = _Tokens(tokenizer)
        ids = tokens.without_first(text)
        examples = _pieces(tokens.first, ids, sequence_length)
        if not examples:
            raise ValueError(f"{source} gives {len(ids)} token(s); at least 2 are needed to predict one from another.")
        return cls(examples, _pad_token(tokenizer), source)

    @classmethod
    def from_records(
        cls,
        records: Iterable[tuple[int, Any]],
        tokenizer: Any,
        sequence_length: int,
        *,
        source: str = "the records",
        unit: str = "line",
    ) -> TokenDataset:
        """Make examples of records of four kinds, also mixed.

        - ``{"text": ...}``: the loss counts on all of it; longer than ``sequence_length``, it becomes several examples.
        - ``{"prompt": ..., "completion": ...}``: the loss counts on the completion. If they are too long, the prompt
          loses tokens from its start (BOS stays) down to half of ``sequence_length``, and then the completion loses
          tokens from its end.
        - ``{"messages": [{"role": ..., "content": ...}, ...]}``, and ``{"conversations": [{"from": ..., "value": ...},
          ...]}`` as ShareGPT has it (human, gpt, system): written by the tokenizer's chat template, with ``tools`` if
          the record has them; the loss counts on the assistant's turns, all of them, with what ends each. If they are
          too long, they lose tokens from their end.

        Texts, completions and conversations end with the tokenizer's EOS token, if it has one, so that the model
        learns to stop; once, where they bring it along. A chat template that closes the last turn by a special token
        of its own has its way. Empty texts and completions are left out.

        Args:
            records: (number, record) pairs; the number is for messages.
            unit: what the number counts.

        Raises:
            ValueError: a record has other fields, fields of a wrong type or half of a character, or is a conversation
                whose assistant's tokens cannot be told (its line is named), or no record has a token to predict.
        """
        _check_length(sequence_length)
        encoder = _Encoder(tokenizer, sequence_length)
        for number, record in records:
            encoder.add(record, f"{source}, {unit} {number}")
        if encoder.count == 0:
            raise ValueError(f"{source} is empty; it must hold at least one record.")
        if not encoder.examples:
            raise ValueError(
                f"{source} has no usable tokens: none of its {encoder.count} record(s) has a token to predict within "
                f"{sequence_length} tokens."
            )
        return cls(
            encoder.examples, _pad_token(tokenizer), source, encoder.truncated, encoder.skipped, encoder.continued
        )

    def packed(self, sequence_length: int) -> TokenDataset:
        """The same examples, as many in a sequence as fit (best fit, longest first); none is cut.

        ``position_ids`` begin at 0 with each example, and there is no ``attention_mask``: from that transformers'
        models make an attention within each example only, so that packing changes the time of a step and no result.
        A model that looks at neither must not be given packed data. The loss does not count on an example's first
        token.
        """
        order = sorted(range(len(self.examples)), key=lambda index: (-len(self.examples[index][0]), index))
        packs: list[list[int]] = []
        spaces: list[tuple[int, int]] = []  # (free tokens, number of the pack), sorted
        for index in order:
            length = len(self.examples[index][0])
            found = bisect_left(spaces, (length, 0))
            if found == len(spaces):
                packs.append([])
                free, number = sequence_length, len(packs) - 1
            else:
                free, number = spaces.pop(found)
            packs[number].append(index)
            if free - length >= 2:
                insort(spaces, (free - length, number))
        return replace(self, packs=packs)

    def __len__(self) -> int:
        return len(self.examples if self.packs is None else self.packs)

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
        digest.update(b"" if self.packs is None else repr(self.packs).encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sequence ``index`` as :meth:`collate` takes it: input_ids and labels, and position_ids if it is packed."""
        if self.packs is None:
            input_ids, labels = self.examples[index]
            return {"input_ids": input_ids, "labels": labels}
        parts = [self.examples[part] for part in self.packs[index]]
        labels = torch.cat([labels for _, labels in parts])
        positions = torch.cat([torch.arange(len(ids), dtype=torch.int32) for ids, _ in parts])
        labels[positions == 0] = IGNORED  # else it would be predicted from the example before
        return {"input_ids": torch.cat([ids for ids, _ in parts]), "labels": labels, "position_ids": positions}

    def collate(self, examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Pad examples to the longest of them: the ``data_collator`` of a Trainer.

        Returns:
            input_ids, labels (-100 on padding) and attention_mask (1 = token, 0 = padding): int64 [len(examples), L];
            of packed data position_ids instead of the mask: padding comes last, and no token sees what follows it.
        """
        shape = (len(examples), max(len(example["input_ids"]) for example in examples))
        input_ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORED)
        attention_mask, position_ids = torch.zeros(shape, dtype=torch.int64), torch.arange(shape[1]).repeat(shape[0], 1)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[row, :length] = example["input_ids"]
            labels[row, :length] = example["labels"]
            attention_mask[row, :length] = 1
            if self.packs is not None:
                position_ids[row, :length] = example["position_ids"]
        extra = {"attention_mask": attention_mask} if self.packs is None else {"position_ids": position_ids}
        return {"input_ids": input_ids, **extra, "labels": labels}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The examples at ``indices``, padded by :meth:`collate`."""
        return self.collate([self[index] for index in indices])

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Every example once, in order."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    def shuffled_batches(self, batch_size: int, count: int | None, seed: int) -> list[dict[str, Tensor]]:
        """The first ``count`` batches, or all, of the data shuffled by ``seed``; at most one pass over the data."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return [self.batch(chosen.tolist()) for chosen in order.split(batch_size)[:count]]


def load_data(path: str | os.PathLike[str], tokenizer: Any, sequence_length: int) -> TokenDataset:
    """Load a ``.txt`` file by :meth:`TokenDataset.from_text`, any other by :meth:`TokenDataset.from_records`.

    Records are in a ``.jsonl`` (an object per line), ``.json`` (one array of objects, or lines), ``.csv`` (a row of
    column names, commas between) or ``.parquet`` file; the last needs the package ``datasets``.

    Args:
        path: its ending, in any case, says what it is. UTF-8 text, with or without a byte order mark. Blank lines of
            ``.jsonl`` and ``.csv`` files are skipped.
        tokenizer: a transformers tokenizer.
        sequence_length: the largest number of tokens in an example, at least 2.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another extension, is no UTF-8, is empty, has no usable tokens, or has a record that cannot
            be read (the line, of a Parquet file the row, is given).
    """
    path = Path(path)
    ending, source = check_data_path(path), f"'{path}'"
    if ending == ".txt":
        return TokenDataset.from_text(read_text(path), tokenizer, sequence_length, source=source)
    unit = "row" if ending == ".parquet" else "line"
    return TokenDataset.from_records(read_records(path, ending), tokenizer, sequence_length, source=source, unit=unit)


def count_loss_tokens(labels: Tensor) -> int:
    """Number of tokens on which a causal model's loss counts: labels [..., L] after its shift by one."""
    return int((labels[..., 1:] != IGNORED).sum())


class _Tokens:
    """A tokenizer's way with texts: which tokens begin and end one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        bos, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
        # [BOS] if the tokenizer itself begins every text with it.
        self.first = [int(bos)] if bos is not None and list(tokenizer("").input_ids)[:1] == [bos] else []
        self.last = [] if eos is None else [int(eos)]

    @cached_property
    def _special(self) -> set[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return {number for number, token in added if token.special} | set(self._tokenizer.all_special_ids)

    def without_first(self, text: str) -> list[int]:
        """The text's own tokens, without the BOS that it may bring along where `first` will be one."""
        # verbose=False: tokenizers warn about texts longer than the model, and these are cut afterwards.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids[1:] if self.first and ids[:1] == self.first else ids

    def is_ended(self, ids: list[int], *, by_any: bool = False) -> bool:
        """Whether EOS is not needed: it is the last token but whitespace, or, ``by_any``, another special one is."""
        closing = self._special if by_any else set(self.last)
        for token in reversed(ids if self.last else []):
            if token in closing:
                return True
            if self._tokenizer.decode([token]).strip():
                return False
        return not self.last

    def ended(self, ids: list[int]) -> list[int]:
        """With EOS at the end, once."""
        return ids if self.is_ended(ids) else ids + self.last


class _Encoder:
    """Collects the examples of records."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self._length, self._tokens = tokenizer, length, _Tokens(tokenizer)
        self._chat: ChatTemplate | None = None
        self.examples: list[Example] = []
        self.count = self.truncated = self.skipped = self.continued = 0

    def add(self, record: Any, where: str) -> None:
        self.count += 1
        kind = kind_of(record, where)
        if kind == ("text",):
            found = self._text(string_of(record, "text", where))
        elif kind == ("prompt", "completion"):
            found = self._completion(*(string_of(record, name, where) for name in kind))
        else:
            found = self._conversation(record, kind[0], where)
        self.skipped += not found
        self.examples += found

    def _text(self, text: str) -> list[Example]:
        own = self._tokens.without_first(text)
        if own in ([], self._tokens.last):
            return []
        found = _pieces(self._tokens.first, self._tokens.ended(own), self._length, self._tokens.last)
        self.continued += len(found) > 1
        return found

    def _completion(self, prompt: str, completion: str) -> list[Example]:
        first = self._tokens.first
        own = self._tokens.without_first(completion)
        if own in ([], self._tokens.last):
            return []
        head, tail = first + self._tokens.without_first(prompt), self._tokens.ended(own)
        kept_head, kept_tail = _fit(head, tail, len(first), self._length)
        return self._example(
            kept_head + kept_tail, [False] * len(kept_head) + [True] * len(kept_tail), len(head) + len(tail)
        )

    def _conversation(self, record: dict[str, Any], name: str, where: str) -> list[Example]:
        messages = as_messages(list_of(record, name, where), f'{where}: "{name}"')
        if not any(message["role"] == "assistant" for message in messages):
            return []
        if self._chat is None:
            self._chat = ChatTemplate(self._tokenizer)
        tools = list_of(record, "tools", where) if record.get("tools") else None
        ids, said = self._chat.encode(messages, tools, where)
        if messages[-1]["role"] == "assistant" and not self._tokens.is_ended(ids, by_any=True):
            ids, said = ids + self._tokens.last, [*said, True]
        if self._tokens.first and ids[:1] != self._tokens.first:
            ids, said = self._tokens.first + ids, [False, *said]
        return self._example(ids[: self._length], said[: self._length], len(ids))

    def _example(self, ids: list[int], said: list[bool], whole: int) -> list[Example]:
        """One example with loss where ``said``; none if that is nowhere. It had ``whole`` tokens before it was cut."""
        if not any(said[1:]):
            return []
        self.truncated += len(ids) < whole
        kept = torch.tensor(ids, dtype=torch.int32)
        return [(kept, torch.where(torch.tensor(said), kept, IGNORED))]


def _pieces(first: list[int], ids: list[int], length: int, last: Sequence[int] = ()) -> list[Example]:
    """Consecutive examples, each begun with ``first``; a rest of one token, or of only ``last``, is dropped."""
    begin = torch.tensor(first, dtype=torch.int32)
    chunks = torch.split(torch.tensor(ids, dtype=torch.int32), length - len(first))
    if len(chunks) > 1 and chunks[-1].tolist() == list(last):
        chunks = chunks[:-1]
    pieces = [torch.cat([begin, chunk]) if first else chunk for chunk in chunks]
    return [(piece, piece) for piece in pieces if len(piece) >= 2]


def _fit(head: list[int], tail: list[int], fixed: int, length: int) -> tuple[list[int], list[int]]:
    """Shorten a prompt from its start (but its ``fixed`` first tokens) and a completion from its end to ``length``."""
    if len(head) + len(tail) <= length:
        return head, tail
    head_length = min(len(head), max(length - len(tail), length // 2))
    dropped = len(head) - head_length
    fixed = min(fixed, head_length)
    return head[:fixed] + head[fixed + dropped :], tail[: length - head_length]


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
