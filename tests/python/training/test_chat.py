# SPDX-License-Identifier: Apache-2.0
"""Conversations: which tokens a chat template makes, and on which the loss counts."""

from __future__ import annotations

import warnings

import pytest

from byte_model import byte_tokenizer, fast_tokenizer
from lors_cuda.data import IGNORED, TokenDataset
from models import refused

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = HEAD + "{{ m.content + '<|im_end|>\\n' }}{% endfor %}" + PROMPT
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + PROMPT
)
TURNS = [("system", "be brief"), ("user", "a?"), ("assistant", "\n\u00e9!"), ("user", "b?"), ("assistant", "B.")]
SAID = ["\n\u00e9!<|im_end|>\n", "B.<|im_end|>\n"]


def messages(turns=TURNS):
    return [{"role": role, "content": content} for role, content in turns]


def loss_of(tokenizer, record, length: int = 512) -> tuple[str, list[str]]:
    """The whole text of the one example, and the runs of its tokens on which the loss counts."""
    ((ids, labels),) = TokenDataset.from_records([(1, record)], tokenizer, length).examples
    runs, run = [], []
    assert all(label in (token, IGNORED) for token, label in zip(ids.tolist(), labels.tolist(), strict=True))
    for label in [*labels.tolist(), IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return tokenizer.decode(ids), runs


def slow_tokenizer(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["beginnings", "marks"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_the_loss_counts_on_every_turn_of_the_assistant(template, column):
    tokenizer = fast_tokenizer(template=template)
    names = {"user": "human", "assistant": "gpt"}
    record = {
        "messages": messages(),
        "conversations": [{"from": names.get(role, role), "value": content} for role, content in TURNS],
    }[column]
    text, said = loss_of(tokenizer, {column: record})
    assert text == tokenizer.apply_chat_template(messages(), tokenize=False)
    assert said == SAID


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["beginnings", "marks"])
def test_tokenizers_in_python_give_the_same(template):
    text, said = loss_of(slow_tokenizer(template), {"messages": messages()})
    assert text.endswith("B.<|im_end|>\n</s>")  # these words are no tokens of its own: EOS must end the turn
    assert said == [SAID[0], SAID[1] + "</s>"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["beginnings", "marks"])
def test_a_token_across_a_border_has_no_loss(template):
    tokenizer = fast_tokenizer(template=template, words=("\n\n",) * 9)
    assert len(tokenizer("\n\n", add_special_tokens=False).input_ids) == 1
    turns = messages([("user", "a?"), ("assistant", "\n\nB.")])
    text, said = loss_of(tokenizer, {"messages": turns})
    assert text == tokenizer.apply_chat_template(turns, tokenize=False)
    assert said[0].lstrip("\n") == "B.<|im_end|>\n"
    assert said[0].count("\n") < 3


def test_turns_of_tools_and_the_tools_themselves():
    template = "{{ tools | tojson if tools else '' }}" + CHATML.replace("m.content", "m.content + (m.calls or '')")
    called = [
        {"role": "developer", "content": ""},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}], "calls": "add(1, 1)"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    text, said = loss_of(fast_tokenizer(template=template), {"messages": called, "tools": [{"name": "add"}]})
    assert text.startswith('[{"name": "add"}]<|im_start|>')
    assert said == ["add(1, 1)<|im_end|>\n", "two<|im_end|>\n"]


@pytest.mark.parametrize("adds", ["nothing", "bos", "bos and eos"])
def test_bos_and_eos_are_written_once(adds):
    """By the template, or by us where the tokenizer begins texts with BOS and the template does not."""
    both = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    one_turn = {"messages": messages(TURNS[1:3])}
    assert loss_of(fast_tokenizer(adds, both), one_turn) == ("<s>a?</s>\n\u00e9!</s>", ["\n\u00e9!</s>"])
    neither = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    bos = "" if adds == "nothing" else "<s>"
    assert loss_of(fast_tokenizer(adds, neither), one_turn) == (
        f"{bos}[user]a?[assistant]\n\u00e9!</s>",
        ["\n\u00e9!</s>"],  # and not on the role's name
    )
    ends_with_user = {"messages": messages(TURNS[1:4])}
    assert loss_of(fast_tokenizer(adds, neither), ends_with_user)[0].endswith("[user]b?")


def test_long_conversations_lose_their_end_and_are_counted():
    tokenizer = fast_tokenizer("bos", CHATML)
    data = TokenDataset.from_records([(1, {"messages": messages()})], tokenizer, 44)
    assert (len(data), data.truncated, data.skipped) == (1, 1, 0)
    ids = tokenizer("<s>" + tokenizer.apply_chat_template(messages(), tokenize=False), add_special_tokens=False)
    assert data.examples[0][0].tolist() == ids.input_ids[:44]
    refused(
        ValueError,
        lambda: TokenDataset.from_records([(1, {"messages": messages()})], tokenizer, 20),
        "no usable tokens",
        "20",
    )


def test_without_a_chat_template_there_is_a_warning_and_a_plain_one():
    tokenizer = fast_tokenizer()
    with pytest.warns(UserWarning, match="has no chat template") as caught:
        data = TokenDataset.from_records([(n, {"messages": messages()}) for n in range(2)], tokenizer, 512)
    assert len(caught) == 1
    assert tokenizer.decode(data.examples[0][0]).startswith(
        "<|system|>\nbe brief</s>\n<|user|>\na?</s>\n<|assistant|>\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert loss_of(tokenizer, {"messages": messages()})[1] == ["\n\u00e9!</s>", "B.</s>"]
        record = {"messages": messages(), "tools": [{}]}
        refused(ValueError, lambda: loss_of(tokenizer, record), "line 1 has tools", "chat_template.jinja")


THINKS = (
    HEAD
    + "{{ ('[thought]' if loop.last and m.role == 'assistant' else '') + m.content + '<|im_end|>\\n' }}{% endfor %}"
    + PROMPT
)
ENDS = CHATML.replace(PROMPT, "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}")
OTHER_PROMPT = CHATML.replace(PROMPT, "{% if add_generation_prompt %}<|im_start|>assistant\n[thought]{% endif %}")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (THINKS, [SAID[0], "[thought]" + SAID[1]]),
        (ENDS, [SAID[0], SAID[1] + "</s>"]),
        (OTHER_PROMPT, SAID),
        (CHATML.replace(PROMPT, ""), SAID),
    ],
    ids=["another form at the end", "EOS at the end", "another prompt", "no prompt"],
)
def test_templates_whose_turns_depend_on_their_place(template, expected):
    tokenizer = fast_tokenizer(template=template)
    text, said = loss_of(tokenizer, {"messages": messages()})
    assert text.removesuffix("</s>") == tokenizer.apply_chat_template(messages(), tokenize=False).removesuffix("</s>")
    assert said == expected


