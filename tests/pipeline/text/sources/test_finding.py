from __future__ import annotations

from pathlib import Path

import pytest
from reading import project, texts

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text import find_files


def test_a_file_that_two_names_match_is_read_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts(tmp_path, "b.txt", "*.txt", f"{tmp_path}/a.txt", "./b.txt") == ["b", "a"]


def test_links_to_nothing_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "text" / "b.txt").symlink_to("a.txt")
    assert texts(tmp_path, "text/*.txt") == ["a", "a"]  # two names, as in a store of snapshots: two files
    (tmp_path / "text" / "c.txt").symlink_to("gone.txt")
    for source in ("*.txt", "c.txt", ""):
        with pytest.raises(DdkError, match=r"c\.txt is a link to a file that is not there"):
            find_files(project(tmp_path / "project"), [str(tmp_path / "text" / source)], field="f")


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "y/" * 3000])
def test_what_cannot_be_a_name_is_one_line(tmp_path: Path, source: str) -> None:
    with pytest.raises(DdkError, match=r"^f: ") as caught:
        find_files(project(tmp_path), [source], field="f")
    assert len(str(caught.value)) < 300
