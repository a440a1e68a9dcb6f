"""Fixtures of the fault suite: a small cache that nothing ever happened to, and copies of it to damage."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from caches import fill
from disks import mounted, unmount
from faults import Judge, small_spec

from ddk_pipe.pipeline.storage import LocalFolder


@pytest.fixture
def tmp_path(ram: Path) -> Path:
    """In memory: these tests write thousands of files, each with an fsync."""
    return Path(tempfile.mkdtemp(dir=ram))


@pytest.fixture(scope="session")
def judge(ram: Path) -> Judge:
    """Knows every window of the small cache."""
    folder = LocalFolder(ram / "undisturbed")
    fill(folder, small_spec())
    return Judge(folder)


@pytest.fixture
def folder(judge: Judge, tmp_path: Path) -> LocalFolder:
    """The small cache, complete, the test's own."""
    shutil.copytree(judge.undisturbed.name, tmp_path / "cache")
    return LocalFolder(tmp_path / "cache")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB and 400 files."""
    path = tmp_path / "small"
    if not mounted(path, "size=1m,nr_inodes=400"):
        pytest.skip("mounting a file system is not allowed here; see test_a_limit_on_the_size_of_files")
    yield path
    unmount(path)
