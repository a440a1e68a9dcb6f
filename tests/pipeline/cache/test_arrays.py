from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache.arrays import Expected, ShardReader, learnt_of, write_group
from ddk_pipe.pipeline.cache.metadata import parse_width
from ddk_pipe.pipeline.storage import LocalFolder, settle_writes

WINDOWS = 5
RNG = np.random.default_rng(0)
ARRAYS: dict[str, NDArray[Any]] = {
    "tokens": RNG.integers(0, 60_000, (WINDOWS, 40), dtype=np.uint16),
    "t0/gaps": RNG.integers(0, 1 << 31, (WINDOWS, 17), dtype=np.uint32),
    "t0/codes": RNG.integers(0, 256, (WINDOWS, 1), dtype=np.uint8),
    "t0/zeros": np.zeros((WINDOWS, 3000), np.uint16),
}
EXPECTED = {name: Expected(values.dtype, 1, 3000) for name, values in ARRAYS.items()}
SHARD = Path("g.zarr/tokens/c/0/0")


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    write_group(tmp_path / "g.zarr", {"": {"shard": 1}, "t0": {"temperature": 1.0}}, ARRAYS)
    return LocalFolder(tmp_path)


def sizes(folder: LocalFolder) -> dict[str, int]:
    return {name.removeprefix("g.zarr/"): folder.size(name) for name in folder.names("g.zarr/")}


def reader(folder: LocalFolder, **changes: Any) -> ShardReader:
    values: dict[str, Any] = {"windows": WINDOWS, "files": sizes(folder), "expected": EXPECTED, **changes}
    return ShardReader(folder, "g.zarr", **values)


def test_our_reader_and_plain_zarr_read_what_zarr_wrote(folder: LocalFolder) -> None:
    opened: Any = zarr.open_group(folder.path / "g.zarr", mode="r")
    assert opened.attrs["shard"] == 1 and opened["t0"].attrs["temperature"] == 1.0
    shard = reader(folder)
    for row in range(WINDOWS):
        got = shard.read(row)
        for name, values in ARRAYS.items():
            assert got[name].dtype == values.dtype and np.array_equal(got[name], values[row])
            assert np.array_equal(opened[name][row], values[row])
    checks = list(shard.checks().values())
    known = reader(folder, checks=shard.checks())
    assert learnt_of(list(known.places().values()), checks) == known.learnt
    with pytest.raises(IndexError):
        shard.read(WINDOWS)
    with pytest.raises(IndexError):
        shard.read(-1)


def test_checks_are_those_of_the_chunks(folder: LocalFolder) -> None:
    checks = reader(folder).checks()
    reader(folder, checks=checks).read(2)
    other = {name: values[::-1] for name, values in checks.items()}
    with pytest.raises(ValueError, match="row 0 fails its checksum"):
        reader(folder, checks=other).read(0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.zeros((2, 3), np.int64), "int64"),
        (np.zeros((2, 3), ">u2"), "cannot be written"),
        (np.zeros(3, np.uint8), "cannot be written"),
        (np.zeros((2, 0), np.uint8), "cannot be written"),
    ],
)
def test_arrays_that_could_not_be_read_are_not_written(tmp_path: Path, values: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        write_group(tmp_path / "g", {"": {}}, {"x": values})
    assert not (tmp_path / "g").exists()


# --- metadata: exactly ours or refused ------------------------------------------------------------


def edit(change: Callable[[dict[str, Any]], object], folder: LocalFolder) -> bytes:
    values = json.loads(folder.read("g.zarr/tokens/zarr.json"))
    change(values)
    return json.dumps(values).encode()


def inner(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = values["codecs"][0]["configuration"]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(node_type="group"),
        lambda v: v.update(zarr_format=2),
        lambda v: v.update(shape=[WINDOWS, 40, 1]),
        lambda v: v.update(shape=[WINDOWS + 1, 40]),
        lambda v: v.update(shape=[WINDOWS, "40"]),
        lambda v: v.update(shape=[WINDOWS, 41]),
        lambda v: v.update(data_type="int16"),
        lambda v: v.update(data_type="float64"),
        lambda v: v.update(fill_value=1),
        lambda v: v.update(storage_transformers=[{"name": "x"}]),
        lambda v: v.update(extra=1),
        lambda v: v["chunk_grid"]["configuration"].update(chunk_shape=[1, 40]),
        lambda v: v["chunk_key_encoding"]["configuration"].update(separator="."),
        lambda v: inner(v)["codecs"].pop(),
        lambda v: inner(v)["codecs"].insert(0, {"name": "transpose", "configuration": {"order": [1, 0]}}),
        lambda v: inner(v)["codecs"].__setitem__(1, {"name": "numcodecs.pickle"}),
        lambda v: inner(v)["codecs"][1]["configuration"].update(cname="lz4"),
        lambda v: inner(v)["codecs"][1]["configuration"].update(typesize=4),
        lambda v: inner(v)["index_codecs"].pop(),
        lambda v: inner(v).update(index_location="start"),
        lambda v: inner(v).update(chunk_shape=[WINDOWS, 40]),
        lambda v: v["codecs"].append({"name": "zstd"}),
        lambda v: v.clear(),
    ],
)
def test_any_other_array_is_refused(folder: LocalFolder, change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        parse_width(edit(change, folder), WINDOWS, np.dtype("u2"), name="tokens")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"shape": 3}'])
def test_metadata_that_is_something_else(content: bytes) -> None:
    with pytest.raises(ValueError, match="not the metadata"):
        parse_width(content, WINDOWS, np.dtype("u2"), name="x")


def test_compression_level_is_the_writers_choice(folder: LocalFolder) -> None:
    content = edit(lambda v: inner(v)["codecs"][1]["configuration"].update(clevel=9), folder)
    assert parse_width(content, WINDOWS, np.dtype("u2"), name="x") == 40


def test_a_huge_width_is_refused_before_anything_is_allocated(folder: LocalFolder) -> None:
    def widen(values: dict[str, Any]) -> None:
        width = 1 << 50
        values["shape"][1] = values["chunk_grid"]["configuration"]["chunk_shape"][1] = width
        inner(values)["chunk_shape"][1] = width

    (folder.path / "g.zarr/tokens/zarr.json").write_bytes(edit(widen, folder))
    with pytest.raises(ValueError, match="values a window, expected 1 to 3000"):
        reader(folder)


# --- the shard file: with checksums that fit, as a stranger would make them -----------------------


def with_crc(content: bytes) -> bytes:
    return content + struct.pack("<I", google_crc32c.value(content))


def build(folder: LocalFolder, chunks: list[bytes], index: list[tuple[int, int]] | None = None) -> None:
    """A shard of these chunks (their crc32c included)."""
    starts = np.cumsum([0, *map(len, chunks)]).tolist()
    entries = index or [(start, len(chunk)) for start, chunk in zip(starts, chunks, strict=False)]
    table = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    (folder.path / SHARD).write_bytes(b"".join(chunks) + with_crc(table))


def good(row: int) -> bytes:
    return bytes(numcodecs.blosc.compress(ARRAYS["tokens"][row], b"zstd", 5, numcodecs.blosc.SHUFFLE))


def header(content: bytes, at: int, value: int) -> bytes:
    """The blosc header with another 32-bit field."""
    return content[:at] + struct.pack("<I", value) + content[at + 4 :]


def test_a_shard_built_by_hand_is_read(folder: LocalFolder) -> None:
    build(folder, [with_crc(good(row)) for row in range(WINDOWS)])
    assert np.array_equal(reader(folder).read(3)["tokens"], ARRAYS["tokens"][3])


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (header(good(0), 4, 1 << 30), "unpacks to 1073741824 bytes, expected 80"),  # a bomb
        (header(good(0), 4, 8), "unpacks to 8 bytes, expected 80"),
        (header(good(0), 12, 9), "unpacks to"),
        (bytes([2, 1, 0x21, 4]) + good(0)[4:], "unpacks to"),
        (bytes([2, 1, 0x21, 2]) + good(0)[4:], "not compressed by zstd"),
        (good(0)[:16] + bytes(len(good(0)) - 16), "row 0: "),
        (header(good(0), 8, 1 << 31), "row 0: "),
        (header(good(0), 8, 0), "row 0: "),
    ],
)
def test_chunks_that_lie_about_themselves(folder: LocalFolder, bad: bytes, expected: str) -> None:
    build(folder, [with_crc(bad), *(with_crc(good(row)) for row in range(1, WINDOWS))])
    try:
        got = reader(folder).read(0)["tokens"]
    except ValueError as problem:
        assert expected in str(problem) and "tokens/c/0/0" in str(problem)
    else:  # blosc found some meaning in it: right size, other values, and the commit record's checksum would tell
        assert got.nbytes == 80


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (((1 << 64) - 1, (1 << 64) - 1), "row 0 is missing"),
        ((1 << 40, 50), "points outside"),
        (((1 << 64) - 20, 50), "points outside"),
        ((0, 1 << 40), "points outside"),
        ((0, 5), "points outside"),
        ((0, 0), "points outside"),
    ],
)
def test_index_entries_that_cannot_be(folder: LocalFolder, entry: tuple[int, int], expected: str) -> None:
    chunks = [with_crc(good(row)) for row in range(WINDOWS)]
    build(folder, chunks, [entry, *((0, len(chunks[0])) for _ in range(WINDOWS - 1))])
    with pytest.raises(ValueError, match=expected):
        reader(folder)


def test_damage(folder: LocalFolder) -> None:
    path = folder.path / SHARD
    content = path.read_bytes()
    path.write_bytes(content[:-10] + bytes([content[-10] ^ 4]) + content[-9:])
    with pytest.raises(ValueError, match="the index fails its checksum"):
        reader(folder)
    path.write_bytes(bytes([content[0] ^ 4]) + content[1:])
    with pytest.raises(ValueError, match="row 0 fails its checksum"):
        reader(folder).read(0)
    path.write_bytes(content[:30])
    with pytest.raises(ValueError, match="too short for an index"):
        reader(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        reader(LocalFolder(folder.path), files={**sizes(folder), "tokens/c/0/0": len(content)})


def test_writers_that_fail_at_the_same_time_do_not_wait_for_each_other() -> None:
    def settle_often() -> None:
        for _ in range(100):
            settle_writes()

    threads = [threading.Thread(target=settle_often, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
