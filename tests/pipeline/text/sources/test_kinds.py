"""A file is what it holds: whatever its name, records are read as records, and what is no text is refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather
from reading import read, texts

from ddk_pipe.pipeline.errors import DdkError

WORDS = ["ebb", 'said "flow"\nand sank', "二, zwei\ttwo"]
LINES = "".join(json.dumps({"text": word}) + "\n" for word in WORDS).encode()
INDENTED = json.dumps({"text": "ebb"}, indent=2).encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": WORDS}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "w.JSONL",
        "w.NdJson",
        "w.jsonlines",
        "w.jsonl.txt",
        "w.jsonl-00003-of-00007",
        "part-00003",
        "w",
        "w.md",
        "w.csv",
        "w.json",
        "w.JSON.BAK",
        "w.gz",
        "w.jsonl.zst",
    ],
)
def test_json_lines_are_records_under_every_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\n" + LINES)
    assert texts(tmp_path, name) == WORDS


@pytest.mark.parametrize("name", ["w.PARQUET", "w.pq", "part-00003", "w.jsonl", "w.txt"])
def test_parquet_is_parquet_under_every_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(parquet())
    assert texts(tmp_path, name) == WORDS


PACKERS: list[Callable[[bytes], bytes]] = [
    gzip.compress,
    bz2.compress,
    lzma.compress,
    zstandard.compress,
    lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
    lambda data: bytes(pa.compress(data, codec="lz4", asbytes=True)),
]


@pytest.mark.parametrize("number", range(len(PACKERS)))
@pytest.mark.parametrize("name", ["w.jsonl", "w.JSONL.GZ", "w", "w.zst", "w.txt"])
def test_packing_is_told_by_content(tmp_path: Path, name: str, number: int) -> None:
    (tmp_path / name).write_bytes(PACKERS[number](LINES))
    assert texts(tmp_path, name) == WORDS
    (tmp_path / name).write_bytes(PACKERS[number](LINES * 500)[:50])
    with pytest.raises(DdkError, match=f"{name}: cannot be read"):
        read(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("w.json", b"[" + LINES.strip().replace(b"\n", b",\n") + b"]", WORDS),
        ("w.jsonl", b"[\n" + LINES.strip().replace(b"\n", b",\n") + b"\n]", WORDS),
        ("w.txt", b'[{"text": "ebb"}]', ["ebb"]),
        ("w.json", INDENTED + b"\n" + INDENTED, ["ebb", "ebb"]),
        ("w", INDENTED, ["ebb"]),
        ("w.json", b"[]", []),
        ("w.c", b"{ int ebb; }\n", ["{ int ebb; }\n"]),  # and what only looks like JSON is text
        ("w.txt", b"[1] A. Smith, Tides\n", ["[1] A. Smith, Tides\n"]),
        ("w.txt", b"[ebb]\n", ["[ebb]\n"]),
        ("w.txt", b"\xef\xbb\xbfebb", ["ebb"]),
        ("w.jsonl", b"\xef\xbb\xbf" + LINES, WORDS),
        ("w.txt", b" \n", []),
    ],
)
def test_json_over_several_lines_and_text(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path, name) == expected


def archive(write: Callable[[io.BytesIO], object]) -> bytes:
    sink = io.BytesIO()
    write(sink)
    return sink.getvalue()


def tar(sink: io.BytesIO) -> None:
    with tarfile.open(fileobj=sink, mode="w") as file:
        file.addfile(tarfile.TarInfo("w.txt"))


REFUSED = {
    "an Arrow IPC": archive(
        lambda sink: feather.write_feather(pa.table({"text": WORDS}), sink, compression="uncompressed")
    ),
    "a ZIP archive": archive(lambda sink: zipfile.ZipFile(sink, "w").writestr("w.txt", "ebb")),
    "a tar archive": archive(tar),
    "safetensors": safetensors.numpy.save({"ebb": np.zeros(2)}),
    "a NumPy array": archive(lambda sink: np.save(sink, np.zeros(2))),
    "a Python pickle": pickle.dumps({"text": "ebb"}),
    "a PDF": b"%PDF-1.7\nebb",
    "an image": b"\x89PNG\r\n\x1a\n",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "UTF-16 text": "ebb".encode("utf-16"),
    "UTF-32 text": "ebb".encode("utf-32"),
    ":2: a NUL byte": b"ebb\nfl\0ow",
    ":2: not UTF-8 \\(byte 2\\)": "ebb\nfölow".encode("latin-1").replace(b"f", b"of"),
    "Parquet inside another compression": gzip.compress(parquet()),
    "gzip inside another compression": gzip.compress(gzip.compress(LINES)),
    "begins like a table with the columns id, text": b'id,text\n1,"ebb"\n',
    ":2: not JSON": LINES.splitlines(keepends=True)[0] + b"as the example shows\n",
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["w.txt", "w"])
def test_what_is_neither_text_nor_records_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(REFUSED[kind])
    with pytest.raises(DdkError, match=rf"{name}(: )?{kind}"):
        read(tmp_path, name)


@pytest.mark.parametrize("content", [b"", b"ebb", LINES])
def test_what_is_called_parquet_must_be(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.parquet").write_bytes(content)
    with pytest.raises(DdkError, match=r"w\.parquet: not Parquet \(it does not begin"):
        read(tmp_path, "w.parquet")


MAGIC = [
    b"",
    b"PAR1",
    b"\x1f\x8b\x08",
    b"\x28\xb5\x2f\xfd",
    b"BZh91AY&SY",
    b"\xfd7zXZ\x00",
    b"\x04\x22\x4d\x18",
]
STARTS = [*MAGIC, b"{", b'{"text": ', b"[", b'text,id\n"', b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04"]
NAMES = ["w.txt", "w", "w.jsonl", "w.json", "w.parquet", "w.csv", "w.TSV", "w.csv.gz", "w-0001"]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(STARTS), st.binary(max_size=60), st.sampled_from(NAMES), st.booleans())
def test_no_content_under_no_name_is_a_traceback(start: bytes, rest: bytes, name: str, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = start + rest
        Path(folder, name).write_bytes(gzip.compress(content) if packed else content)
        try:
            found = read(Path(folder), name)
        except DdkError as problem:
            assert name in str(problem) and "\n" not in str(problem)
        else:
            assert all(document.text is not None for document in found)
