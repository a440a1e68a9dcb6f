"""Disks that are full, have limits, or may only be read: writers stop with one line, readers go on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from caches import fill, groups, open_writer, write_shard
from disks import leave_bytes, leave_files, mounted, remount, unmount
from faults import FIRST, SECOND, Judge, limited_write, read_with_few_files, small_spec, start
from tiny import write_project
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import CacheReader, verify
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder, durable
from ddk_pipe.stages.cli import app

PAGE = 4096


def begun(path: Path) -> LocalFolder:
    folder = LocalFolder(path / "cache")
    write_shard(open_writer(folder, small_spec()), FIRST)
    return folder


@pytest.mark.parametrize("full_of", ["bytes", "files"])
def test_a_full_disk_at_every_stage(judge: Judge, small_disk: Path, full_of: str) -> None:
    """Room for a little more each time, until the shard fits: what was committed before stays, no half shard shows."""
    folder = begun(small_disk)
    failures = 0
    for room in range(0, 60, 4):
        if full_of == "bytes":
            leave_bytes(small_disk, room * PAGE)
        else:
            leave_files(small_disk, room)
        try:
            write_shard(open_writer(folder, small_spec()), SECOND)
            break
        except OSError as problem:
            failures += 1
            explained = durable.explain(problem)
            assert problem.errno == errno.ENOSPC and "no space left" in str(explained)
        assert judge.committed(LocalFolder(folder.path)) == 2 and not groups(folder, SECOND)
        assert not list(folder.path.rglob("*.partial"))
    assert failures >= 5 and folder.exists(SECOND.record)
    for path in small_disk.glob("filler*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    fill(folder, small_spec())
    judge.complete(folder)
    assert verify(folder).sound


@pytest.mark.slow
def test_a_full_disk_under_the_real_command(small_disk: Path, tmp_path: Path, tiny_teacher: Path) -> None:
    """`ddk-pipe cache-teacher` says it in one line; when there is room again it goes on where it was."""
    (tmp_path / "project").mkdir()
    cache = {"shard_windows": 4, "path": str(small_disk / "cache")}
    manifest = write_project(tmp_path / "project", tiny_teacher, cache=cache)
    leave_bytes(small_disk, 500_000)
    result = CliRunner().invoke(app, ["cache-teacher", str(manifest)])
    (line,) = [text for text in result.output.splitlines() if text.startswith("ddk-pipe:")]
    assert (
        result.exit_code == 2
        and "no space left on the disk; free some and run the same command again" in line
    )
    before = [name for name in LocalFolder(small_disk / "cache").names() if name.endswith(".json")]
    (small_disk / "filler").unlink()
    remount(small_disk, "size=20m,nr_inodes=20k")
    assert CliRunner().invoke(app, ["cache-teacher", str(manifest)]).exit_code == 0
    assert before and set(before) <= set(LocalFolder(small_disk / "cache").names())
    assert verify(LocalFolder(small_disk / "cache")).sound


@pytest.mark.slow
@pytest.mark.parametrize("most", [0, 30, 100, 400, 1000, 2000])
def test_a_limit_on_the_size_of_files(judge: Judge, tmp_path: Path, most: int) -> None:
    """RLIMIT_FSIZE: the system refuses to write on, in the middle of a file."""
    folder = begun(tmp_path)
    process, connection = start(limited_write, folder, small_spec(), resource.RLIMIT_FSIZE, most)
    assert connection.recv() == ("EFBIG", True)
    process.join(60)
    assert judge.committed(folder) == 2 and not groups(folder, SECOND)
    fill(folder, small_spec())
    judge.complete(folder)


@pytest.mark.slow
def test_a_limit_on_open_files(judge: Judge, folder: LocalFolder) -> None:
    """More arrays than a process may have open: a reader keeps fewer of them."""
    process, connection = start(read_with_few_files, folder, judge.windows)
    assert connection.recv() == f"{len(judge.windows)} right"
    process.join(60)


@pytest.fixture
def read_only(tmp_path: Path, judge: Judge) -> Iterator[LocalFolder]:
    """A cache of one shard on a file system, or in folders, that cannot be written to."""
    path = tmp_path / "read-only"
    if mounted(path, "size=1m"):
        folder = begun(path)
        remount(path, "ro")
        yield folder
        unmount(path)
    elif os.geteuid():
        folder = begun(path)
        everything = [path, *(inner for inner in path.rglob("*") if inner.is_dir())]
        for inner in everything:
            inner.chmod(0o555)
        yield folder
        for inner in everything:
            inner.chmod(0o755)
    else:
        pytest.skip("root may write everywhere, and mounting is not allowed here")


def test_a_read_only_folder(judge: Judge, read_only: LocalFolder) -> None:
    """Reading and verifying need no permission to write; writing says what is missing."""
    assert judge.committed(read_only) == 2
    assert not verify(read_only).bad
    with pytest.raises(OSError) as caught:
        write_shard(open_writer(read_only, small_spec()), SECOND)
    assert "no permission to write there" in str(durable.explain(caught.value))
    assert judge.committed(read_only) == 2


def test_a_file_in_place_of_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    for attempt in (CacheReader, lambda folder, _: open_writer(folder, small_spec())):
        with pytest.raises(DdkError, match=r"cache\.json: cannot be read \(Not a directory\)"):
            attempt(LocalFolder(path / "cache"), 1.0)
    assert path.read_text() == "x"
