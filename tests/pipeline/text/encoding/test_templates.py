"""Chats through templates in the manner of today's models: which tokens they become, and which are labels."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from chat_templates import FAMILY, chat_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text import Document, Encoder

CALL = {
    "id": "123456789",
    "type": "function",
    "function": {"name": "tide", "arguments": {"at": "noon", "h": 3}},
}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "tide?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "low"},
    {"role": "assistant", "content": "It is low."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "fine"},
]
END = {"llama": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "<eos>", "deepseek": "<eos>"}
ENCODERS = {name: Encoder(chat_tokenizer(text), name=name) for name, text in FAMILY.items()}


def chat(*contents: str) -> list[dict[str, Any]]:
    return [
        {"role": "assistant" if turn % 2 else "user", "content": text} for turn, text in enumerate(contents)
    ]


def labelled(encoder: Encoder, messages: list[dict[str, Any]], **more: Any) -> list[str]:
    """The text of every run of labels."""
    (encoded,) = encoder.encode([Document("f:1", messages=messages, **more)])
    pairs = zip(encoded.ids.tolist(), encoded.is_label.tolist(), strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [encoder.tokenizer.decode([index for index, _ in run]) for is_label, run in runs if is_label]


def answers(name: str, first: str, last: str) -> list[str]:
    """What is to be learnt of two answers: their text and what closes each, and what the template puts before."""
    if name == "glm":  # closed by the next turn's opening, and by our EOS
        return [f"{first}<|user|>", f"{last}<eos>"]
    if name == "words":
        return [f"{first}\n\n#", f"{last}\n\n<eos>"]
    thought = {"qwen": "<think>\n\n</think>\n\n", "last_thought": "(thought)\n", "generation": "(thought)\n"}
    space, end = " " * (name == "mistral"), END.get(name, "<|im_end|>")
    return [f"{space}{first}{end}", f"{space}{thought.get(name, '')}{last}{end}"]


@pytest.mark.parametrize("name", FAMILY)
def test_labels_are_the_answers_and_what_closes_them(name: str) -> None:
    encoder = ENCODERS[name]
    assert labelled(encoder, chat("first?", "alpha", "more?", "omega")) == answers(name, "alpha", "omega")
    assert labelled(encoder, chat("alpha", "alpha", "omega", "omega")) == answers(name, "alpha", "omega")


@pytest.mark.parametrize("name", sorted(FAMILY.keys() - {"gemma"}))
def test_a_chat_that_the_assistant_opens(name: str) -> None:
    messages = chat("", "hello", "more?", "omega")[1:]
    assert labelled(ENCODERS[name], messages) == answers(name, "hello", "omega")


@pytest.mark.parametrize("name", sorted(FAMILY.keys() - {"deepseek", "open_generation"}))
def test_an_answer_of_nothing_ends_all_the_same(name: str) -> None:
    first, last = answers(name, "", "omega")
    got = labelled(ENCODERS[name], chat("first?", "", "more?", "omega"))
    assert [text.strip() for text in got] == [first.strip(), last.strip()]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("llama", '{"name": "tide", "parameters": {"at": "noon", "h": 3}}<|eot_id|>'),
        (
            "qwen",
            '<tool_call>\n{"name": "tide", "arguments": {"at": "noon", "h": 3}}\n</tool_call><|im_end|>',
        ),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "tide", "arguments": {"at": "noon", "h": 3}, "id": "123456789"}]<eos>',
        ),
        ("glm", '<tool_call>tide {"at": "noon", "h": 3}</tool_call><|observation|>'),
        ("deepseek", '<|call_begin|>tide{"at": "noon", "h": 3}<|call_end|><eos>'),
    ],
)
def test_tool_calls_are_answers_and_their_results_are_not(name: str, call: str) -> None:
    got = labelled(ENCODERS[name], CALLED)
    assert got == [call, *answers(name, "It is low.", "fine")]


def test_thoughts_belong_to_the_answer_that_shows_them() -> None:
    thinking = chat("a?", "<think>\nhm\n</think>\n\nalpha", "b?", "<think>\nwell\n</think>\n\nomega")
    shown = ["alpha<|im_end|>", "<think>\nwell\n</think>\n\nomega<|im_end|>"]
    assert labelled(ENCODERS["qwen"], thinking) == shown
    fields = chat("a?", "alpha", "b?", "omega")
    fields[1]["reasoning_content"], fields[3]["reasoning_content"] = "hm", "well"
    assert labelled(ENCODERS["qwen"], fields) == shown
    assert labelled(ENCODERS["deepseek"], thinking) == ["\n\nalpha<eos>", "\n\nomega<eos>"]


def test_what_looks_into_a_message_still_sees_it() -> None:
    messages = chat("tide?", "calling", "<tool_response>low</tool_response>", "low")
    messages[1]["reasoning_content"] = "look it up"
    first, last = labelled(ENCODERS["qwen"], messages)  # a tool's response does not end the thinking turn
    assert first == "<think>\nlook it up\n</think>\n\ncalling<|im_end|>" and last.endswith("low<|im_end|>")


@pytest.mark.parametrize("name", FAMILY)
@given(contents=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=4, max_size=4))
@example(contents=["\U000f0000", "\U0010ffff\U00100000", "<", ">"])
@example(contents=["</think>", "a</think>b", "<think>", "\n<think>\n"])
@settings(max_examples=25, deadline=None)
def test_tokens_are_the_tokenizers_own_where_nothing_mentions_a_control_token(
    name: str, contents: list[str]
) -> None:
    encoder = ENCODERS[name]
    try:
        (encoded,) = encoder.encode([Document("f:1", messages=chat(*contents))])
    except DdkError as refused:  # never silently: a template that rewrites what marks cannot follow
        assert "rewrites earlier turns" in str(refused)
        return
    tokenizer = encoder.tokenizer
    values = {"date_string": "26 Jul 2024"}
    text = tokenizer.apply_chat_template(chat(*contents), tokenize=False, **values)
    assert encoded.ids[:-1].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAMILY)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_only_the_template_writes_control_tokens(name: str, data: Any) -> None:
    encoder = ENCODERS[name]
    piece = st.sampled_from([*encoder.controls.ids, "a", " ", "\n", "<", "|", "\U000f0001"])
    contents = ["q" + "".join(data.draw(st.lists(piece, min_size=1, max_size=6))) + "z" for _ in range(4)]
    (plain,) = encoder.encode([Document("f:1", messages=chat("qz", "qz", "qz", "qz"))])
    (encoded,) = encoder.encode([Document("f:1", messages=chat(*contents))])
    assert encoder.controls.found(encoded.ids) == encoder.controls.found(plain.ids)
    got = labelled(encoder, chat(*contents))
    assert got == answers(name, contents[1], contents[3])


def test_a_role_a_name_and_tools_write_no_control_token_either() -> None:
    encoder = ENCODERS["llama"]
    messages = [*chat("a?", "alpha"), {"role": "user<|eot_id|>", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "<|eot_id|>", "parameters": {"<bos>": "x"}}}]
    (with_tools,) = encoder.encode([Document("f:1", messages=messages, tools=tools)])
    found = encoder.controls.found(with_tools.ids[:-1])
    assert found.count(encoder.controls.ids["<bos>"]) == 1
    assert found.count(encoder.controls.ids["<|eot_id|>"]) == 4  # system and three turns
    assert "<bos>" in encoder.tokenizer.decode(with_tools.ids[5:])


def test_mentions_that_the_template_itself_reads() -> None:
    reads = FAMILY["chatml"].replace("m.content", "m.content.split('<turn>')[-1]")
    encoder = Encoder(chat_tokenizer(reads), name="t")
    assert labelled(encoder, chat("a?", "b<turn>c")) == ["c<|im_end|>"]
    rewrites = FAMILY["chatml"].replace("m.content", "m.content.replace('<turn>', '<eos>')")
    encoder = Encoder(chat_tokenizer(rewrites), name="t")
    (encoded,) = encoder.encode([Document("f:1", messages=chat("a?", "b<turn>c"))])
    assert "b<eos>c" in encoder.tokenizer.decode(encoded.ids)
    assert encoder.controls.ids["<eos>"] not in encoded.ids[:-1]
    counts = FAMILY["chatml"].replace("m.content", "m.content | length")
    with pytest.raises(
        DdkError, match="f:1: its text mentions control tokens, which the chat template reads"
    ):
        Encoder(chat_tokenizer(counts), name="t").encode([Document("f:1", messages=chat("a?", "b<turn>c"))])


def test_marks_of_turns_are_control_tokens_though_not_flagged() -> None:
    assert {"<|User|>", "<|Assistant|>"} <= ENCODERS["deepseek"].controls.ids.keys()
    assert not {"<think>", "<|User|>"} & ENCODERS["qwen"].controls.ids.keys()


def test_the_day_is_fixed() -> None:
    text = (
        FAMILY["llama"]
        .replace("{% if not date_string is defined %}", "")
        .replace("%Y') %}{% endif %}", "%Y') %}")
    )
    for template in (FAMILY["llama"], text):
        encoder = Encoder(chat_tokenizer(template), name="t", date="2025-01-31")
        (encoded,) = encoder.encode([Document("f:1", messages=chat("a?", "b"))])
        assert "Today Date: 31 Jan 2025" in encoder.tokenizer.decode(encoded.ids)
    (encoded,) = ENCODERS["llama"].encode([Document("f:1", messages=chat("a?", "b"))])
    assert "Today Date: 26 Jul 2024" in ENCODERS["llama"].tokenizer.decode(encoded.ids)


def test_tools_reach_the_template_or_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": "tide_table"}}]
    (encoded,) = ENCODERS["llama"].encode([Document("f:1", messages=chat("a?", "b"), tools=tools)])
    assert "tide_table" in ENCODERS["llama"].tokenizer.decode(encoded.ids)
    with pytest.raises(DdkError, match="f:1: a chat with tools, but the chat template has no place"):
        ENCODERS["chatml"].encode([Document("f:1", messages=chat("a?", "b"), tools=tools)])


def test_content_that_is_absent_is_empty_for_templates_that_want_a_string() -> None:
    wants = FAMILY["chatml"].replace("m.content", "m.content + ''")
    encoder = Encoder(chat_tokenizer(wants), name="t")
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "tool_calls": [CALL]},
    ]
    assert labelled(encoder, messages) == ["<|im_end|>"]
    assert "None" not in encoder.tokenizer.decode(encoder.encode([Document("f:1", messages=messages)])[0].ids)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] }}",  # shows one answer alone
        "{% for m in messages %}{{ loop.length }}{{ m.content | length }}{{ m.content }}<eos>{% endfor %}",
    ],
)
def test_answers_that_cannot_be_told_are_refused(template: str) -> None:
    with pytest.raises(DdkError, match=r"f:1: the chat template rewrites earlier turns.*generation"):
        labelled(Encoder(chat_tokenizer(template), name="t"), chat("a?", "b", "c?", "d"))


def test_templates_that_only_append_need_no_marks() -> None:
    counts = "{% for m in messages %}<turn>{{ m.content | length }} {{ m.content }}<eos>\n{% endfor %}"
    got = labelled(Encoder(chat_tokenizer(counts), name="t"), chat("a?", "b", "c?", "d"))
    assert got == ["<turn>1 b<eos>", "<turn>1 d<eos>"]  # it does not say what asks for an answer
