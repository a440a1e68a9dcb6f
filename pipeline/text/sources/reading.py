"""Sources -> documents: each file by the reader of what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ddk_pipe.pipeline.manifest import DatasetSource, Domain, Project, Source
from ddk_pipe.pipeline.text.sources import kinds
from ddk_pipe.pipeline.text.sources.hub import read_dataset
from ddk_pipe.pipeline.text.sources.json_text import read_json_lines, read_json_values
from ddk_pipe.pipeline.text.sources.opening import readable, whole_text
from ddk_pipe.pipeline.text.sources.parts import Part, Stretch, cut_into_parts
from ddk_pipe.pipeline.text.sources.records import Document, text_document
from ddk_pipe.pipeline.text.sources.tables import read_csv, read_parquet, read_tsv


def documents(project: Project, domain: Domain, sources: list[Source], *, field: str) -> Iterator[Document]:
    """All documents of the sources in order; raises DdkError naming file and line of a bad one."""
    for part in cut_into_parts(project, sources, text_field=domain.text_field, field=field):
        yield from documents_of(project, domain, part, field=field)


def documents_of(project: Project, domain: Domain, part: Part, *, field: str) -> Iterator[Document]:
    """The documents of a part in order; raises DdkError naming file and line of a bad one."""
    for stretch in part:
        if isinstance(stretch.source, DatasetSource):
            yield from read_dataset(project, stretch.source, domain, field=field)
        else:
            yield from _file(stretch.source, stretch, domain)


def _file(path: Path, stretch: Stretch, domain: Domain) -> Iterator[Document]:
    with readable(path):
        kind = kinds.recognise(path, text_field=domain.text_field)
        if stretch.last is None:
            yield from READERS[kind](path, domain)
        else:
            read = BY_STRETCHES[kind]
            yield from read(path, domain, stretch.first, stretch.last, before=stretch.before)


def _plain(path: Path, domain: Domain) -> Iterator[Document]:
    text = whole_text(path)
    if text.strip():
        yield text_document(text, str(path))


BY_STRETCHES = {kinds.JSON_LINES: read_json_lines, kinds.PARQUET: read_parquet}
READERS: dict[str, Callable[[Path, Domain], Iterator[Document]]] = {
    kinds.JSON_LINES: read_json_lines,
    kinds.JSON_VALUES: read_json_values,
    kinds.PARQUET: read_parquet,
    kinds.CSV: read_csv,
    kinds.TSV: read_tsv,
    kinds.TEXT: _plain,
}
