"""What the text of a domain was read from: files by their content, datasets by their files or their commit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import DatasetSource, Project, Source
from ddk_pipe.pipeline.text import dataset_commit, find_files, kind_by_name, resolve_sources
from ddk_pipe.stages.common import say

Item = dict[str, Any]  # what a record says of one source


def source_fingerprints(
    project: Project, sources: list[Source], known: dict[str, Any], *, field: str
) -> list[Item]:
    """What identifies each source; a file is hashed only if its size or time changed since the record `known`."""
    before = [item for items in known.get("sources", {}).values() for item in items]
    return [
        _dataset(project, found, before, field=field)
        if isinstance(found, DatasetSource)
        else _file(found, _files_in(before))
        for found in resolve_sources(project, sources, field=field)
    ]


def content_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what may differ between equal sources: where they lie and when they were touched.

    A file's name counts only as far as it decides how the file is read.
    """
    return {
        **record,
        "sources": {split: [_content(item) for item in items] for split, items in record["sources"].items()},
    }


def _content(item: Item) -> Any:
    if "files" in item:
        return [
            {**item["dataset"], "dataset": None},
            [[file["name"], file["sha256"]] for file in item["files"]],
        ]
    return [kind_by_name(Path(item["path"])), item["sha256"]] if "path" in item else item


def _files_in(items: list[Item]) -> dict[str, Item]:
    """Every file that a record knows, by its path."""
    files = [file for item in items for file in item.get("files", [item])]
    return {file["path"]: file for file in files if "path" in file}


def _dataset(project: Project, source: DatasetSource, before: list[Item], *, field: str) -> Item:
    """A local folder by its files; an id on the hub by the commit that its revision is now."""
    facts = source.model_dump()
    name = project.model(source.dataset, field=field)
    if Path(name).is_dir():
        seen = _files_in(before)
        files = find_files(project, [name], field=field)
        return {
            "dataset": facts,
            "files": [{"name": path.relative_to(name).as_posix(), **_file(path, seen)} for path in files],
        }
    commit = dataset_commit(name, source.revision)
    if commit is None:
        commit = next(
            (item["commit"] for item in before if item.get("dataset") == facts and "commit" in item), None
        )
        taken = f"taken to be at {commit}, as it was last time" if commit else "recorded without it"
        say(f"prepare: the commit of dataset {source.dataset} cannot be learned from the hub: {taken}")
    return {"dataset": facts, "commit": commit}


def _file(path: Path, seen: dict[str, Item]) -> Item:
    facts = path.stat()
    before = seen.get(str(path), {})
    unchanged = (before.get("bytes"), before.get("mtime_ns")) == (facts.st_size, facts.st_mtime_ns)
    sha256 = before["sha256"] if unchanged else _sha256(path)
    return {"path": str(path), "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns, "sha256": sha256}


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:
        raise DdkError(f"{path}: no permission to read it", hint="change its mode or owner") from None
