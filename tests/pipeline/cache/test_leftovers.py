"""What lies beside the shards: named, and removed only where nobody can need it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from caches import Content, corrupt_data, holds, some_shard, without

from ddk_pipe.pipeline.cache import verify
from ddk_pipe.pipeline.cache.leftovers import STALE_SECONDS
from ddk_pipe.pipeline.storage import Folder, LocalFolder


@pytest.mark.slow
def test_groups_of_writers_that_lost_or_died(cache: Folder, content: Content) -> None:
    """One of a sound shard goes; one of a shard that is not committed may be about to be."""
    shard, _ = some_shard(cache)
    other, other_group = some_shard(cache, "plays")
    lost = f"{shard.name}.0badcafe.zarr"
    cache.write(f"{lost}/zarr.json", b"{}")
    cache.remove(other.record)
    report = verify(cache)
    assert [(item.name, item.removable) for item in report.leftovers] == [(lost, True), (other_group, False)]
    assert not report.foreign
    assert verify(cache, repair=True).removed == [lost]
    assert holds(cache) == without(content, other.record)


def test_a_group_of_a_bad_shard_stays(disk: LocalFolder) -> None:
    """Its shard will have no record after the repair, so that a writer may commit it."""
    shard, group = some_shard(disk)
    corrupt_data(disk, shard, group)
    lost = f"{shard.name}.0badcafe.zarr"
    disk.write(f"{lost}/zarr.json", b"{}")
    assert set(verify(disk, repair=True).removed) == {shard.record, group}
    assert disk.exists(f"{lost}/zarr.json")


FOREIGN = ["README.md", "code/notes.txt", "code/train/99999.json", "code/train/99999.01234567.zarr/zarr.json"]
FOREIGN += ["new/ranks.npy", "new/train/00000.json", "code/train/00000.json.bak", "code/train/0000x.json"]


def test_what_is_not_ours_stays(disk: LocalFolder) -> None:
    """Shards that disk.json does not list may be another writer's work of an hour."""
    for name in FOREIGN:
        disk.write(name, b"mine")
    report = verify(disk, repair=True)
    assert report.sound and report.foreign == sorted(FOREIGN) and not report.removed
    assert all(disk.exists(name) for name in FOREIGN)


def age(path: Path, seconds: float) -> None:
    for part in [path, *path.rglob("*")]:
        os.utime(part, (time.time() - seconds,) * 2)


def test_partials_of_living_writers_stay(disk: LocalFolder, content: Content) -> None:
    scratch = [disk.scratch(), disk.scratch()]
    for folder in scratch:
        (folder / "00000.01234567.zarr").mkdir()
        (folder / "00000.01234567.zarr" / "zarr.json").write_bytes(b"{")
    files = [
        disk.path / "code" / ".ranks.npy.0a0a0a0a.partial",
        disk.path / "code" / "train" / ".00000.json.1b1b1b1b.partial",
    ]
    for file in files:
        file.write_bytes(b"{")
    not_ours = disk.path / "code" / ".hidden.partial"
    not_ours.write_bytes(b"")
    for path in (scratch[0], files[0], not_ours):
        age(path, STALE_SECONDS + 60)
    age(scratch[1], STALE_SECONDS + 60)
    (scratch[1] / "00000.01234567.zarr" / "zarr.json").write_bytes(b"{ still at it")
    stale = {path.relative_to(disk.path).as_posix() for path in (scratch[0], files[0])}
    report = verify(disk)
    assert report.sound and len(report.leftovers) == 4
    assert {item.name for item in report.leftovers if item.removable} == stale
    assert set(verify(disk, repair=True).removed) == stale
    assert scratch[1].exists() and files[1].exists() and not_ours.exists()
    assert not scratch[0].exists() and not files[0].exists()
