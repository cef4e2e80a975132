# SPDX-License-Identifier: Apache-2.0
"""Data: packing, completion-only labels, truncation, padding, the order of training, and every bad file."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byte_model import TEXT, byte_llama, byte_tokenizer, fast_tokenizer
from lors_cuda.cli._common import check_packing
from lors_cuda.data import IGNORED, TokenDataset, count_loss_tokens, load_data
from lors_cuda.evaluation import evaluate
from models import refused


class BosTokenizer:
    """One token per byte, begun with BOS = 1; no EOS and no padding token."""

    bos_token_id, eos_token_id, pad_token_id = 1, None, None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        ids = [byte + 3 for byte in text.encode()]
        return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def ids_of(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(path, *records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def as_lists(data: TokenDataset) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in data.examples]


# ---- .txt ----


def test_text_is_packed_without_losing_a_token(tokenizer, tmp_path):
    data = load_data(write(tmp_path / "a.txt", TEXT), tokenizer, 53)
    lengths = [len(ids) for ids, _ in data.examples]
    assert set(lengths[:-1]) == {53}
    assert lengths[-1] == len(TEXT) % 53
    assert [token for ids, _ in as_lists(data) for token in ids] == ids_of(TEXT)
    assert all(ids == labels for ids, labels in as_lists(data))
    assert data.loss_tokens == len(TEXT) - len(lengths)
    assert data.max_token_id == max(ids_of(TEXT))


def test_every_sequence_begins_with_bos_where_the_tokenizer_sets_one():
    data = TokenDataset.from_text("abcde", BosTokenizer(), 3)
    assert [ids for ids, _ in as_lists(data)] == [[1, *ids_of("ab")], [1, *ids_of("cd")], [1, *ids_of("e")]]
    data = TokenDataset.from_records([(1, {"text": "abcde"})], BosTokenizer(), 4)
    assert [ids for ids, _ in as_lists(data)] == [[1, *ids_of("abc")], [1, *ids_of("de")]]
    assert data.continued == 1


BOS, EOS = 1, 2


@pytest.mark.parametrize("adds", ["bos", "bos and eos", "nothing"])
@pytest.mark.parametrize(
    "record",
    [
        {"text": "<s>hi</s>"},
        {"text": "<s>hi"},
        {"prompt": "<s>h", "completion": "i</s>"},
        {"prompt": "<s>h", "completion": "<s>i"},
        {"prompt": "", "completion": "<s>hi"},
    ],
)
def test_one_bos_and_one_eos_where_the_text_brings_them_along(adds, record):
    tokenizer = fast_tokenizer(adds=adds)
    ((ids, labels),) = as_lists(TokenDataset.from_records([(1, record)], tokenizer, 32))
    if adds != "nothing" or record.get("completion") != "<s>i":
        assert tokenizer.decode(ids) == "<s>hi</s>"
    assert ids[-1] == labels[-1] == EOS


def test_a_line_end_behind_eos_makes_no_second_one():
    tokenizer = fast_tokenizer(adds="bos")
    ((ids, _),) = as_lists(TokenDataset.from_records([(1, {"text": "hi</s>\n"})], tokenizer, 32))
    assert tokenizer.decode(ids) == "<s>hi</s>\n"
    data = TokenDataset.from_text("<s>" + "hi " * 20, tokenizer, 8)
    assert all(ids.count(BOS) == 1 and ids[0] == BOS for ids, _ in as_lists(data))


def test_a_sequence_of_eos_alone_is_no_example():
    data = TokenDataset.from_records([(1, {"text": "abc"})], fast_tokenizer(adds="bos"), 4)
    assert [len(ids) for ids, _ in as_lists(data)] == [4]


def test_a_rest_of_one_token_is_dropped(tokenizer):
    data = TokenDataset.from_text("abcdefg", tokenizer, 3)
    assert [ids for ids, _ in as_lists(data)] == [ids_of("abc"), ids_of("def")]


def test_byte_order_mark_is_no_text(tokenizer, tmp_path):
    data = load_data(write(tmp_path / "a.txt", b"\xef\xbb\xbfabc"), tokenizer, 8)
    assert as_lists(data)[0][0] == ids_of("abc")


# ---- .jsonl ----


def test_completion_alone_has_labels_and_ends_with_eos(tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4"}, {"text": "xyz"})
    (first, first_labels), (second, second_labels) = as_lists(load_data(path, tokenizer, 16))
    assert first == [*ids_of("2+2=4"), 1]
    assert first_labels == [IGNORED] * 4 + [*ids_of("4"), 1]
    assert second == second_labels == [*ids_of("xyz"), 1]


def test_blank_lines_and_line_separators_inside_strings(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"text": "a\u2028b"}\r\n\n{"text": "cd"}')
    assert [ids for ids, _ in as_lists(load_data(path, tokenizer, 16))] == [
        [*ids_of("a\u2028b"), 1],
        [*ids_of("cd"), 1],
    ]


def test_a_long_text_record_becomes_several_examples(tokenizer):
    data = TokenDataset.from_records([(1, {"text": "abcde"})], tokenizer, 4)
    assert [ids for ids, _ in as_lists(data)] == [ids_of("abcd"), [*ids_of("e"), 1]]
    assert data.truncated == 0


@pytest.mark.parametrize(
    ("prompt", "completion", "kept_prompt", "kept_completion"),
    [
        ("abcdefghij", "xy", "defghij", [*ids_of("xy"), 1]),  # the prompt loses its start ...
        ("abcdefghij", "wxyz", "fghij", [*ids_of("wxyz"), 1]),
        ("abcdefghij", "uvwxyz", "fghij", ids_of("uvwxy")),  # ... down to half, then the completion its end
        ("ab", "nopqrstuvwxyz", "ab", ids_of("nopqrstu")),  # a short prompt stays whole
    ],
)
def test_truncation(tokenizer, prompt, completion, kept_prompt, kept_completion):
    data = TokenDataset.from_records([(1, {"prompt": prompt, "completion": completion})], tokenizer, 10)
    ((ids, labels),) = as_lists(data)
    assert ids == ids_of(kept_prompt) + kept_completion
    assert labels == [IGNORED] * len(kept_prompt) + kept_completion
    assert data.truncated == 1


@given(head=st.integers(1, 30), tail=st.integers(1, 30), length=st.integers(2, 20))
def test_truncation_keeps_bos_and_never_exceeds_the_length(head, tail, length):
    record = {"prompt": "".join(chr(65 + i) for i in range(head)), "completion": "z" * tail}
    data = TokenDataset.from_records([(1, record)], BosTokenizer(), length)
    ((ids, labels),) = as_lists(data)
    assert len(ids) == min(length, head + 1 + tail)
    assert ids[0] == 1
    kept = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED][1:]
    assert kept == ids_of(record["prompt"])[head - len(kept) :]
    assert len(ids) - 1 - len(kept) >= min(tail, length - length // 2)


def test_examples_without_a_token_to_predict_are_left_out():
    empty = [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "</s>"}, {"text": ""}, {"text": "<s>"}]
    empty += [{"messages": []}, {"messages": [{"role": "user", "content": "a"}]}]
    records = list(enumerate([*empty, {"prompt": "a", "completion": "b"}]))
    data = TokenDataset.from_records(records, fast_tokenizer(adds="bos"), 8)
    assert (len(data), data.skipped, data.loss_tokens) == (1, 6, 2)


# ---- batches and their order ----


def test_padding_is_masked_and_has_no_labels(tokenizer):
    data = TokenDataset.from_records([(1, {"text": "abcd"}), (2, {"text": "e"})], tokenizer, 16)
    batch = data.batch([0, 1])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 5), "attention_mask": (2, 5), "labels": (2, 5)
    }  # fmt: skip
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"][1].tolist() == [*ids_of("e"), 1, 0, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [*ids_of("e"), 1, IGNORED, IGNORED, IGNORED]
    assert count_loss_tokens(batch["labels"]) == 5 == data.loss_tokens


def test_batches_in_order_hold_everything_once(tokenizer):
    data = TokenDataset.from_text(TEXT, tokenizer, 64)
    rows = [row[row != 0].tolist() for batch in data.batches(7) for row in batch["input_ids"]]
    assert rows == [ids for ids, _ in as_lists(data)]


def test_a_loader_takes_the_examples_and_their_collator(tokenizer):
    data = TokenDataset.from_records([(n, {"text": "a" * n}) for n in range(1, 6)], tokenizer, 16)
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=data.collate)
    for batch, expected in zip(loader, data.batches(2), strict=True):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


@given(batch_size=st.integers(1, 70), count=st.integers(1, 70), seed=st.integers(0, 2**63 - 1))
def test_shuffled_batches_hold_nothing_twice(batch_size, count, seed):
    rows = torch.arange(50, dtype=torch.int32)
    data = TokenDataset([(row.repeat(2), row.repeat(2)) for row in rows])
    batches = data.shuffled_batches(batch_size, count, seed)
    assert len(batches) == min(count, -(-50 // batch_size))
    drawn = [int(row[0]) for batch in batches for row in batch["input_ids"]]
    assert len(drawn) == len(set(drawn)) == min(50, count * batch_size)
    again = data.shuffled_batches(batch_size, 1, seed)[0]["input_ids"]
    assert torch.equal(again, batches[0]["input_ids"])


def test_the_seed_changes_the_order(tokenizer):
    data = TokenDataset.from_text(TEXT, tokenizer, 64)
    first, other = (data.shuffled_batches(8, 1, seed)[0]["input_ids"] for seed in (0, 1))
    assert not torch.equal(first, other)


# ---- packing ----


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=40))
def test_packing_keeps_every_example_whole(lengths):
    examples = [(torch.full((n,), i, dtype=torch.int32),) * 2 for i, n in enumerate(lengths)]
    data = TokenDataset(examples).packed(9)
    assert sorted(index for pack in data.packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 9 for pack in data.packs)
    spaces = sorted(9 - sum(lengths[index] for index in pack) for pack in data.packs)
    assert len(spaces) < 2 or spaces[-1] + spaces[-2] < 9  # at most one is less than half full
    assert data.loss_tokens == sum(lengths) - len(lengths)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_no_loss(tokenizer, attention):
    records = [(n, {"prompt": f"{n}+{n}=", "completion": str(2 * n)}) for n in range(95, 106)]
    texts = [(n, {"text": TEXT[n : 2 * n + 9]}) for n in range(3, 20, 4)]
    data = TokenDataset.from_records([*records, *texts], tokenizer, 64)
    packed = data.packed(64)
    assert len(packed) < len(data) == 16
    assert "attention_mask" not in packed.batch([0, 1])
    assert packed.fingerprint != data.fingerprint
    model = byte_llama(attn_implementation=attention)
    losses = [evaluate(model, each, batch_size=3, progress=False) for each in (data, packed)]
    assert losses[0].tokens == losses[1].tokens == data.loss_tokens
    assert losses[0].loss == pytest.approx(losses[1].loss, rel=1e-5)


def test_models_that_cannot_keep_examples_apart_are_refused():
    transformers = pytest.importorskip("transformers")
    check_packing(byte_llama())
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config)
    refused(ValueError, lambda: check_packing(model), "MambaForCausalLM", "without --packing")


def test_fingerprint_follows_ids_and_labels(tokenizer):
    def fingerprint(**record):
        return TokenDataset.from_records([(1, record)], tokenizer, 16).fingerprint

    assert fingerprint(text="abcd") == fingerprint(text="abcd")
    different = {
        fingerprint(text="abcd"),
        fingerprint(text="abce"),
        fingerprint(prompt="ab", completion="cd"),
        fingerprint(prompt="a", completion="bcd"),
    }
    assert len(different) == 4


# ---- bad input ----


def test_missing_files_and_lengths(tokenizer, tmp_path):
    refused(FileNotFoundError, lambda: load_data(tmp_path / "no.txt", tokenizer, 8), "no.txt' does not exist")
    (tmp_path / "dir.txt").mkdir()
    refused(FileNotFoundError, lambda: load_data(tmp_path / "dir.txt", tokenizer, 8), "is a directory")
    refused(ValueError, lambda: TokenDataset.from_text("abc", tokenizer, 1), "sequence_length is 1", "at least 2")
