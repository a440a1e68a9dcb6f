"""Folders on a disk: links and open files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder, local


def test_a_folder_may_itself_be_a_link_but_links_inside_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "secret").write_text("x")
    place = LocalFolder(tmp_path / "link")
    place.write("a", b"1")
    (tmp_path / "real" / "b").symlink_to("a")
    (tmp_path / "real" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    assert place.read("a") == place.read("b") == b"1"
    for name in ("out", "up/secret"):
        with pytest.raises(DdkError, match="leads outside"):
            place.read(name)
    assert place.names() == ["a", "b", "out", "up"]  # never what is behind a link
    built = place.scratch()
    changes: list[Callable[[], None]] = [
        lambda: place.write("up/secret", b"2"),
        lambda: place.create("up/new", b"2"),
        lambda: place.publish(built, "up/group"),
        lambda: place.remove("up/secret"),
    ]
    for change in changes:
        with pytest.raises(DdkError, match="leads outside"):
            change()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "secret"]
    assert (tmp_path / "secret").read_text() == "x"


def test_parts_of_files_are_read_through_links_that_stay_inside_and_no_others(tmp_path: Path) -> None:
    place = LocalFolder(tmp_path / "place")
    place.write("group/array/0", b"123")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "0").write_bytes(b"123")
    (place.path / "file").symlink_to("group/array/0")
    (place.path / "folder").symlink_to("group")
    (place.path / "up").symlink_to(tmp_path / "secret")
    (place.path / "group" / "out").symlink_to(tmp_path / "secret" / "0")
    for name in ("group/array/0", "file", "folder/array/0"):
        assert place.read_ranges(name, [(1, 2)]) == [b"23"]
    for name in ("up/0", "group/out"):
        with pytest.raises(DdkError, match="leads outside"):
            place.read_ranges(name, [(1, 2)])
    for name in ("group", "group/array", "nothing/0", "group/array/1"):
        with pytest.raises(FileNotFoundError, match=name):
            place.read_ranges(name, [(1, 2)])


def test_a_file_without_links_is_opened_without_asking_where_they_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is most of what opening costs, and windows at random open seven files each."""
    place = LocalFolder(tmp_path)
    place.write("group/array/0", b"123")
    monkeypatch.setattr(local, "is_inside", None)
    assert place.read_ranges("group/array/0", [(1, 2)]) == [b"23"]


@pytest.mark.slow
def test_open_files_are_capped(tmp_path: Path) -> None:
    place = LocalFolder(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(600):
        place.create(f"{number}", b"x")
        assert place.read_ranges(f"{number}", [(0, 1)]) == [b"x"]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 260
    del place
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 2
