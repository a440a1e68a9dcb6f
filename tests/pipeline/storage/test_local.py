"""Folders on a disk: links and open files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder


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
