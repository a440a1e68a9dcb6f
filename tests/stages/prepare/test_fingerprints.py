"""What `prepare` knows its sources by: it is done again when what it would read is another text, and only then."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reading import project

from ddk_pipe.pipeline.manifest import DatasetSource, Source
from ddk_pipe.pipeline.text import dataset_commit
from ddk_pipe.stages.prepare.fingerprints import content_of, source_fingerprints

FIRST, SECOND = "1" * 40, "2" * 40


def record(root: Path, *sources: Source, known: dict[str, Any] | None = None) -> dict[str, Any]:
    found = source_fingerprints(project(root), list(sources), known or {}, field="f")
    return {"sources": {"train": found}}


@pytest.fixture(autouse=True)
def fresh_commits() -> Iterator[None]:
    """Commits are learned once a process."""
    dataset_commit.cache_clear()
    yield
    dataset_commit.cache_clear()


def test_a_file_is_its_content_and_how_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nebb\n")
    before = content_of(record(tmp_path, "a.csv"))
    os.utime(path, (1, 1))
    path.rename(tmp_path / "b.CSV")
    assert content_of(record(tmp_path, "b.CSV")) == before
    (tmp_path / "b.CSV").rename(tmp_path / "b.md")  # the same bytes, and another text
    assert content_of(record(tmp_path, "b.md")) != before
    path.write_text("text\nflow\n")
    assert content_of(record(tmp_path, "a.csv")) != before


def test_files_are_hashed_again_only_where_size_or_time_changed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.jsonl"
    path.write_text("ebb")
    for source in ("data/a.jsonl", DatasetSource(dataset="data")):
        known = record(tmp_path, source)
        file = known["sources"]["train"][0]
        file = file.get("files", [file])[0]
        file["sha256"] = "as it was"
        assert record(tmp_path, source, known=known) == known
        os.utime(path, ns=(5, 5 + path.stat().st_mtime_ns))
        assert record(tmp_path, source, known=known) != known


def test_a_local_dataset_is_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "train.jsonl").write_text("ebb")
    (folder / "deep" / "more.jsonl").write_text("flow")
    source = DatasetSource(dataset="data")
    before = content_of(record(tmp_path, source))
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "moved" / ".hidden").write_text("no data")
    assert content_of(record(tmp_path, DatasetSource(dataset="moved"))) == before
    assert content_of(record(tmp_path, DatasetSource(dataset="data", split="test"))) != before
    (folder / "deep" / "more.jsonl").write_text("tide")
    changed = content_of(record(tmp_path, source))
    (folder / "README.md").write_text("configs: []")
    added = content_of(record(tmp_path, source))
    (folder / "train.jsonl").rename(folder / "test.jsonl")  # its name says which split it is
    renamed = content_of(record(tmp_path, source))
    assert len({str(item) for item in (before, changed, added, renamed)}) == 4


class FakeHub:
    """In place of huggingface_hub.HfApi: a hub of one dataset; None where there is no network."""

    commit: str | None = FIRST
    asked: int = 0

    def dataset_info(self, name: str, *, revision: str | None, timeout: float) -> Any:
        FakeHub.asked += 1
        if FakeHub.commit is None:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=FakeHub.commit)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeHub]:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "store"))
    FakeHub.commit, FakeHub.asked = FIRST, 0
    return FakeHub


def test_a_dataset_of_the_hub_is_its_commit(tmp_path: Path, hub: type[FakeHub]) -> None:
    source = DatasetSource(dataset="who/words")
    first = record(tmp_path, source)
    assert first["sources"]["train"] == [{"dataset": source.model_dump(), "commit": FIRST}]
    hub.commit = SECOND
    assert record(tmp_path, source) == first and hub.asked == 1  # within a process it is one commit
    dataset_commit.cache_clear()
    assert content_of(record(tmp_path, source)) != content_of(first)
    pinned = DatasetSource(dataset="who/words", revision=FIRST)
    assert record(tmp_path, pinned)["sources"]["train"][0]["commit"] == FIRST and hub.asked == 2


def test_without_a_network_the_store_says_the_commit_or_the_record_does(
    tmp_path: Path, hub: type[FakeHub], capsys: pytest.CaptureFixture[str]
) -> None:
    source = DatasetSource(dataset="who/words")
    known = record(tmp_path, source)
    hub.commit = None
    dataset_commit.cache_clear()
    assert record(tmp_path, source)["sources"]["train"][0]["commit"] is None
    assert record(tmp_path, source, known=known) == known
    said = capsys.readouterr()
    assert f"taken to be at {FIRST}, as it was last time" in said.out + said.err
    refs = tmp_path / "store" / "datasets--who--words" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(SECOND)
    dataset_commit.cache_clear()
    assert record(tmp_path, source, known=known)["sources"]["train"][0]["commit"] == SECOND


def test_what_is_read_is_the_commit_that_is_recorded(
    tmp_path: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    from reading import texts

    asked: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, options["revision"]))
        return [{"text": "ebb"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = {"dataset": "who/words", "revision": "v1"}
    assert record(tmp_path, DatasetSource(**source))["sources"]["train"][0]["commit"] == FIRST
    hub.commit = SECOND  # the hub goes on meanwhile
    assert texts(tmp_path, source) == ["ebb"]
    assert asked == [("who/words", FIRST)]
