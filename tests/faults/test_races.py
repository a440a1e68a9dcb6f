"""Several at once: writers, readers and repairs on one cache; places and clocks that change under them."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest
from caches import fill, group_path, groups, open_writer, write_shard
from faults import (
    FIRST,
    SECOND,
    Judge,
    flip,
    fork_and_read,
    killed,
    pause_before,
    small_spec,
    start,
    write_all,
    write_pending,
)

from ddk_pipe.pipeline.cache import CacheReader, SplitSize, all_shards, verify
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.text import TRAIN


def test_two_processes_write_the_same_shards(judge: Judge, tmp_path: Path) -> None:
    """Each of them all shards, also those that the other one has committed by now: one group of each stays."""
    folder = LocalFolder(tmp_path / "cache")
    writers = [start(write_all, folder, small_spec()) for _ in range(2)]
    for process, connection in writers:
        assert connection.recv() == "done"
        process.join(60)
    judge.complete(folder)
    assert all(len(groups(folder, shard)) == 1 for shard in all_shards(small_spec()))
    assert verify(folder).leftovers == []


def test_a_writer_that_sleeps_while_another_commits(judge: Judge, tmp_path: Path) -> None:
    """Stopped (SIGSTOP) right before its commit record; it wakes up, loses, and takes its own group away."""
    folder = LocalFolder(tmp_path / "cache")
    write_shard(open_writer(folder, small_spec()), FIRST)
    process, connection = start(pause_before, folder, small_spec(), SECOND, "00001.json")
    wait_until_stopped(process.pid or 0)
    assert len(groups(folder, SECOND)) == 1
    ours = write_shard(open_writer(folder, small_spec()), SECOND)
    os.kill(process.pid or 0, 18)  # SIGCONT
    assert connection.recv() == ours.group
    process.join(60)
    assert groups(folder, SECOND) == {ours.group}
    assert judge.committed(folder) == 4


def test_a_writer_that_sleeps_while_its_shard_is_repaired(judge: Judge, tmp_path: Path) -> None:
    """Its group is published, its record not yet there: a repair leaves it alone, and it commits."""
    folder = LocalFolder(tmp_path / "cache")
    write_shard(open_writer(folder, small_spec()), FIRST)
    process, connection = start(pause_before, folder, small_spec(), SECOND, "00001.json")
    wait_until_stopped(process.pid or 0)
    assert not verify(folder, repair=True).removed
    os.kill(process.pid or 0, 18)
    assert groups(folder, SECOND) == {connection.recv()}
    process.join(60)
    assert judge.committed(folder) == 4


def wait_until_stopped(pid: int) -> None:
    for _ in range(3000):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.01)
    pytest.fail("the writer did not come to the place where it stops")


def test_two_writers_add_a_domain_each(judge: Judge, tmp_path: Path) -> None:
    """The second to write cache.json does not know the first one's domain: nothing is lost, the next run lists both."""
    folder = LocalFolder(tmp_path / "cache")
    fill(folder, small_spec())
    specs = [
        small_spec(domains={name: {TRAIN: SplitSize(2, 2, f"{name}-digest")}}) for name in ("plays", "news")
    ]
    writers = [start(write_pending, folder, spec) for spec in specs]
    for process, connection in writers:
        connection.recv()
        process.join(60)
        assert process.exitcode == 0
    for spec in specs:
        assert not open_writer(folder, spec).pending()
    report = verify(folder)
    assert report.sound and set(report.splits) == {
        "code/train",
        "code/validation",
        "plays/train",
        "news/train",
    }
    judge.complete_but_for(folder, ["plays", "news"])


def test_readers_while_a_writer_commits(judge: Judge, tmp_path: Path) -> None:
    """One reader that stays open and a new one each time: windows appear one shard after another, always right."""
    folder = LocalFolder(tmp_path / "cache")
    open_writer(folder, small_spec())
    lasting = CacheReader(folder, 1.0)
    process, connection = start(write_pending, folder, small_spec())
    connection.recv()
    seen = [0]
    while seen[-1] < len(judge.windows):
        for reader in (lasting, CacheReader(folder, 1.0)):
            right, errors = judge.read(reader)
            assert all("not committed" in problem.message for problem in errors)
            assert right >= seen[-1]
            seen.append(right)
    process.join(60)
    assert len(set(seen)) >= 3
    judge.complete(folder)


def test_repairs_while_a_writer_commits(judge: Judge, tmp_path: Path) -> None:
    """`verify --repair` again and again beside a writer: it takes nothing that is sound or under way."""
    folder = LocalFolder(tmp_path / "cache")
    open_writer(folder, small_spec())
    process, connection = start(write_pending, folder, small_spec())
    connection.recv()
    rounds = 0
    while process.is_alive():
        report = verify(folder, repair=True)
        assert not report.bad and not report.removed
        rounds += 1
    process.join(60)
    assert process.exitcode == 0 and rounds >= 3
    judge.complete(folder)


