from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from reading import project, read
from tiny import write_jsonl

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Domain
from ddk_pipe.pipeline.text import Document, documents, find_files

ROWS = [{"text": "eins"}, {"text": "zwei 二"}, {"text": "drei\n"}]


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", ROWS).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(plain))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(plain))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst", "a.parquet"):
        assert [document.text for document in read(tmp_path, name)] == [row["text"] for row in ROWS], name


def test_plain_files_are_a_document_each_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"d"))
    assert [document.text for document in read(tmp_path, "*.txt", "sub/*.md", "d.txt.gz")] == [
        "a.txt",
        "b.txt",
        "sub/c.md",
        "d",
    ]


def test_other_field_names_and_where(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}])
    (document,) = read(tmp_path, "a.jsonl", text_field="body")
    assert document.text == "x" and document.where.endswith("a.jsonl:1")


def test_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}, {"messages": chat[::-1]}])
    first, second = read(tmp_path, "a.jsonl")
    assert first.messages == chat and first.text is None
    assert first.digest != second.digest


def test_reading_streams(tmp_path: Path) -> None:
    """A bad line far down is met only when reading gets there."""
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5000)) + "not json\n"
    (tmp_path / "a.jsonl").write_text(rows)
    domain = Domain(train=["a.jsonl"])
    stream = documents(project(tmp_path), domain, domain.train, field="f")
    assert [next(stream).text for _ in range(5000)][-1] == "row 4999"
    with pytest.raises(DdkError, match=r"a\.jsonl:5001: not JSON"):
        next(stream)


def test_hugging_face_dataset_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train-00000-of-00001.parquet")
    assert datasets.__version__
    found = read(tmp_path, {"dataset": "data", "split": "train"})
    assert [document.text for document in found] == [row["text"] for row in ROWS]
    with pytest.raises(DdkError, match="cannot be opened"):
        read(tmp_path, {"dataset": "data", "split": "no-such-split"})


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    """Below it too, in order; not for what a dot hides, and not for the folder that the output goes to."""
    for name in ("notes/b.md", "notes/a.txt", "notes/deep/c.py", "notes/.git/config", "notes/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [document.text for document in read(tmp_path, "notes")]
    assert found == ["notes/a.txt", "notes/b.md", "notes/deep/c.py"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DdkError, match=r"no file .*empty"):
        find_files(project(tmp_path), ["empty"], field="f")
    with pytest.raises(DdkError, match="is a folder that holds the output too"):
        find_files(project(tmp_path), ["."], field="f")


def test_a_digest_depends_on_content_only() -> None:
    assert Document("a:1", "same").digest == Document("b:9", "same").digest
    assert Document("a:1", "same").digest != Document("a:1", "other").digest
    chat = [{"role": "user", "content": "same"}]
    assert Document("a:1", messages=chat).digest != Document("a:1", messages=chat, tools=[{}]).digest
