# SPDX-License-Identifier: Apache-2.0
# Conversations -> tokens by the tokenizer's chat template, and which of them the assistant says. Called by data.py.
# The spans come from the template's {% generation %} marks, or from rendering the conversation's beginnings.
"""Chat templates."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

from ._records import value_kind

_ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
# As Zephyr's: for a base model, whose tokenizer knows no template.
_PLAIN = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token | default('') }}{% endgeneration %}"
    "{% else %}{{ message.content + eos_token | default('') }}{% endif %}{{ '\n' }}{% endfor %}"
)
_PROBE = "\ue000"  # a character of private use, for a message
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def as_messages(turns: list[Any], where: str) -> list[dict[str, Any]]:
    """Messages with role and content, from those or from ShareGPT's ``from`` and ``value``.

    Raises:
        ValueError: a message has neither, an unknown role, or content of a wrong type.
    """
    messages = []
    for number, turn in enumerate(turns, start=1):
        place = f"{where}: message {number}"
        if not isinstance(turn, dict):
            raise ValueError(f"{place} is a JSON {value_kind(turn)}; it must be an object.")
        role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
        if role_key not in turn:
            raise ValueError(f'{place} must have "role" and "content", or "from" and "value".')
        role, content = turn[role_key], turn.get(content_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"{place} has the {role_key} {role!r}; it must be one of {', '.join(_ROLES)}.")
        if not isinstance(content, (str, list)) and not (content is None and turn.get("tool_calls")):
            raise ValueError(f'{place}: "{content_key}" is a JSON {value_kind(content)}; it must be a string.')
        # A null is no value: a template that asks `is defined` would take "tool_calls": null for a call.
        rest = {name: item for name, item in turn.items() if name not in (role_key, content_key) and item is not None}
        messages.append({**rest, "role": _ROLES[role], "content": content or ""})
    return messages


class ChatTemplate:
    """The chat template of a tokenizer, or, with a warning, a plain one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._plain = not getattr(tokenizer, "chat_template", None)
        if self._plain:
            warnings.warn(
                "The tokenizer has no chat template. Conversations are written as <|user|>, a new line, the message, "
                "the EOS token, <|assistant|>, ...; a chat_template.jinja in the tokenizer's directory would decide.",
                stacklevel=5,
            )

    def encode(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str
    ) -> tuple[list[int], list[bool]]:
        """The conversation's tokens, without any that the template does not write, and which are the assistant's.

        Raises:
            ValueError: the template refuses the messages, or does not show where the assistant's turns are.
        """
        if self._plain and (tools or any(message.get("tool_calls") for message in messages)):
            raise ValueError(
                f"{where} has tools, and the tokenizer has no chat template to write them. Put the model's "
                "chat_template.jinja into the tokenizer's directory."
            )
        template = _PLAIN if self._plain else self._tokenizer.get_chat_template(tools=tools)
        return _Conversation(self._tokenizer, template, tools, where).encode(messages)


@dataclass
class _Conversation:
    """What all renderings of one conversation and of its beginnings share."""

    tokenizer: Any
    template: str
    tools: list[Any] | None
    where: str

    def encode(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        if _MARKS.search(self.template):
            text, spans = self._render(messages, marks=True)
        else:
            text, spans = self._spans_by_beginnings(messages)
        if not any(start < end for start, end in spans):
            raise ValueError(
                f"{self.where}: the chat template has {{% generation %}} marks, and none around this conversation's "
                "assistant turns."
            )
        for number, message in enumerate(messages, start=1):
            words = message["content"].split() if isinstance(message["content"], str) else []
            if message["role"] in ("user", "assistant") and words and words[-1] not in text:
                raise ValueError(
                    f"{self.where}: the chat template leaves out what message {number} says; it may need the content "
                    'as a list: [{"type": "text", "text": ...}].'
                )
        return self._tokens(text, spans)

    def _render(
        self, messages: list[dict[str, Any]], *, marks: bool = False, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(  # annotated as a string
                conversations=[messages],
                tools=self.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except ImportError:
            raise
        except Exception as error:  # a template is a program, and may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self.where}: the chat template refuses the conversation: {reason}") from None
        (text,), spans = rendered
        return text, list(spans[0]) if marks else []

    def _spans_by_beginnings(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        text, _ = self._render(messages)
        spans: list[tuple[int, int]] = []
        for number in range(len(messages)):
            if messages[number]["role"] == "assistant":
                start, end = self._span(messages, number, text)
                if not (spans[-1][1] if spans else 0) <= start < end <= len(text):
                    raise ValueError(
                        f"{self.where}: the chat template renders message {number + 1} differently inside the "
                        "conversation and at its end, so that the assistant's tokens cannot be told. Use a template "
                        "with {% generation %} marks around the assistant's turns, or conversations of one turn."
                    )
                spans.append((start, end))
        return text, spans

    def _span(self, messages: list[dict[str, Any]], number: int, text: str) -> tuple[int, int]:
        """Where message ``number`` is: what rendering it adds to the prompt for it. (0, 0): unknown."""
        message, start, end = messages[number], 0, 0
        probe = {**message, "content": _PROBE}
        before, found, behind = self._render([*messages[:number], probe, *messages[number + 1 :]])[0].partition(_PROBE)
        known = bool(found) and text.startswith(before) and text.endswith(behind)
        prompt, _ = self._render(messages[:number], prompt=True)
        if text.startswith(prompt) and prompt != self._render(messages[:number])[0]:
            start = len(prompt)
        elif known:  # no prompt, or one that no turn begins with: the role's name is before the message
            start = len(before)
        whole, _ = self._render(messages[: number + 1])
        if text.startswith(whole):
            end = len(whole)
        elif known and not message.get("tool_calls"):
            # A turn at the end is rendered in another way (Qwen 3: its thoughts; Phi 3: EOS after it). What closes this
            # one is what closes it there, if that is here too.
            closing = self._render([*messages[:number], probe])[0].partition(_PROBE)[2]
            closings = (closing, closing.removesuffix(self.tokenizer.eos_token or ""))
            end = len(text) - len(behind) + next((len(one) for one in closings if behind.startswith(one)), 0)
        return start, end

    def _tokens(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        ids = self._ids(text)
        beginnings = [[self._ids(text[:border]) for border in span] for span in spans]
        if all(ids[: len(one)] == one for pair in beginnings for one in pair):
            said = [False] * len(ids)
            for before, whole in beginnings:
                said[len(before) : len(whole)] = [True] * (len(whole) - len(before))
            return ids, said
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{self.where}: the tokenizer joins characters across the border of a turn, and does not say which; a "
                "fast tokenizer (tokenizer.json) would."
            )
        # A token across a border is in part the prompt's: no loss on it.
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        said = [any(a <= start < end <= b for a, b in spans) for start, end in encoded.offset_mapping]
        return list(encoded.input_ids), said

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []
