"""Names in a manifest -> the files behind them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from ddk_pipe.pipeline.errors import DdkError, reason
from ddk_pipe.pipeline.manifest import DatasetSource, Project, Source


def find_files(project: Project, sources: list[Source], *, field: str) -> list[Path]:
    """Files behind the names, sorted inside a glob or a folder; raises DdkError if one matches nothing.

    A folder stands for every file below it; like a glob it leaves out names that begin with a dot. A file that
    several names match is there once, where the first of them stands.
    """
    return [found for found in resolve_sources(project, sources, field=field) if isinstance(found, Path)]


def resolve_sources(project: Project, sources: list[Source], *, field: str) -> Iterator[Path | DatasetSource]:
    """The sources in their order: every name as its files (see `find_files`), every dataset as it is."""
    seen: set[str] = set()
    for source in sources:
        if isinstance(source, DatasetSource):
            yield source
            continue
        for path in _files_of(project, source, field=field):
            place = os.path.abspath(path)
            if place not in seen:
                seen.add(place)
                yield path


def _files_of(project: Project, source: str, *, field: str) -> list[Path]:
    try:
        return _matches(project, source, field=field)
    except (OSError, ValueError) as problem:  # a name that is too long, or holds what no name may hold
        raise DdkError(
            f"{field}: {source[:60]!r} cannot be a file's name ({reason(problem)[:80]})", hint="mend the path"
        ) from None


def _matches(project: Project, source: str, *, field: str) -> list[Path]:
    pattern = project.path(source, field=field)
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir() and project.output.resolve().is_relative_to(pattern.resolve()):
        raise DdkError(
            f"{field}: {pattern} is a folder that holds the output too",
            hint=f"name its files, e.g. {source}/*.txt",
        )
    names = str(Path(glob.escape(str(pattern)), "**") if pattern.is_dir() else pattern)
    found = sorted(Path(name) for name in glob.glob(names, recursive=True))
    for path in found:
        if path.is_symlink() and not path.exists():
            raise DdkError(f"{field}: {path} is a link to a file that is not there", hint="mend or remove it")
    files = [path for path in found if path.is_file()]
    if not files:
        raise DdkError(f"{field}: no file {pattern}", hint="mend the path; globs like text/*.jsonl are fine")
    return files
