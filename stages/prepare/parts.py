"""A domain's parts on the disk: tokenised by a crew, ahead of whoever reads them, and kept until both splits are there.

A part's name is a digest of all it was made from, so a command that was stopped finds what it had finished, and files
that were mended since are read again.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import DatasetSource, Domain, Project, Source
from ddk_pipe.pipeline.storage import durable, settle_writes
from ddk_pipe.pipeline.text import Part, Piece, cut_into_parts, read_pieces
from ddk_pipe.stages.common import track
from ddk_pipe.stages.prepare.crews import Crew, Job
from ddk_pipe.stages.prepare.rules import WORDS

FOLDER = "parts"  # beside the splits of a domain


def remove_parts(tokens: Path) -> None:
    """The splits of the domain in that folder are there: nobody needs its parts any more."""
    if (tokens / FOLDER).exists():
        settle_writes()
        shutil.rmtree(tokens / FOLDER, ignore_errors=True)


class Parts:
    """Those of one domain; `record` is what its tokens are made from (`prepare.stage`)."""

    def __init__(
        self, project: Project, name: str, domain: Domain, record: dict[str, Any], crew: Crew
    ) -> None:
        self.project, self.name, self.domain, self.crew = project, name, domain, crew
        self.folder = project.tokens / name / FOLDER
        self._made_from = [record.get(key) for key in ("version", "fields", *WORDS)]
        self._contents = _contents(record)
        self._bytes = {split: _total_bytes(items) for split, items in record["sources"].items()}

    def pieces(self, sources: list[Source], split: str, what: str) -> Generator[list[Piece]]:
        """The documents of the sources in order, some at a time; a reader who has enough may leave.

        Raises DdkError where it would without parts: for the first document that is wrong, once all before it were
        handed out.
        """
        field = f"domains.{self.name}.{split}"
        total = self._bytes[split]
        with (
            track(what, total, "tokens" if total is None else "bytes") as advance,
            closing(self._made(self._jobs(sources, field=field))) as jobs,
        ):
            for job in jobs:
                tokens = 0
                for pieces in _read(job.path):
                    yield pieces
                    tokens += sum(len(piece.encoded.ids) for piece in pieces)
                size = sum(stretch.size for stretch in job.part)
                advance(tokens if total is None else size)

    def _jobs(self, sources: list[Source], *, field: str) -> Iterator[Job]:
        parts = cut_into_parts(self.project, sources, text_field=self.domain.text_field, field=field)
        manifest, root = self.project.manifest, self.project.root
        for part in parts:
            path = self.folder / f"{self._digest(part)}.arrow"
            yield Job(manifest, root, self.name, field, part, path)

    def _digest(self, part: Part) -> str:
        made_from: list[Any] = [*self._made_from]
        for stretch in part:
            key = _key(stretch.source)
            limits = [stretch.first, stretch.last, stretch.before]
            made_from.append([key, limits, self._contents[key]])
        return durable.digest(durable.to_json(made_from))

    def _made(self, jobs: Iterable[Job]) -> Generator[Job]:
        """The jobs in order, each once it is done; `crew.ahead` of them are under way."""
        under_way: deque[tuple[Job, Future[None]]] = deque()
        coming, problem = iter(jobs), None
        try:
            while True:
                while problem is None and len(under_way) < self.crew.ahead:
                    try:
                        job = next(coming)
                    except (StopIteration, DdkError) as end:  # the parts before it come first
                        problem = end
                    else:
                        under_way.append((job, _done() if job.path.exists() else self.crew.submit(job)))
                if not under_way:
                    break
                job, future = under_way.popleft()
                self.crew.result(future)
                yield job
        finally:
            self.crew.give_up([future for _, future in under_way])
        if isinstance(problem, DdkError):
            raise problem


def _read(path: Path) -> Iterator[list[Piece]]:
    import pyarrow as pa

    try:
        yield from read_pieces(path)
    except (OSError, pa.ArrowException) as problem:
        raise DdkError(f"{path}: a damaged file of tokens ({problem})", hint="delete it") from None


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def _total_bytes(items: list[dict[str, Any]]) -> int | None:
    """Of the sources in a record; None where a dataset is among them."""
    return None if any("dataset" in item for item in items) else sum(item["bytes"] for item in items)


def _key(source: Path | DatasetSource) -> str:
    return str(source) if isinstance(source, Path) else durable.digest(durable.to_json(source.model_dump()))


def _contents(record: dict[str, Any]) -> dict[str, Any]:
    """What is known of each source's content, by `_key`."""
    items = [item for split in record["sources"].values() for item in split]
    return {
        item["path"] if "path" in item else durable.digest(durable.to_json(item["dataset"])): {
            key: value for key, value in item.items() if key not in ("path", "mtime_ns")
        }
        for item in items
    }
