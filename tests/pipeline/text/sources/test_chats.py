from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import write_jsonl

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Domain, load_project
from ddk_pipe.pipeline.text import Document, documents
from ddk_pipe.pipeline.text.sources.records import read_record

CALL = {"type": "function", "function": {"name": "tide", "arguments": {"at": "noon"}}}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"at": {"type": "string"}}}}
RECORDS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "b", "reasoning": "c"},
        ]
    },
    {
        "messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "tool_calls": [CALL]}],
        "tools": [TOOL],
    },
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "d"}]},
]


def read(messages: Any, tools: Any = None, *, structs: bool = False) -> Any:
    """Messages and tools of the one record of a file."""
    record = {"messages": messages, "tools": tools}
    document = read_record(record, Domain(train=["f"]), "f:1", structs=structs)
    return document.messages, document.tools


def read_all(folder: Path, name: str, **more: Any) -> list[Document]:
    domain = {"train": name, **more}
    values = {"domains": {"a": domain}, "teacher": {"model": "t"}}
    (folder / "m.yaml").write_text(json.dumps(values), encoding="utf-8")
    project = load_project(folder / "m.yaml")
    only = project.manifest.domains["a"]
    return list(documents(project, only, only.train, field="domains.a.train"))


def test_parquet_gives_the_chats_of_json_lines(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    columns = {name: [record.get(name) for record in RECORDS] for name in ("messages", "tools")}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    lines, rows = read_all(tmp_path, "a.jsonl"), read_all(tmp_path, "a.parquet")
    assert [(d.messages, d.tools) for d in lines] == [(d.messages, d.tools) for d in rows]
    assert [d.digest for d in lines] == [d.digest for d in rows]
    assert lines[1].tools == [TOOL] and lines[1].messages == RECORDS[1]["messages"]


def test_tools_may_be_left_out_or_named_otherwise(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{**RECORDS[0], "functions": json.dumps([TOOL]), "tools": "not JSON"}])
    assert read_all(tmp_path, "a.jsonl", tools_field=None)[0].tools is None
    assert read_all(tmp_path, "a.jsonl", tools_field="functions")[0].tools == [TOOL]
    with pytest.raises(DdkError, match=r"a.jsonl:1: its tools are not JSON; .*tools_field"):
        read_all(tmp_path, "a.jsonl")


def test_null_fields_are_absent_and_arguments_keep_theirs() -> None:
    call = {"id": None, "function": {"name": "f", "arguments": {"at": None}, "strict": None}}
    message = {"role": "assistant", "content": None, "name": None, "tool_calls": [call]}
    (got,), _ = read([message])
    assert got == {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"at": None}}}],
    }
    (got,), _ = read([message], structs=True)
    assert got == {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b", "image_url": None}], "a b"),
        (["a", {"text": "b"}], "ab"),
        ([], ""),
        ("", ""),
    ],
)
def test_content_in_parts_is_its_text(content: Any, text: str) -> None:
    assert read([{"role": "user", "content": content}])[0] == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("tools", "read_as"),
    [
        (None, None),
        ([], None),
        ("", None),
        ("[]", None),
        ([json.dumps(TOOL)], [TOOL]),
        (json.dumps([TOOL]), [TOOL]),
    ],
)
def test_tools_come_in_many_forms(tools: Any, read_as: Any) -> None:
    assert read([{"role": "user", "content": "a"}], tools)[1] == read_as


def deep() -> Any:
    value: Any = "x"
    for _ in range(3000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("text", "messages is not a list of role and content"),
        ([{"content": "a"}], "messages is not a list of role and content"),
        ([{"role": 1, "content": "a"}], "messages is not a list of role and content"),
        ([{"role": "user", "content": None}], "message 1 has no content"),
        ([{"role": "assistant", "tool_calls": []}], "message 1 has no content"),
        ([{"role": "user", "content": 3}], "neither text nor a list of parts"),
        ([{"role": "user", "content": {"a": "b"}}], "neither text nor a list of parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "no text (image_url)"),
        ([{"role": "user", "content": [{"type": "text"}]}], "no text (text)"),
        ([{"role": "user", "content": [None]}], "no text (NoneType)"),
        ([{"role": "user", "content": "a", "at": datetime.datetime(2024, 1, 1)}], "of type datetime"),
        ([{"role": "user", "content": "a", "x": [{"y": decimal.Decimal(1)}]}], "of type Decimal"),
        ([{"role": "user", "content": "a", "x": b"y"}], "of type bytes"),
        ([{"role": "user", "content": "a", "x": deep()}], "nests more than"),
    ],
)
def test_what_is_no_chat_is_refused_in_one_line(messages: Any, said: str) -> None:
    with pytest.raises(DdkError) as refused:
        read(messages)
    assert str(refused.value).startswith("f:1: ") and said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tools", ["{", "3", 3, {"name": "x"}, [3], ["{"], [{"at": decimal.Decimal(1)}]])
def test_tools_that_are_none_are_refused(tools: Any) -> None:
    with pytest.raises(DdkError, match="f:1"):
        read([{"role": "user", "content": "a"}], tools)
