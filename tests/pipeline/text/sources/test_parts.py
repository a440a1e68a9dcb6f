"""Sources cut into parts: the same documents, each once and in order, whatever the sizes."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import project, read

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Domain
from ddk_pipe.pipeline.text import Part, cut_into_parts
from ddk_pipe.pipeline.text.sources import parts

DOMAIN = Domain.model_validate({"train": ["*"]})


def cut(root: Path, *names: str) -> list[Part]:
    return list(cut_into_parts(project(root), list(names), text_field="text", field="f"))


def small(monkeypatch: pytest.MonkeyPatch, first: int, most: int) -> None:
    monkeypatch.setattr(parts, "FIRST_BYTES", first)
    monkeypatch.setattr(parts, "MOST_BYTES", most)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 60), max_size=6), min_size=1, max_size=4),
    st.integers(1, 90),
    st.integers(0, 3),
    st.booleans(),
)
def test_every_document_once_and_in_order(
    tmp_path: Path, files: list[list[int]], first: int, doublings: int, ends: bool
) -> None:
    """Lines of all lengths, blank ones, files without a line end at the end; line numbers are those of the file."""
    for old in tmp_path.iterdir():
        old.unlink()
    for number, lengths in enumerate(files):
        lines = [
            json.dumps({"text": f"{at}" + "é" * length}, ensure_ascii=False)
            for at, length in enumerate(lengths)
        ]
        text = "\n\n".join(lines) + ("\n" if ends else "")
        (tmp_path / f"{number}.jsonl").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        small(patch, 1 << 30, 1 << 30)
        whole = read(tmp_path, "*.jsonl")
        assert len(cut(tmp_path, "*.jsonl")) == 1
        small(patch, first, first << doublings)
        assert [(one.where, one.text) for one in read(tmp_path, "*.jsonl")] == [
            (one.where, one.text) for one in whole
        ]
        stretches = [stretch for part in cut(tmp_path, "*.jsonl") for stretch in part]
    sizes = {path: path.stat().st_size for path in tmp_path.iterdir()}
    assert sum(stretch.size for stretch in stretches) == sum(sizes.values())
    for one, other in pairwise(stretches):
        assert one.source != other.source or one.last == other.first


def test_parts_begin_small_and_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 1000, 8000)
    line = json.dumps({"text": "x" * 80}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 500)
    sizes = [sum(stretch.size for stretch in part) for part in cut(tmp_path, "a.jsonl")]
    for size, wanted in zip(sizes[:-1], [1000, 2000, 4000, *[8000] * 9], strict=False):
        assert wanted <= size < wanted + len(line)
    assert len(sizes) > 6


def test_small_files_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 1000, 1000)
    for number in range(100):
        (tmp_path / f"{number:03d}.txt").write_text("y" * 99)
    found = cut(tmp_path, "*.txt")
    assert [len(part) for part in found] == [11] * 9 + [1]
    assert all(stretch.last is None for part in found for stretch in part)


def test_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = random.Random(0)
    rows = [f"{drawn.random()}" * 20 for _ in range(300)]
    pq.write_table(pa.table({"text": rows, "other": rows}), tmp_path / "a.parquet", row_group_size=7)
    small(monkeypatch, 3000, 3000)
    found = cut(tmp_path, "a.parquet")
    assert len(found) > 5 and found[0][0].first == 0
    assert sum(stretch.size for part in found for stretch in part) == (tmp_path / "a.parquet").stat().st_size
    assert [(one.where, one.text) for one in read(tmp_path, "a.parquet")] == [
        (f"{tmp_path / 'a.parquet'}: row {number}", text) for number, text in enumerate(rows, 1)
    ]


def test_what_is_packed_or_no_list_of_lines_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, 100, 100)
    lines = "".join(json.dumps({"text": f"{number} words"}) + "\n" for number in range(400))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.csv").write_text("text\n" + "some words\n" * 100)
    (tmp_path / "c.json").write_text(json.dumps([{"text": "z" * 300}]))
    (tmp_path / "d.txt").write_text("word\n" * 100)
    assert [stretch.last for part in cut(tmp_path, "*") for stretch in part] == [None] * 4
    assert len(read(tmp_path, "*")) == 400 + 100 + 1 + 1


def test_the_line_of_an_error_in_a_later_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 100, 100)
    lines = [json.dumps({"text": f"{number} words"}) for number in range(400)]
    lines[317] = "nonsense"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DdkError, match=r"a\.jsonl:318: not JSON"):
        read(tmp_path, "a.jsonl")
