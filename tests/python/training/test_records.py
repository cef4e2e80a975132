# SPDX-License-Identifier: Apache-2.0
"""Data files: every kind gives the same examples, and every bad one is refused with its file and line."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import pytest

from byte_model import byte_tokenizer
from lors_cuda.data import IGNORED, TokenDataset, load_data
from models import refused

PAIRS = [{"prompt": f'{n}, "{n}"\n=', "completion": f"0{n}"} for n in range(5)]
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{% if m.tool_calls is defined %} calls {{ m.tool_calls | tojson }}{% endif %}: "
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(path, records):
    """Records as a file of the kind that its ending says."""
    ending = path.suffix.lower()
    if ending == ".jsonl":
        path.write_text("\n\n".join(json.dumps(record) for record in records))
    elif ending == ".json":
        path.write_text(json.dumps(records, indent=1 if path.stem == "indented" else None))
    elif ending == ".csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
        path.write_bytes(buffer.getvalue().encode("utf-8-sig"))
    else:
        pytest.importorskip("datasets").Dataset.from_list(records).to_parquet(path)
    return path


def as_lists(data: TokenDataset) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in data.examples]


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.json", "indented.Json", "a.csv", "a.CSV", "a.parquet"])
def test_every_kind_of_file_gives_the_same_examples(tokenizer, tmp_path, name):
    expected = TokenDataset.from_records(enumerate(PAIRS), tokenizer, 32)
    assert as_lists(load_data(written(tmp_path / name, PAIRS), tokenizer, 32)) == as_lists(expected)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_conversations_with_tools_are_the_same_from_every_file(tokenizer, tmp_path, name):
    """Arrow gives every message of a column the keys of all; the template must not see them."""
    records = [{"messages": CHAT, "id": 1}, {"messages": CHAT[:1] + CHAT[3:], "id": 2}]
    expected = TokenDataset.from_records(enumerate(records), tokenizer, 256)
    assert as_lists(load_data(written(tmp_path / name, records), tokenizer, 256)) == as_lists(expected)


def test_lists_in_the_cells_of_a_table_are_json(tokenizer, tmp_path):
    records = [{"messages": json.dumps(CHAT)}]
    expected = TokenDataset.from_records([(1, {"messages": CHAT})], tokenizer, 256)
    for name in ("a.csv", "a.parquet"):
        assert as_lists(load_data(written(tmp_path / name, records), tokenizer, 256)) == as_lists(expected)


def test_tables_of_mixed_rows(tokenizer, tmp_path):
    rows = [
        {"text": "abc", "prompt": None, "completion": None},
        {"text": None, "prompt": "a", "completion": "bc"},
    ]
    data = load_data(written(tmp_path / "a.parquet", rows), tokenizer, 8)
    assert [labels.count(IGNORED) for _, labels in as_lists(data)] == [0, 1]


@pytest.mark.parametrize("content", ["abc\r\ndef\r\n", "abc\n\ndef", "\ufeffabc\n"])
def test_texts_keep_their_line_ends(tokenizer, tmp_path, content):
    path = tmp_path / "a.TXT"
    path.write_bytes(content.encode())
    ((ids, _),) = as_lists(load_data(path, tokenizer, 32))
    assert bytes(token - 3 for token in ids).decode() == content.lstrip("\ufeff")


def test_cells_are_text_and_may_be_long(tokenizer, tmp_path):
    cells = ["007", "NA", "null", "1e3", "x" * 200_000]
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\r\n" + b"".join(cell.encode() + b"\r\n\r\n" for cell in cells))
    limit = csv.field_size_limit()
    data = load_data(path, tokenizer, 250_000)
    assert [bytes(token - 3 for token in ids[:-1]).decode() for ids, _ in as_lists(data)] == cells
    assert csv.field_size_limit() == limit


SURROGATE = "half of a character (the lone surrogate U+D83D)"


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.txt", "", ("a.txt' is empty",)),
        ("a.txt", " \n\t\n", ("a.txt' is empty",)),
        ("a.jsonl", "\n\n", ("a.jsonl' is empty",)),
        ("a.json", "\ufeff", ("a.json' is empty",)),
        ("a.json", "[]", ("a.json' is empty", "at least one record")),
        ("a.csv", "text\n", ("a.csv' is empty", "at least one record")),
        ("a.txt", "x", ("gives 1 token(s)", "at least 2")),
        ("a.xlsx", "a,b", ("extension '.xlsx'", ".csv or .parquet")),
        ("a", "text", ("extension ''",)),
        ("a.txt", b"good\nbad \xff", ("not UTF-8", "line 2", "0xff", "offset 9")),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xed\xa0\x80"}', ("a.jsonl' is not UTF-8", "line 2", "0xed")),
        ("a.csv", b"text\nok\n\xe9\n", ("a.csv' is not UTF-8", "line 3")),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', ("line 3", "is not JSON")),
        ("a.jsonl", '{"text": "a"}\nhello\n', ("line 2", "is not JSON", "column 1")),
        ("a.jsonl", "[" * 100_000, ("line 1", "is not JSON")),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", ("line 1", "is not JSON")),
        ("a.json", '[{"text": "a"},\n{"text": }]', ("line 2", "is not JSON", "one array")),
        ("a.json", '[{"text": "a"}\n', ("line 2", "is not JSON")),
        ("a.json", '[{"text": "a"},\n\n {"text": 3}]', ("a.json', line 3", '"text" is a JSON number')),
        ("a.json", '{"data": []}', ("line 1", 'has "data"')),
        ("a.jsonl", '["a"]\n', ("line 1", "JSON array", '"prompt" and "completion"')),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "a"}\n', ("line 2", 'has "prompt"', '"completion"')),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n', ("line 1", '"instruction", "output"', "Rename")),
        ("a.jsonl", "{}\n", ("line 1 has nothing; it must",)),
        ("a.jsonl", '{"text": "a", "prompt": "b", "completion": "c"}\n', ("line 1", '"text"', '"prompt"')),
        ("a.jsonl", '{"text": "a", "messages": []}\n', ("line 1", "one of these only")),
        ("a.jsonl", '{"text": 3}\n', ("line 1", '"text" is a JSON number', "string")),
        ("a.jsonl", '{"prompt": "a", "completion": null}\n', ("line 1", '"completion" is a JSON null')),
        ("a.jsonl", '{"prompt": [], "completion": []}\n', ("line 1", '"prompt" is a JSON array', '"messages"')),
        ("a.jsonl", '{"messages": 3}\n', ("line 1", '"messages" is a JSON number', "list")),
        ("a.jsonl", '{"messages": "hi"}\n', ("line 1", "not JSON", "list")),
        ("a.jsonl", '{"text": ""}\n', ("no usable tokens", "1 record(s)")),
        ("a.jsonl", '{"text": "fine"}\n{"text": "cut \\ud83d"}\n', ("a.jsonl', line 2", SURROGATE)),
        ("a.jsonl", '{"prompt": "\\ud83d", "completion": "a"}\n', ('line 1: "prompt"', SURROGATE)),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\ud83d"}]}\n', ('line 1: "messages"', SURROGATE)),
        ("a.csv", "a,b\n1,2\n", ("a.csv', line 1", 'has "a", "b"')),
        ("a.csv", "text;id\n1;2\n", ("line 1", "comma", 'has "text;id"')),
        ("a.csv", 'text,id\n"a\nb",1\nc\n', ("a.csv', line 4 has 1 cell(s)", "2 column(s)")),
        ("a.csv", 'text,id\n\na,1\nb,2,3\n', ("a.csv', line 4 has 3 cell(s)",)),
        ("a.csv", "text,text\na,b\n", ("line 1", '"text" twice')),
        ("a.csv", 'text\n"a"b\n', ("a.csv', line 2 is not CSV",)),
        ("a.csv", 'text\n\n"a\n', ("a.csv', line 3 is not CSV",)),
        ("a.csv", "prompt,other\na,b\n", ("line 2", 'has "prompt"', '"completion"')),
        ("a.parquet", "text", ("a.parquet' is not a Parquet file",)),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_the_place(tokenizer, tmp_path, name, content, fragments):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(ValueError, lambda: load_data(path, tokenizer, 8), *fragments)


def test_rows_of_parquet_are_named(tokenizer, tmp_path):
    rows = [{"text": "a"}, {"text": None}]
    refused(
        ValueError,
        lambda: load_data(written(tmp_path / "a.parquet", rows), tokenizer, 8),
        "a.parquet', row 2",
        '"text" is a JSON null',
    )
    refused(
        ValueError, lambda: load_data(written(tmp_path / "b.parquet", [{"text": 1}]), tokenizer, 8), "b.parquet', row 1"
    )


def test_reading_a_table_writes_nothing(tmp_path):
    """No cache and no lock file: homes may be read-only, and processes read the same file at once."""
    path, home = written(tmp_path / "a[1]*.parquet", [{"text": "abc"}]), tmp_path / "home"
    code = (
        "from pathlib import Path; from lors_cuda._records import read_records\n"
        f"print(list(read_records(Path({str(path)!r}), '.parquet')))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HOME": str(home), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "[(1, {'text': 'abc'})]\n", done.stderr
    assert sorted(tmp_path.iterdir()) == [path]
