# SPDX-License-Identifier: Apache-2.0
# The demo's text: the language reference inside CPython (pydoc_data.topics), split into training and held-out topics.
# A pure function of the Python version: nothing is drawn, nothing is downloaded.
"""Real text that every Python has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_EVERY = 10  # one of so many topics, in the order of their names, is held out


@dataclass(frozen=True)
class Split:
    """Two texts without a common paragraph, and how many topics went into each."""

    train: str
    held_out: str
    train_topics: int
    held_out_topics: int


def language_reference() -> dict[str, str]:
    """The topics of ``help()``: {name: text}.

    Raises:
        RuntimeError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError(
            "This Python comes without its language reference (the module pydoc_data.topics), which is the demo's "
            "text. Use a Python with the whole standard library."
        ) from None
    return dict(topics)


def split_topics(topics: Mapping[str, str], held_out_bytes: int) -> Split:
    """Hold out every tenth topic, at most about ``held_out_bytes`` of them; train on the others.

    Topics quote each other: a fifth of the reference occurs in it more than once. So a paragraph is used once only,
    and the training text has none of a held-out topic, also of those left out for size.
    """
    names = sorted(topics)
    held_out_names = names[::_EVERY]
    train_names = [name for name in names if name not in held_out_names]
    seen: set[str] = set()
    held_out, size, used = [], 0, 0
    for name in held_out_names:
        paragraphs = list(_new_paragraphs(topics[name], seen))
        for number, paragraph in enumerate(paragraphs):
            if size < held_out_bytes:
                used += number == 0
                size += len(paragraph.encode()) + 2
                held_out.append(paragraph)
    train = [paragraph for name in train_names for paragraph in _new_paragraphs(topics[name], seen)]
    return Split("\n\n".join(train) + "\n", "\n\n".join(held_out) + "\n", len(train_names), used)


def _new_paragraphs(text: str, seen: set[str]) -> Iterable[str]:
    """The paragraphs that are not in ``seen`` yet, however they are indented or wrapped; adds them to it."""
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            yield paragraph
