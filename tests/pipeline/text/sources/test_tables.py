from __future__ import annotations

import csv
import datetime
import decimal
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import read, texts

from ddk_pipe.pipeline.errors import DdkError

CELLS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=5), st.sampled_from([("w.csv", ","), ("w.tsv", "\t")])
)
def test_delimited_files_give_back_what_was_written(
    rows: list[tuple[str, ...]], as_: tuple[str, str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder, as_[0]), "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=as_[1], quoting=csv.QUOTE_ALL)
            writer.writerows([("id", "text", "more"), *rows])
        assert texts(Path(folder), as_[0]) == [row[1] for row in rows]


def test_a_long_field_and_where_a_row_begins(tmp_path: Path) -> None:
    long = "ebb\n" * 300_000
    (tmp_path / "w.csv").write_text(f'body,id\n"{long}",1\n\nflow,2\n')
    first, second = read(tmp_path, "w.csv", text_field="body")
    assert (first.text, second.text) == (long, "flow")
    assert first.where.endswith("w.csv:2") and second.where.endswith("w.csv:300004")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("id,body\n1,ebb\n", r"w\.csv: column 'text' is not there \(columns: id, body\)"),
        ("id;text\n1;ebb\n", r"w\.csv: column 'text' is not there \(columns: id;text\)"),
        ("text,text\n1,ebb\n", r"w\.csv: column 'text' is twice"),
        ("text,messages\n1,ebb\n", r"w\.csv: a column 'messages'"),
        ("id,text\n1,ebb\n2,ebb, flow\n", r"w\.csv:3: 3 fields, and the header names 2 columns"),
        ('id,text\n1,ebb\n2,"ebb\n', r"w\.csv:3: not a table's row"),
        ('id,text\n1,"ebb"s\n', r"w\.csv:2: not a table's row"),
        ("id,text\n1,ebb\udce9\n", r"w\.csv:2: not UTF-8 \(byte 5\)"),
    ],
)
def test_tables_that_do_not_fit_are_one_line(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "w.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DdkError, match=expected):
        read(tmp_path, "w.csv")


def latin() -> pa.Array:
    """Three strings of which the last is Latin-1: Arrow's writers do not look."""
    data = pa.array([b"ebb", b"flow", b"\xe9b"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 3, data.buffers())


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["ebb", "flow"]).dictionary_encode(),
        pa.array(["ebb", "flow"], pa.large_string()),
        pa.array(["ebb", "flow"], pa.string_view()),
    ],
    ids=["dictionary", "large", "view"],
)
def test_every_type_of_string_is_text(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "w.parquet")
    assert texts(tmp_path, "w.parquet") == ["ebb", "flow"]


def chat(value: Any) -> pa.Table:
    return pa.table({"messages": [[{"role": "user", "content": "ebb?", "at": value}]]})


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (pa.table({"text": latin()}), r"w\.parquet: row 3: a string that is not UTF-8"),
        (pa.table({"text": [b"ebb"]}), r"w\.parquet: row 1: field 'text' is of type bytes"),
        (pa.table({"text": [1.5]}), r"w\.parquet: row 1: field 'text' is of type float"),
        (pa.table({"text": ["ebb", None]}), r"w\.parquet: row 2: no field 'text' with text"),
        (pa.table({"body": ["ebb"]}), r"w\.parquet: no column 'text' \(columns: body\)"),
        (pa.table([["ebb"], ["flow"]], ["text", "text"]), r"w\.parquet: column 'text' is there twice"),
        (chat(datetime.datetime(2024, 1, 1)), r"w\.parquet: row 1: messages holds a value of type datetime"),
        (chat(datetime.date(2024, 1, 1)), r"w\.parquet: row 1: messages holds a value of type date"),
        (chat(decimal.Decimal("1.50")), r"w\.parquet: row 1: messages holds a value of type Decimal"),
        (chat(b"ebb"), r"w\.parquet: row 1: messages holds a value of type bytes"),
    ],
)
def test_what_parquet_may_hold_and_text_not_names_the_row(
    tmp_path: Path, table: pa.Table, expected: str
) -> None:
    pq.write_table(table, tmp_path / "w.parquet")
    with pytest.raises(DdkError, match=expected):
        read(tmp_path, "w.parquet")


def test_the_row_is_counted_over_batches(tmp_path: Path) -> None:
    words = pa.concat_arrays([pa.array(["ebb"] * 1000), latin()])
    pq.write_table(pa.table({"text": words}), tmp_path / "w.parquet")
    with pytest.raises(DdkError, match="row 1003: a string"):
        read(tmp_path, "w.parquet")


def test_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["ebb"] * 100}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for damaged in (whole[:-9], whole[:8], whole[:20] + bytes(20) + whole[40:], whole[:4] + whole[-4:]):
        (tmp_path / "w.parquet").write_bytes(damaged)
        with pytest.raises(DdkError, match=r"w\.parquet: ") as caught:
            read(tmp_path, "w.parquet")
        assert "\n" not in str(caught.value)
