from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable


def test_exclusive_writes_lose_to_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    durable.write_file(path, b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        durable.write_file(path, b"two", exclusive=True)
    assert path.read_bytes() == b"one"
    durable.write_file(path, b"three")
    assert path.read_bytes() == b"three"
    assert [item.name for item in path.parent.iterdir()] == ["b.json"]


def test_published_folders_never_replace_one_that_holds_something(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError):
        durable.publish_folder(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "file").read_text() == "two"


def test_need_space_names_both_numbers(tmp_path: Path) -> None:
    durable.need_space(tmp_path / "not" / "there", 1, what="x")
    with pytest.raises(DdkError, match=r"x needs about 1000000\d*\.00 GB and the disk has"):
        durable.need_space(tmp_path, 10**18, what="x")


def test_digests_are_canonical(tmp_path: Path) -> None:
    assert durable.to_json({"b": 1, "a": 2}) == durable.to_json({"a": 2, "b": 1})
    (tmp_path / "x").write_bytes(b"content")
    assert durable.file_digest(tmp_path / "x") == durable.digest(b"content")


def test_explain_leaves_other_errors_alone() -> None:
    assert durable.explain(OSError(5, "Input/output error")) is None
    assert "no space left" in str(durable.explain(OSError(28, "x", "somewhere")))


def test_errors_of_the_system_name_a_path(tmp_path: Path) -> None:
    for problem in (
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("I/O error: No (os error 28)"),
    ):
        with pytest.raises(OSError) as caught, durable.naming(tmp_path / "here"):
            raise problem
        assert str(durable.explain(caught.value)).startswith(
            f"{tmp_path / 'here'}: no space left on the disk"
        )
    with pytest.raises(OSError) as caught, durable.naming(tmp_path / "here"):
        (tmp_path / "missing").read_bytes()
    assert caught.value.filename == str(tmp_path / "missing")  # its own name stays
    with pytest.raises(ValueError, match=r"^other$"), durable.naming(tmp_path / "here"):
        raise ValueError("other")