BY_LENGTH = (
    HEAD
    + "{{ (messages | map(attribute='content') | join | length) ~ m.content + '<|im_end|>\\n' }}{% endfor %}"
    + PROMPT
)
LISTS = HEAD + "{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
ONLY_USERS = MARKED.replace("m.role == 'assistant'", "m.role == 'model'")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "turns", "fragments"),
    [
        (BY_LENGTH, messages(), ("message 3 differently", "{% generation %}")),
        (LISTS, messages(), ("leaves out what message 2 says", "list")),
        (ONLY_USERS, messages(), ("none around",)),
        (NO_SYSTEM, messages(), ("refuses the conversation: no system role",)),
        ("{{ 1 + '' }}", messages(), ("refuses the conversation",)),
        (CHATML, ["hi"], ("message 1 is a JSON string", "object")),
        (CHATML, [{"content": "hi"}], ('message 1 must have "role" and "content"',)),
        (CHATML, messages([("user", "a"), ("bard", "b")]), ("message 2 has the role 'bard'", "human, gpt")),
        (CHATML, messages([("user", 3)]), ('message 1: "content" is a JSON number',)),
        (CHATML, [{"from": "gpt"}], ('message 1: "value" is a JSON null',)),
    ],
)
def test_conversations_that_cannot_be_told_are_refused(template, turns, fragments):
    tokenizer = fast_tokenizer(template=template)
    refused(ValueError, lambda: loss_of(tokenizer, {"messages": turns}), "line 1", *fragments)


def test_tokenizers_without_offsets_refuse_what_they_join():
    class Joining(type(byte_tokenizer())):
        def __call__(self, text, **options):
            return super().__call__(text.replace("\n\n", "\r"), **options)

    tokenizer = Joining()
    tokenizer.chat_template = CHATML
    refused(ValueError, lambda: loss_of(tokenizer, {"messages": messages()}), "line 1", "fast tokenizer")
