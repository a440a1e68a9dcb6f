from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import read, texts

from ddk_pipe.pipeline.errors import DdkError

GOOD = '{"text": "ebb"}\n'
CHAT = '{"messages": [{"role": "user", "content": %s}]}\n'

BROKEN = {
    "half a pair": (r'{"text": "a torn \ud83d sign"}', r":3: half of a surrogate pair \(\\ud83d, character 8"),
    "the other half": (r'{"text": "\ude00"}', r":3: half of a surrogate pair"),
    "a pair the wrong way": (r'{"text": "\ude00\ud83d"}', r":3: half of a surrogate pair"),
    "half a pair in a chat": (CHAT % r'"\ud83d"', r":3: half of a surrogate pair"),
    "half a pair in a name": (CHAT % r'{"\ud83d": 1}', r":3: half of a surrogate pair"),
    "5,000 digits": ('{"text": "ebb", "n": ' + "7" * 5000 + "}", r":3: not JSON that can be read"),
    "deep": ('{"text": "ebb", "n": ' + "[" * 50_000 + "]" * 50_000 + "}", r":3: JSON that nests too deep"),
    "deep objects": ('{"a":' * 50_000 + "1" + "}" * 50_000, r":3: JSON that nests too deep"),
    "a deep chat": (CHAT % ("[" * 200 + "]" * 200), r":3: messages nests more than 100 levels deep"),
    "a key twice": ('{"text": "ebb", "text": "flow"}', r":3: a JSON object with a key twice \(text\)"),
    "a key twice below": (CHAT % '{"x": 1, "x": 2}', r":3: a JSON object with a key twice \(x\)"),
    "two a line": ('{"text": "ebb"} {"text": "flow"}', r":3: not JSON \(Extra data, column 17\)"),
    "a number": ('{"text": 5}', r":3: field 'text' is of type int"),
    "nothing": ('{"text": null}', r":3: no field 'text' with text \(fields: text\)"),
    "a list": ('["ebb"]', r":3: not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_are_one_line_with_file_and_line(tmp_path: Path, name: str) -> None:
    line, expected = BROKEN[name]
    (tmp_path / "w.jsonl").write_text(GOOD + "\n" + line)
    with pytest.raises(DdkError, match=r"w\.jsonl" + expected) as caught:
        read(tmp_path, "w.jsonl")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_whole_files_name_line_and_record(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text('[\n{"text": "ebb"},\n{"text" "flow"}\n]')
    with pytest.raises(DdkError, match=r"w\.json:3: not JSON"):
        read(tmp_path, "w.json")
    (tmp_path / "w.json").write_text('[\n{"text": "ebb"},\n{"txt": "flow"}\n]')
    with pytest.raises(DdkError, match=r"w\.json: record 2: no field 'text'"):
        read(tmp_path, "w.json")


def test_whole_pairs_and_other_numbers_are_fine(tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text(r'{"text": "\ud83d\ude00", "x": NaN, "y": 1e999, "z": null}')
    assert texts(tmp_path, "w.jsonl") == ["\U0001f600"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=4), below, max_size=3),
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(["text", "messages", "x"]), VALUES))
def test_any_object_is_a_document_or_one_line(record: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "w.jsonl").write_text(json.dumps(record))
        try:
            (document,) = read(Path(folder), "w.jsonl")
        except DdkError as problem:
            assert "w.jsonl:1: " in str(problem) and "\n" not in str(problem)
        else:
            assert document.digest
