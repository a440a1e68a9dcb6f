"""What every folder keeps, on a disk and in an object store alike."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from s3 import together

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, digest_of, durable


def test_files_are_read_as_they_were_written(place: Folder) -> None:
    place.write("a/b.bin", b"0123456789")
    assert place.read("a/b.bin") == b"0123456789" and place.size("a/b.bin") == 10
    assert place.read_ranges("a/b.bin", [(0, 2), (8, 2), (3, 0 + 4)]) == [b"01", b"89", b"3456"]
    place.write("a/b.bin", b"other")
    assert place.read("a/b.bin") == b"other" and place.read_ranges("a/b.bin", [(0, 5)]) == [b"other"]
    assert digest_of(place, "a/b.bin") == durable.digest(b"other")
    with pytest.raises(ValueError, match=r"b\.bin: 5 bytes, at most 4 make sense"):
        place.read("a/b.bin", most=4)
    assert place.read("a/b.bin", most=5) == b"other"
    assert place.exists("a/b.bin") and not place.exists("a") and not place.exists("a/b")


@pytest.mark.parametrize("range_", [(0, 11), (8, 3), (10, 1), (50, 5)])
def test_ranges_behind_the_end_are_errors(place: Folder, range_: tuple[int, int]) -> None:
    place.write("x", b"0123456789")
    with pytest.raises(ValueError, match="x: ends too early"):
        place.read_ranges("x", [(0, 1), range_])


def test_what_is_not_there(place: Folder) -> None:
    for attempt in (place.read, place.size, lambda name: place.read_ranges(name, [(0, 1)])):
        with pytest.raises(FileNotFoundError):
            attempt("no/thing")
    assert place.names() == [] and place.files("no") == [] and not place.exists("no/thing")
    place.remove("no/thing")


def test_names(place: Folder) -> None:
    names = [
        "b/00000.aa.zarr/c/0/0",
        "b/00000.aa.zarr/zarr.json",
        "b/00000.json",
        "b/000001.json",
        "b/1.json",
        "c",
    ]
    for name in reversed(names):
        place.write(name, b"x")
    assert place.names() == names
    assert place.names("b/00000.") == names[:3]
    assert place.names("b/") == names[:5] and place.names("b") == names[:5]
    assert place.names("b/1.json") == ["b/1.json"] and place.names("b/2") == [] and place.names("no/") == []
    assert place.files("b") == names[2:5]


def test_only_the_first_create_succeeds(place: Folder) -> None:
    results = together(*(lambda i=i: place.create("r/x.json", b"%d" % i) for i in range(6)))
    assert [type(result) for result in results].count(FileExistsError) == 5
    assert place.read("r/x.json") == b"%d" % results.index(None)


def test_folders_are_published_whole_and_removed_whole(place: Folder) -> None:
    scratch = place.scratch()
    (scratch / "g" / "below").mkdir(parents=True)
    (scratch / "g" / "one").write_bytes(b"1")
    (scratch / "g" / "below" / "two").write_bytes(b"2" * 6_000_000)  # several parts on an object store
    assert place.names() == []
    place.publish(scratch / "g", "d/group.zarr")
    place.write("d/group.zarr.json", b"")
    assert place.names() == ["d/group.zarr.json", "d/group.zarr/below/two", "d/group.zarr/one"]
    assert place.size("d/group.zarr/below/two") == 6_000_000
    place.remove("d/group.zarr")
    assert place.names() == ["d/group.zarr.json"]
    place.remove("d/group.zarr.json")
    assert place.names() == []


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a/./b", "a\0", "a\\b"]
)
def test_names_that_lead_outside_are_refused(place: Folder, name: str, tmp_path: Path) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: place.read(name),
        lambda: place.read_ranges(name, [(0, 1)]),
        lambda: place.size(name),
        lambda: place.exists(name),
        lambda: place.write(name, b""),
        lambda: place.create(name, b""),
        lambda: place.publish(tmp_path, name),
        lambda: place.remove(name),
        lambda: place.files(name),
    ]
    for attempt in attempts:
        with pytest.raises(DdkError, match="leads outside"):
            attempt()


def test_places_travel_to_other_processes(place: Folder) -> None:
    place.write("a", b"1")
    assert pickle.loads(pickle.dumps(place)).read("a") == b"1"