def test_a_reader_open_while_a_shard_is_made_again(judge: Judge, folder: LocalFolder) -> None:
    """Its files are removed and others put in their place: the reader finds the new ones by itself."""
    reader = CacheReader(LocalFolder(folder.path), 1.0)
    assert judge.read(reader) == (len(judge.windows), [])
    before = group_path(folder, FIRST)
    flip(before / "tokens" / "c" / "0" / "0", 3)
    verify(folder, repair=True)
    fill(folder, small_spec())
    assert not before.exists() and group_path(folder, FIRST) != before
    assert judge.read(reader) == (len(judge.windows), [])
    reader.folder.write("touched", b"")  # lets go of the files that were open
    assert judge.read(reader) == (len(judge.windows), [])
    judge.complete(folder)


def test_a_reader_open_while_a_shard_is_dropped(judge: Judge, folder: LocalFolder) -> None:
    """Repaired but not made again yet: an error that says so, until it is there again."""
    reader = CacheReader(LocalFolder(folder.path), 1.0)
    assert judge.read(reader) == (len(judge.windows), [])
    flip(group_path(folder, FIRST) / "tokens" / "c" / "0" / "0", 3)
    assert len(judge.read(reader)[1]) == 1
    verify(folder, repair=True)
    reader.folder.write("touched", b"")
    right, errors = judge.read(reader)
    assert right == len(judge.windows) - 2
    assert all("not committed" in problem.message and "cache-teacher" in problem.hint for problem in errors)
    fill(folder, small_spec())
    assert judge.read(reader) == (len(judge.windows), [])


def test_readers_in_forked_processes(judge: Judge, folder: LocalFolder) -> None:
    """Forked while other threads read: children and parent go on with the same open files."""
    process, connection = start(fork_and_read, folder, judge.windows, 40)
    assert connection.poll(120), "a forked reader hangs"
    assert connection.recv() == [0] * 40
    process.join(60)


def test_a_killed_reader(judge: Judge, folder: LocalFolder) -> None:
    """Readers change nothing, so that their death changes nothing."""
    before = {name: folder.read(name) for name in folder.names()}
    process, connection = start(fork_and_read, folder, judge.windows, 10_000)
    assert not connection.poll(0.3)
    process.kill()
    assert killed(process)
    assert {name: folder.read(name) for name in folder.names()} == before


def test_a_cache_that_has_moved(judge: Judge, folder: LocalFolder) -> None:
    moved = folder.path.with_name("elsewhere")
    folder.path.rename(moved)
    with pytest.raises(DdkError, match="no teacher cache"):
        CacheReader(folder, 1.0)
    judge.complete(LocalFolder(moved))
    fill(LocalFolder(moved), small_spec())
    assert verify(LocalFolder(moved)).sound


def test_a_link_to_a_cache(judge: Judge, folder: LocalFolder) -> None:
    link = folder.path.with_name("link")
    link.symlink_to(folder.path)
    (folder.path / FIRST.record).unlink()
    fill(LocalFolder(link), small_spec())
    judge.complete(LocalFolder(link))
    assert verify(LocalFolder(link)).sound


def test_a_shard_behind_a_link(judge: Judge, folder: LocalFolder) -> None:
    """Within the cache it is read; one that leads out of it is refused and, repaired, only the link is removed."""
    group = group_path(folder, FIRST)
    inside = folder.path / "moved"
    group.rename(inside)
    group.symlink_to(inside)
    assert judge.committed(folder) == len(judge.windows)
    group.unlink()
    outside = folder.path.with_name("moved")
    inside.rename(outside)
    group.symlink_to(outside)
    assert all("leads outside of it" in line for line in judge.damaged(folder))
    verify(folder, repair=True)
    assert not group.exists() and (outside / "zarr.json").exists()
    fill(folder, small_spec())
    judge.complete(folder)


@pytest.mark.parametrize("when", [0, 4_000_000_000])
def test_a_clock_that_moved(judge: Judge, folder: LocalFolder, when: int) -> None:
    """All times of all files in 1970 or 2096, also of what a dead writer left: nothing is decided by them alone."""
    (folder.path / FIRST.record).unlink()
    (folder.path / "code" / ".00000.json.01234567.partial").write_text("half")
    for path in [folder.path, *folder.path.rglob("*")]:
        os.utime(path, (when, when))
    assert judge.committed(folder) == len(judge.windows) - 2
    report = verify(folder, repair=True)
    assert not report.bad and set(report.removed) <= {"code/.00000.json.01234567.partial"}
    fill(folder, small_spec())
    judge.complete(folder)


def test_leftovers_of_every_kind_are_invisible(judge: Judge, folder: LocalFolder) -> None:
    """Half-written files under temporary names, a scratch folder, an uncommitted group, editor backups."""
    rng = random.Random(0)
    content = rng.randbytes(500)
    (folder.path / ".cache.json.01234567.partial").write_bytes(content)
    (folder.path / "code" / TRAIN / ".00000.json.01234567.partial").write_bytes(content)
    shutil.copytree(group_path(folder, FIRST), folder.path / ".scratch.01234567.partial")
    shutil.copytree(group_path(folder, FIRST), folder.path / "code" / TRAIN / "00000.01234567.zarr")
    (folder.path / "code" / TRAIN / "00000.json~").write_bytes(content)
    assert judge.committed(folder) == len(judge.windows)
    assert CacheReader(folder, 1.0).spec.fingerprint == small_spec().fingerprint
    report = verify(folder, repair=True)
    assert report.sound and report.removed == ["code/train/00000.01234567.zarr"]
    assert report.foreign == ["code/train/00000.json~"]
    judge.complete(folder)
