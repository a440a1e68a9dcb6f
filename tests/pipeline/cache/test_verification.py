"""Verifying a cache: each kind of damage is found, and a repair removes that and nothing else."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import Content, corrupt_data, flip, holds, some_shard, without

from ddk_pipe.pipeline.cache import (
    CacheReader,
    CacheSpec,
    Report,
    Shard,
    all_shards,
    committed,
    read_spec,
    verify,
)
from ddk_pipe.pipeline.cache import soundness as cache_soundness
from ddk_pipe.pipeline.cache import verification as cache_verify
from ddk_pipe.pipeline.cache.damage import repair
from ddk_pipe.pipeline.cache.ranks import ranks_bytes, read_ranks
from ddk_pipe.pipeline.cache.record import read_record
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, LocalFolder, durable, open_folder
from ddk_pipe.pipeline.targets import Ranks


@pytest.mark.slow
def test_a_sound_cache(cache: Folder, content: Content) -> None:
    seen: list[tuple[float, str]] = []
    report = verify(cache, advance=lambda windows, name: seen.append((windows, name)))
    assert report.sound and report == verify(cache, repair=True)
    assert not (report.bad or report.missing or report.leftovers or report.foreign or report.removed)
    records = dict(committed(cache, read_spec(cache)))
    splits = report.splits.values()
    assert sum(split.sound for split in splits) == sum(split.shards for split in splits) == len(records)
    for field in ("windows", "positions", "entries", "target_bytes", "input_bytes"):
        assert sum(getattr(s, field) for s in splits) == sum(getattr(r, field) for r in records.values())
    nats = sum(record.label_nats for record in records.values())
    assert sum(split.label_nats for split in splits) == pytest.approx(nats, abs=1e-9)
    assert sum(windows for windows, _ in seen) == sum(shard.windows for shard in records)
    assert json.loads(json.dumps(report.to_dict()))["sound"] is True
    assert holds(cache) == content


def corrupt_metadata(folder: Folder, shard: Shard, group: str) -> None:
    flip(folder, f"{group}/t0/heads/zarr.json")


def truncate(folder: Folder, shard: Shard, group: str) -> None:
    folder.write(f"{group}/labels/c/0/0", folder.read(f"{group}/labels/c/0/0")[:-7])


def lose_a_file(folder: Folder, shard: Shard, group: str) -> None:
    folder.remove(f"{group}/tokens/c/0/0")


def lose_the_group(folder: Folder, shard: Shard, group: str) -> None:
    folder.remove(group)


def edit_a_statistic(folder: Folder, shard: Shard, group: str) -> None:
    values = {**json.loads(folder.read(shard.record)), "entries": 7}
    del values["seal"]
    folder.write(shard.record, durable.to_json({**values, "seal": durable.digest(durable.to_json(values))}))


DAMAGES: list[tuple[Callable[[Folder, Shard, str], None], str]] = [
    (corrupt_data, "t0/octaves/c/0/0: not what was committed"),
    (corrupt_metadata, "t0/heads/zarr.json: not what was committed"),
    (truncate, "labels/c/0/0: not what was committed"),
    (lose_a_file, "tokens/c/0/0: committed but missing"),
    (lose_the_group, "committed but missing"),
    (edit_a_statistic, "its commit record says 7"),
]


@pytest.mark.slow
def test_a_bad_shard_in_an_object_store(s3_url: str, content: Content) -> None:
    cache = open_folder(s3_url)
    for name, part in content.items():
        cache.write(name, part)
    shard, group = some_shard(cache)
    corrupt_data(cache, shard, group)
    assert list(verify(cache).bad) == [shard.name]
    assert verify(cache, repair=True).removed == [shard.record, group]
    assert holds(cache) == without(content, shard.record, group)


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_a_bad_shard_is_named_and_dropped_alone(
    disk: LocalFolder, content: Content, damage: Callable[[Folder, Shard, str], None], expected: str
) -> None:
    shard, group = some_shard(disk)
    damage(disk, shard, group)
    before = holds(disk)
    report = verify(disk)
    assert list(report.bad) == [shard.name] and expected in report.bad[shard.name]
    assert "\n" not in report.bad[shard.name] and not report.sound and not report.removed
    assert holds(disk) == before  # without repair nothing is touched
    repaired = verify(disk, repair=True)
    assert repaired.bad == report.bad
    assert set(repaired.removed) <= {shard.record, group}
    assert holds(disk) == without(content, shard.record, group)
    after = verify(disk, repair=True)
    assert after.missing == [shard.name] and not after.bad and not after.removed


def test_a_damaged_record_is_dropped_and_its_group_left_to_the_next_writer(
    disk: LocalFolder, content: Content
) -> None:
    shard, group = some_shard(disk)
    flip(disk, shard.record)
    report = verify(disk, repair=True)
    assert "damaged commit record" in report.bad[shard.name] and report.removed == [shard.record]
    assert holds(disk) == without(content, shard.record)
    (left,) = verify(disk, repair=True).leftovers
    assert left.name == group and not left.removable
    assert holds(disk) == without(content, shard.record)


def test_records_that_are_missing_are_coverage(disk: LocalFolder) -> None:
    shard, _ = some_shard(disk)
    disk.remove(shard.record)
    report = verify(disk, repair=True)
    split = report.splits["code/train"]
    assert report.missing == [shard.name] and not report.sound and not report.removed
    assert split.committed == split.sound == split.shards - 1


def test_a_file_that_was_never_committed_costs_no_shard(disk: LocalFolder, content: Content) -> None:
    shard, group = some_shard(disk)
    disk.write(f"{group}/t0/extra/zarr.json", b"{}")
    assert "never committed" in verify(disk).bad[shard.name]
    report = verify(disk, repair=True)
    assert report.sound and report.removed == [f"{group}/t0/extra/zarr.json"]
    assert holds(disk) == content


# --- rank tables ----------------------------------------------------------------------------------


def remove_table(folder: Folder, spec: CacheSpec) -> None:
    folder.remove("code/ranks.npy")


def damage_table(folder: Folder, spec: CacheSpec) -> None:
    flip(folder, "code/ranks.npy")


def exchange_table(folder: Folder, spec: CacheSpec) -> None:
    folder.write("code/ranks.npy", ranks_bytes(Ranks.fit(np.arange(spec.vocab_size))))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_table, "code/ranks.npy: missing"),
        (damage_table, "code/ranks.npy: not the table of this cache"),
        (exchange_table, "code/ranks.npy: not the table that the shards of code were coded with"),
    ],
)
def test_a_bad_rank_table_is_reported_once(
    disk: LocalFolder, content: Content, damage: Callable[[Folder, CacheSpec], None], expected: str
) -> None:
    spec = read_spec(disk)
    damage(disk, spec)
    report = verify(disk)
    assert list(report.tables) == ["code"] and expected in report.tables["code"] and not report.bad
    assert report.undecodable == [shard.name for shard in all_shards(spec) if shard.domain == "code"]
    verify(disk, repair=True)
    assert holds(disk) == without(content, "code/")
    after = verify(disk, repair=True)
    assert not after.tables and not after.removed and after.missing == report.undecodable


def test_a_table_that_one_shard_was_not_coded_with(disk: LocalFolder) -> None:
    """Then the shard is wrong, not the table."""
    shard, _ = some_shard(disk)
    record = read_record(disk, shard, read_spec(disk))
    assert record is not None
    disk.write(shard.record, record.model_copy(update={"ranks_digest": "0" * 32}).sealed())
    report = verify(disk, repair=True)
    assert list(report.bad) == [shard.name] and not report.tables
    assert "not the table that" in report.bad[shard.name]
    assert read_ranks(disk, "code", read_spec(disk).vocab_size)


# --- what is no damage ----------------------------------------------------------------------------


def test_a_damaged_cache_json_is_an_error(cache: Folder) -> None:
    flip(cache, "cache.json")
    with pytest.raises(DdkError, match=r"cache\.json"):
        verify(cache, repair=True)
    cache.remove("cache.json")
    with pytest.raises(DdkError, match="no teacher cache"):
        verify(cache)


def test_a_store_out_of_reach_is_no_damage(
    s3_url: str, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost in the middle: nothing is dropped for it."""
    monkeypatch.setenv("DDK_PIPE_RETRY_SECONDS", "0.2")
    cache = open_folder(s3_url)
    for name, part in content.items():
        cache.write(name, part)
    right = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    unreachable = open_folder(s3_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", right)
    real = cache_soundness.verify_shard

    def lose(_: Folder, *rest: Any) -> Any:
        return real(unreachable, *rest)

    monkeypatch.setattr(cache_verify, "verify_shard", lose)
    with pytest.raises(DdkError, match="check network and endpoint"):
        verify(cache, repair=True)
    assert holds(cache) == content


@pytest.mark.parametrize(
    ("number", "is_damage"), [(errno.EIO, True), (errno.EACCES, False), (errno.EMFILE, False)]
)
def test_errors_of_the_file_system(
    disk: LocalFolder, content: Content, monkeypatch: pytest.MonkeyPatch, number: int, is_damage: bool
) -> None:
    shard, group = some_shard(disk)
    real = cache_soundness.verify_shard

    def fail(folder: Folder, which: Shard, *rest: Any) -> Any:
        if which == shard:
            raise OSError(number, os.strerror(number), f"{folder.name}/{group}/x")
        return real(folder, which, *rest)

    monkeypatch.setattr(cache_verify, "verify_shard", fail)
    if is_damage:
        report = verify(disk)
        assert "cannot be read (Input/output error)" in report.bad[shard.name]
        assert set(verify(disk, repair=True).removed) == {shard.record, group}
    else:
        with pytest.raises(OSError):
            verify(disk, repair=True)
        assert holds(disk) == content


def test_a_shard_made_again_meanwhile_is_not_dropped(
    disk: LocalFolder, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, _ = some_shard(disk)
    record = read_record(disk, shard, read_spec(disk))
    assert record is not None
    newer = record.model_copy(update={"seconds": 5.0})
    real = cache_soundness.verify_shard

    def replace(folder: Folder, which: Shard, *rest: Any) -> Any:
        if which == shard:
            disk.write(shard.record, newer.sealed())
            raise DdkError("damaged", hint=repair(disk))
        return real(folder, which, *rest)

    monkeypatch.setattr(cache_verify, "verify_shard", replace)
    assert not verify(disk, repair=True).removed
    assert holds(disk) == {**content, shard.record: newer.sealed()}


def test_links_never_lead_a_repair_outside(disk: LocalFolder, tmp_path: Path) -> None:
    """A stranger's link in place of a folder, or inside a group: nothing behind it is touched."""
    shard, group = some_shard(disk)
    outside = tmp_path / "outside"
    (disk.path / group / "tokens").rename(outside)
    (disk.path / group / "tokens").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    report = verify(disk, repair=True)
    assert list(report.bad) == [shard.name] and sorted(outside.rglob("*")) == before
    assert not (disk.path / group).exists()
    (disk.path / "plays" / "train").rename(tmp_path / "plays-train")
    (disk.path / "plays" / "train").symlink_to(tmp_path / "plays-train")
    before = sorted((tmp_path / "plays-train").rglob("*"))
    with pytest.raises(DdkError, match="leads outside"):
        verify(disk, repair=True)
    assert sorted((tmp_path / "plays-train").rglob("*")) == before


@pytest.mark.slow
def test_killed_in_the_middle_of_a_repair(
    disk: LocalFolder, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each number of removals: readers see no wrong value, and the next repair finishes."""
    shard, group = some_shard(disk)
    corrupt_data(disk, shard, group)
    damage_table(disk, read_spec(disk))
    damaged = holds(disk)
    real = type(disk).remove

    class Killed(BaseException):
        pass

    def repaired(allowed: int) -> Report | None:
        left = iter(range(allowed))

        def remove(folder: LocalFolder, name: str) -> None:
            if next(left, None) is None:
                raise Killed
            real(folder, name)

        monkeypatch.setattr(type(disk), "remove", remove)
        try:
            return verify(disk, repair=True)
        except Killed:
            return None
        finally:
            monkeypatch.setattr(type(disk), "remove", real)

    for allowed in (1, 2, 3, 50):
        for name, part in damaged.items():
            disk.write(name, part)
        repaired(allowed)
        verify(disk, repair=True)
        left = holds(disk)
        assert without(left, "code/") == without(content, "code/")
        assert not [name for name in left if name.startswith("code/") and ".zarr/" not in name]
        assert all(not item.removable for item in verify(disk).leftovers)
        CacheReader(disk, 1.0).read("plays", "train", 0)
