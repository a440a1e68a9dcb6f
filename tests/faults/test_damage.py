"""Damage of every kind: an error that names the file and the way back; after repair and refill nothing is missing.

What reading alone makes of a damaged file, case by case, is in tests/pipeline/cache/test_reader.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from caches import fill, group_path, resealed
from faults import FIRST, SECOND, Judge, flip, rechunk, reseal_record, small_spec, swap

from ddk_pipe.pipeline.cache import CacheReader, CacheWriter, SplitSize, read_spec, verify
from ddk_pipe.pipeline.cache.record import read_record
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.text import TRAIN


def chunks(folder: LocalFolder, array: str = "tokens") -> Path:
    """The shard file of an array of the first shard."""
    return group_path(folder, FIRST) / array / "c" / "0" / "0"


def zero_second_half(folder: LocalFolder) -> None:
    content = chunks(folder).read_bytes()
    half = len(content) // 2
    chunks(folder).write_bytes(content[:half] + bytes(len(content) - half))


def swap_files(folder: LocalFolder) -> None:
    """Arrays of one size, all of whose own checksums are right."""
    swap(chunks(folder, "labels"), group_path(folder, SECOND) / "labels" / "c" / "0" / "0")


def swap_windows(folder: LocalFolder) -> None:
    for array in (
        "tokens",
        "labels",
        *(f"t0/{name}" for name in ("heads", "draws", "octaves", "bits", "codes")),
    ):
        rechunk(folder, FIRST, array, lambda bodies: bodies[::-1])


def swap_windows_of_one_array(folder: LocalFolder) -> None:
    rechunk(folder, FIRST, "t0/codes", lambda bodies: bodies[::-1])


def repeat_window(folder: LocalFolder) -> None:
    for array in (
        "tokens",
        "labels",
        *(f"t0/{name}" for name in ("heads", "draws", "octaves", "bits", "codes")),
    ):
        rechunk(folder, FIRST, array, lambda bodies: [bodies[0], bodies[0]])


def copy_group(folder: LocalFolder) -> None:
    target = group_path(folder, FIRST)
    shutil.rmtree(target)
    shutil.copytree(group_path(folder, SECOND), target)


def copy_group_and_record(folder: LocalFolder) -> None:
    """A duplicate under another number, as a careless copy makes it."""
    record = json.loads((folder.path / SECOND.record).read_text())
    (folder.path / FIRST.record).write_bytes(resealed({**record, "number": 0, "first_window": 0}))
    group = folder.path / "code" / TRAIN / record["group"]
    shutil.copytree(group, group.with_name(record["group"].replace("00001.", "00000.")))


def renumbered(folder: LocalFolder) -> None:
    """The same, with a record that names the copy: only the window numbers inside the data tell."""
    copy_group_and_record(folder)
    path = folder.path / FIRST.record
    values = json.loads(path.read_text())
    path.write_bytes(resealed({**values, "group": values["group"].replace("00001.", "00000.")}))


def other_teachers_shard(folder: LocalFolder) -> None:
    other = LocalFolder(folder.path.parent / "other")
    fill(other, small_spec(teacher={"weights_digest": "other", "dtype": "float32"}))
    shutil.copytree(group_path(other, FIRST), folder.path / "code" / TRAIN / group_path(other, FIRST).name)
    shutil.copy(other.path / FIRST.record, folder.path / FIRST.record)


def edit(folder: LocalFolder, change: Callable[[str], str], *, reseal: bool = False) -> None:
    path = group_path(folder, FIRST) / "t0" / "heads" / "zarr.json"
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    if reseal:
        reseal_record(folder, FIRST)


def resize_by_zarr(folder: LocalFolder) -> None:
    array: Any = zarr.open_array(group_path(folder, FIRST) / "tokens", mode="r+")
    array.resize((3, 12))


def write_by_zarr(folder: LocalFolder) -> None:
    """Every checksum inside the file is right afterwards."""
    array: Any = zarr.open_array(group_path(folder, FIRST) / "tokens", mode="r+")
    array[0, 0] = (int(array[0, 0]) + 1) % 90


def missing_chunk(folder: LocalFolder) -> None:
    """An index that says the second window was never written: fill values, to plain zarr."""
    import google_crc32c

    content = chunks(folder).read_bytes()
    index = content[-36:-20] + b"\xff" * 16
    chunks(folder).write_bytes(content[:-36] + index + google_crc32c.value(index).to_bytes(4, "little"))


def file_in_place_of_folder(folder: LocalFolder) -> None:
    path = group_path(folder, FIRST)
    shutil.rmtree(path)
    path.write_text("x")


def folder_in_place_of_file(folder: LocalFolder) -> None:
    chunks(folder).unlink()
    chunks(folder).mkdir()


def link_to_itself(folder: LocalFolder) -> None:
    chunks(folder).unlink()
    chunks(folder).symlink_to(chunks(folder))


def folder_for_a_record(folder: LocalFolder) -> None:
    (folder.path / FIRST.record).unlink()
    (folder.path / FIRST.record).mkdir()


def link_to_nowhere(folder: LocalFolder) -> None:
    chunks(folder).unlink()
    chunks(folder).symlink_to(folder.path / "nowhere")


def extra_file(folder: LocalFolder) -> None:
    (group_path(folder, FIRST) / "zarr.json").unlink()
    (group_path(folder, FIRST) / "zarr.json.bak").write_text("x")


SHARDS: dict[str, Callable[[LocalFolder], object]] = {
    "torn: second half zeros": zero_second_half,
    "truncated by one byte": lambda f: os.truncate(chunks(f), chunks(f).stat().st_size - 1),
    "emptied": lambda f: os.truncate(chunks(f), 0),
    "array file missing": lambda f: chunks(f).unlink(),
    "metadata missing": lambda f: (group_path(f, FIRST) / "t0" / "heads" / "zarr.json").unlink(),
    "group missing": lambda f: shutil.rmtree(group_path(f, FIRST)),
    "chunk missing": missing_chunk,
    "flipped bit in a chunk": lambda f: flip(chunks(f), 5),
    "flipped bit in an index": lambda f: flip(chunks(f), -10),
    "array files swapped between shards": swap_files,
    "shards swapped": lambda f: swap(group_path(f, FIRST), group_path(f, SECOND)),
    "windows swapped, index and all": swap_windows,
    "windows of one array swapped": swap_windows_of_one_array,
    "window duplicated": repeat_window,
    "shard copied over another": copy_group,
    "shard duplicated under another number": copy_group_and_record,
    "shard duplicated, its record made to fit": renumbered,
    "shard of another teacher": other_teachers_shard,
    "dtype edited": lambda f: edit(f, lambda text: text.replace("uint16", "uint32")),
    "dtype edited, digests made to fit": lambda f: edit(
        f, lambda text: text.replace("uint16", "int16"), reseal=True
    ),
    "shape edited": lambda f: edit(f, lambda text: text.replace("12", "11")),
    "shape edited, digests made to fit": lambda f: edit(
        f, lambda text: text.replace("12", "11"), reseal=True
    ),
    "fill value edited, digests made to fit": lambda f: edit(
        f, lambda text: text.replace('"fill_value": 0', '"fill_value": 1'), reseal=True
    ),
    "resized by plain zarr": resize_by_zarr,
    "written to by plain zarr": write_by_zarr,
    "file in place of a folder": file_in_place_of_folder,
    "folder in place of a file": folder_in_place_of_file,
    "link to itself": link_to_itself,
    "link to nowhere": link_to_nowhere,
    "file renamed": extra_file,
    "record emptied": lambda f: os.truncate(f.path / FIRST.record, 0),
    "record cut in half": lambda f: os.truncate(f.path / FIRST.record, 900),
    "record of another shard": lambda f: shutil.copy(f.path / SECOND.record, f.path / FIRST.record),
    "records swapped": lambda f: swap(f.path / FIRST.record, f.path / SECOND.record),
}


def repaired(judge: Judge, folder: LocalFolder) -> None:
    """What the hint of every error says to do."""
    verify(folder, repair=True)
    judge.committed(folder)
    fill(folder, small_spec())
    judge.complete(folder)
    assert verify(folder).sound


@pytest.mark.slow
@pytest.mark.parametrize("damage", SHARDS)
def test_shards(judge: Judge, folder: LocalFolder, damage: str) -> None:
    SHARDS[damage](folder)
    for line in judge.damaged(folder):
        assert ("code/train/0000" in line and f"ddk-pipe verify {folder.name} --repair" in line) or (
            "leads outside" in line
        ), line
    repaired(judge, folder)


def test_a_file_that_has_grown(judge: Judge, folder: LocalFolder) -> None:
    """Reading starts from the committed size, so that it still finds what was committed; verifying notices."""
    chunks(folder).write_bytes(chunks(folder).read_bytes() + b"\0")
    assert judge.committed(folder) == len(judge.windows)
    assert list(verify(folder).bad) == [FIRST.name]
    repaired(judge, folder)


def test_a_record_that_is_gone(judge: Judge, folder: LocalFolder) -> None:
    """An uncommitted shard, no damage: it is made again, and the old group removed."""
    (folder.path / FIRST.record).unlink()
    assert all("not committed" in line for line in judge.damaged(folder))
    fill(folder, small_spec())
    judge.complete(folder)
    assert verify(folder).leftovers == []


TABLES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: os.truncate(path, 0),
    "another permutation": lambda path: np.save(path, np.arange(90, dtype="<i4")),
    "no permutation": lambda path: np.save(path, np.zeros(90, "<i4")),
    "of another dtype": lambda path: np.save(path, np.arange(90, dtype="<i8")),
    "of another vocabulary": lambda path: np.save(path, np.arange(91, dtype="<i4")),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", TABLES)
def test_rank_tables(judge: Judge, folder: LocalFolder, damage: str) -> None:
    TABLES[damage](folder.path / "code" / "ranks.npy")
    assert all("code/ranks.npy" in line for line in judge.damaged(folder))
    repaired(judge, folder)


# --- cache.json -----------------------------------------------------------------------------------


def untouched(folder: LocalFolder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.names()}


def test_a_cache_json_that_is_gone(judge: Judge, folder: LocalFolder) -> None:
    (folder.path / "cache.json").unlink()
    (line,) = judge.damaged(folder)
    assert "no teacher cache; run `ddk-pipe cache-teacher`" in line
    assert not CacheWriter(folder, small_spec()).pending(), "the shards still count"
    judge.complete(folder)


@pytest.mark.parametrize("size", [0, 700])
def test_a_cache_json_cut_off(judge: Judge, folder: LocalFolder, size: int) -> None:
    os.truncate(folder.path / "cache.json", size)
    before = untouched(folder)
    (line,) = judge.damaged(folder)
    assert "cache.json: not JSON; restore it, or make the cache again" in line
    for attempt in (lambda: CacheWriter(folder, small_spec()), lambda: verify(folder, repair=True)):
        with pytest.raises(DdkError, match="restore it"):
            attempt()
    assert untouched(folder) == before


def test_a_stale_cache_json(judge: Judge, folder: LocalFolder) -> None:
    """Put back from before a domain was added: the domain is missing until the next run, its shards are not lost."""
    stale = (folder.path / "cache.json").read_bytes()
    more = {**small_spec().domains, "plays": {TRAIN: SplitSize(2, 2, "digest")}}
    fill(folder, small_spec(domains=more))
    (folder.path / "cache.json").write_bytes(stale)
    judge.complete(folder)
    with pytest.raises(DdkError, match="no plays/train in the cache; run `ddk-pipe cache-teacher`"):
        CacheReader(folder, 1.0).read("plays", TRAIN, 0)
    verify(folder, repair=True)
    assert not CacheWriter(folder, small_spec(domains=more)).pending()
    assert CacheReader(folder, 1.0).read("plays", TRAIN, 0).tokens.shape == (12,)


def test_a_foreign_cache_json(judge: Judge, folder: LocalFolder) -> None:
    """That of another teacher's cache: nothing is read, and no repair throws the shards away."""
    good = (folder.path / "cache.json").read_bytes()
    foreign = small_spec(teacher={"weights_digest": "other", "dtype": "float32"})
    (folder.path / "cache.json").write_bytes(foreign.to_json())
    before = untouched(folder)
    assert all("another cache" in line for line in judge.damaged(folder))
    for repair in (True, False):
        with pytest.raises(DdkError, match=r"cache\.json: not that of the 5 shards beside it; restore it"):
            verify(folder, repair=repair)
    assert untouched(folder) == before
    (folder.path / "cache.json").write_bytes(good)
    judge.complete(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher": {"weights_digest": "other", "dtype": "float32"}}, "weights_digest w there, other here"),
        ({"teacher": {"weights_digest": "w", "dtype": "bfloat16"}}, "dtype float32 there, bfloat16 here"),
        ({"tokenizer_digest": "other"}, "another tokenizer_digest"),
        ({"vocab_size": 91}, "another vocab_size"),
        ({"seq_len": 13}, "another seq_len"),
        ({"tau": 0.03}, "tau 0.02 there, 0.03 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"domains": {"code": {TRAIN: SplitSize(8, 2, "other text")}}}, "cached from other tokens"),
        ({"domains": {"code": {TRAIN: SplitSize(8, 4, "train-digest")}}}, "in other shards"),
    ],
    ids=["weights", "dtype", "tokenizer", "vocabulary", "length", "tau", "seed", "text", "cut"],
)
def test_a_writer_with_other_settings(
    judge: Judge, folder: LocalFolder, changes: dict[str, Any], expected: str
) -> None:
    before = untouched(folder)
    with pytest.raises(DdkError, match=expected):
        fill(folder, small_spec(**changes))
    assert untouched(folder) == before
    judge.complete(folder)


