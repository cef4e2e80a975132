# SPDX-License-Identifier: Apache-2.0
# Data files -> text, or records with the line (Parquet: the row) where each begins. Knows no tokenizer; writes nothing.
# JSON and CSV are read by Python's own modules and not by the package datasets: its CSV reader guesses types ("007" is
# 7.0, "NA" is nothing), its JSON reader fills absent keys of messages with null, and neither names the file's line.
"""Read .txt, .jsonl, .json, .csv and .parquet files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
KINDS: tuple[tuple[str, ...], ...] = (("text",), ("prompt", "completion"), ("messages",), ("conversations",))
NEEDED = '"text", or "prompt" and "completion", or "messages", or "conversations"'


def check_data_path(path: Path) -> str:
    """The file's ending in lower case.

    Raises:
        ValueError: it is none of ENDINGS. FileNotFoundError: there is no such file.
    """
    ending = path.suffix.lower()
    listed = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
    if ending not in ENDINGS:
        raise ValueError(f"'{path}' has the extension '{path.suffix}'; data files are {listed}.")
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"The data file '{path}' {kind}; give a {listed} file.")
    return ending


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark, with its line ends as they are.

    Raises:
        ValueError: it is not UTF-8 (the line is named), or holds nothing but whitespace.
    """
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
    return text


def read_records(path: Path, ending: str) -> Iterator[tuple[int, Any]]:
    """(line, record) of a file with one of ENDINGS but .txt; of a Parquet file (row from 1, record).

    Raises:
        ValueError: the file cannot be read as what its ending says; the line is named.
    """
    if ending == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if ending == ".csv":
        return _csv(text, path)
    return _json_array(text, path) if ending == ".json" and text.lstrip()[0] == "[" else _json_lines(text, path)


def kind_of(record: Any, where: str) -> tuple[str, ...]:
    """Which of KINDS a record is; its strings are then known to be Unicode.

    A null beside a complete kind does not count: in a table of mixed rows the other kinds' columns are null. A
    ``prompt`` beside ``messages`` does not count either: it repeats their first.

    Raises:
        ValueError: the record is none of them, or several at once.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {value_kind(record)}; it must be an object with {NEEDED}.")
    known = [name for kind in KINDS for name in kind if name in record]
    filled = [name for name in known if record[name] is not None]
    for names in (filled, known):
        if "messages" in names and "prompt" in names:
            names.remove("prompt")
        kind = tuple(names)
        if kind in KINDS:
            _check_unicode(record, (*kind, "tools"), where)
            return kind
    has = ", ".join(f'"{name}"' for name in known or record) or "nothing"
    few = "" if known or not record else ", none of which is known"
    raise ValueError(f"{where} has {has}{few}; it must have {NEEDED}, and one of these only. Rename the fields.")


def string_of(record: dict[str, Any], name: str, where: str) -> str:
    """The field ``name``, which must be a string."""
    value = record[name]
    if not isinstance(value, str):
        lists = ' Lists of messages go into one field, "messages".' if isinstance(value, list) else ""
        raise ValueError(f'{where}: "{name}" is a JSON {value_kind(value)}; it must be a string.{lists}')
    return value


def list_of(record: dict[str, Any], name: str, where: str) -> list[Any]:
    """The field ``name``, which must be a list, or a string that holds one as JSON (tables keep them so)."""
    value = record[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f'{where}: "{name}" is a string and not JSON; it must be a list.') from None
    if not isinstance(value, list):
        raise ValueError(f'{where}: "{name}" is a JSON {value_kind(value)}; it must be a list.')
    return value


def value_kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def check_unicode(text: str, where: str) -> None:
    """Refuse half of a surrogate pair: JSON can hold it, UTF-8 and tokenizers cannot.

    Raises:
        ValueError: with the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a character (the lone surrogate U+{ord(text[error.start]):04X}), as cutting a text "
            "inside an emoji leaves it; remove or replace it."
        ) from None


def _check_unicode(record: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in names:
        value = record.get(name)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        check_unicode(text, f'{where}: "{name}"')


def _json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, what = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        line, what = first_line, str(error).partition(":")[0].partition(";")[0]
    form = "it must be one array of objects" if path.suffix.lower() == ".json" else "every line must be a JSON object"
    raise ValueError(f"'{path}', line {line} is not JSON ({what}); {form}.")


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): it also breaks at characters such as U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json(line.rstrip("\r"), path, number)


def _json_array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    _json(text, path)  # so that from here on it is known to be right
    between, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    line, counted, position = 1, 0, between.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    while text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        value, end = decoder.raw_decode(text, position)
        yield line, value
        position = between.match(text, end).end()  # type: ignore[union-attr]


def _csv(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # A cell may be as long as the file; the module's own limit is 128 KiB, and the same for everybody.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        rows, line = [], 1
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                if row:
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"'{path}', line {line} is not CSV ({error}).") from None
    finally:
        csv.field_size_limit(limit)
    (_, header), *rest = rows
    doubled = next((name for name in header if header.count(name) > 1), None)
    if doubled is not None:
        raise ValueError(f"'{path}', line 1 names the column \"{doubled}\" twice.")
    if not any(name in header for kind in KINDS for name in kind):
        columns = ", ".join(f'"{name}"' for name in header)
        raise ValueError(
            f"'{path}', line 1 must name the columns, comma between them, and has {columns}; needed are {NEEDED}."
        )
    for line, row in rest:
        if len(row) != len(header):
            raise ValueError(f"'{path}', line {line} has {len(row)} cell(s); line 1 names {len(header)} column(s).")
        yield line, dict(zip(header, row, strict=True))


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    # datasets decodes the columns of files that it wrote itself (JSON inside strings). Its load_dataset would write a
    # copy and a lock file into the user's home; a table in memory does not.
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import ArrowException, Table
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in Dataset(InMemoryTable(Table.from_batches([batch]))):
                    row += 1
                    yield row, {name: _without_null(value) for name, value in record.items()}
    except (ArrowException, OSError) as error:
        raise ValueError(f"'{path}' is not a Parquet file that can be read ({str(error).splitlines()[0]}).") from None
    except UnicodeDecodeError:
        raise ValueError(f"'{path}', row {row + 1} is not UTF-8 text.") from None


def _without_null(value: Any) -> Any:
    """Without the keys that Arrow adds to an object because another one of the column has them."""
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
