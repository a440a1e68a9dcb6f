"""Sources -> parts: stretches of text, each of which is tokenised on its own, by whoever is free.

The cuts depend on the sources alone, so a corpus has the same parts whoever makes them. The first part is small and each
next one twice as large, up to `MOST_BYTES`: a split that is full early has read little that it did not need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ddk_pipe.pipeline.manifest import DatasetSource, Project, Source
from ddk_pipe.pipeline.text.sources import kinds
from ddk_pipe.pipeline.text.sources.finding import resolve_sources
from ddk_pipe.pipeline.text.sources.opening import BUFFER, compression_of_file, readable
from ddk_pipe.pipeline.text.sources.tables import row_groups

FIRST_BYTES, MOST_BYTES = 1 << 16, 1 << 26


@dataclass(frozen=True)
class Stretch:
    """A source or a piece of one: bytes of JSON lines, row groups of Parquet; `last` of None: to its end.

    `before`: lines or rows that stand before it. `size`: its bytes of source, 0 where nobody knows (datasets).
    """

    source: Path | DatasetSource
    size: int
    first: int = 0
    last: int | None = None
    before: int = 0


Part = tuple[Stretch, ...]


def cut_into_parts(project: Project, sources: list[Source], *, text_field: str, field: str) -> Iterator[Part]:
    """The sources in order. Raises DdkError as `resolve_sources`, and for large files that hold no text."""
    part: list[Stretch] = []
    want = Sizes()
    for source in resolve_sources(project, sources, field=field):
        if isinstance(source, DatasetSource):
            stretches: Iterator[Stretch] = iter([Stretch(source, 0)])
        else:
            stretches = _of_file(source, text_field, want)
        for stretch in stretches:
            part.append(stretch)
            if isinstance(source, DatasetSource) or want.reached(part):
                yield tuple(part)
                part = []
    if part:
        yield tuple(part)


class Sizes:
    """Bytes that the parts are to have, one after the other."""

    def __init__(self) -> None:
        self.now, self.left = FIRST_BYTES, FIRST_BYTES

    def reached(self, part: list[Stretch]) -> bool:
        """Whether the part is large enough; if so, the next one begins."""
        self.left = self.now - sum(stretch.size for stretch in part)
        if self.left > 0:
            return False
        self.now = self.left = min(2 * self.now, MOST_BYTES)
        return True


def _of_file(path: Path, text_field: str, want: Sizes) -> Iterator[Stretch]:
    with readable(path):
        size = path.stat().st_size
        kind = kinds.recognise(path, text_field=text_field) if size > want.left else ""
        in_lines = kind == kinds.JSON_LINES and compression_of_file(path) is None
    if in_lines:
        yield from _lines(path, size, want)
    elif kind == kinds.PARQUET:
        yield from _row_groups(path, size, want)
    else:
        yield Stretch(path, size)


def _lines(path: Path, size: int, want: Sizes) -> Iterator[Stretch]:
    """Cut after the first line end at or beyond the size that is wanted."""
    first = lines = 0
    with open(path, "rb") as file:
        while first < size:
            counted = 0
            while (left := want.left - (file.tell() - first)) > 1:
                block = file.read(min(left - 1, BUFFER))
                if not block:
                    break
                counted += block.count(b"\n")
            rest = file.readline()
            last = file.tell()
            yield Stretch(path, last - first, first, last, lines)
            first, lines = last, lines + counted + rest.count(b"\n")


def _row_groups(path: Path, size: int, want: Sizes) -> Iterator[Stretch]:
    groups = row_groups(path)
    first = before = rows = begun = held = 0
    for number, (count, content) in enumerate(groups, 1):
        held, rows = held + content, rows + count
        if number == len(groups):
            held = size  # footer and all
        if held - begun >= want.left or number == len(groups):
            yield Stretch(path, held - begun, first, number, before)
            first, before, begun, rows = number, before + rows, held, 0