@pytest.mark.parametrize("version", [1, 5, "2", None, True])
def test_another_schema_version(judge: Judge, folder: LocalFolder, version: Any) -> None:
    path = folder.path / "cache.json"
    path.write_bytes(resealed({**json.loads(path.read_bytes()), "schema_version": version}))
    before = untouched(folder)
    (line,) = judge.damaged(folder)
    assert "this program reads 2, 3 and 4; use the ddk-pipe that wrote it" in line
    for attempt in (lambda: CacheWriter(folder, small_spec()), lambda: verify(folder, repair=True)):
        with pytest.raises(DdkError, match="schema version"):
            attempt()
    assert untouched(folder) == before


def test_a_schema_version_of_another_attention(judge: Judge, folder: LocalFolder) -> None:
    """Version 4 is that of documents apart, and this cache says nothing of them: it would be read as whole windows."""
    path = folder.path / "cache.json"
    path.write_bytes(resealed({**json.loads(path.read_bytes()), "schema_version": 4}))
    before = untouched(folder)
    (line,) = judge.damaged(folder)
    assert "cache.json: damaged or edited by hand" in line
    assert untouched(folder) == before


def test_a_record_of_another_schema_version(judge: Judge, folder: LocalFolder) -> None:
    """The fingerprint includes the version, so that a record cannot have another one unnoticed."""
    path = folder.path / FIRST.record
    path.write_bytes(resealed({**json.loads(path.read_bytes()), "fingerprint": "of version 1"}))
    assert all("commit record of another cache" in line for line in judge.damaged(folder))
    repaired(judge, folder)
    assert read_record(folder, FIRST, read_spec(folder)) is not None
