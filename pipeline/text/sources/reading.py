"""Sources -> documents: each file by the reader of what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ddk_pipe.pipeline.errors import DdkError, reason
from ddk_pipe.pipeline.manifest import DatasetSource, Domain, Project, Source
from ddk_pipe.pipeline.text.sources import kinds
from ddk_pipe.pipeline.text.sources.finding import resolve_sources
from ddk_pipe.pipeline.text.sources.hub import read_dataset
from ddk_pipe.pipeline.text.sources.json_text import read_json_lines, read_json_values
from ddk_pipe.pipeline.text.sources.opening import whole_text
from ddk_pipe.pipeline.text.sources.records import Document, text_document
from ddk_pipe.pipeline.text.sources.tables import read_csv, read_parquet, read_tsv


def documents(project: Project, domain: Domain, sources: list[Source], *, field: str) -> Iterator[Document]:
    """All documents of the sources in order; raises DdkError naming file and line of a bad one."""
    for source in resolve_sources(project, sources, field=field):
        if isinstance(source, DatasetSource):
            yield from read_dataset(project, source, domain, field=field)
        else:
            yield from _file(source, domain)


def _file(path: Path, domain: Domain) -> Iterator[Document]:
    try:
        yield from READERS[kinds.recognise(path, text_field=domain.text_field)](path, domain)
    except PermissionError:
        raise DdkError(f"{path}: no permission to read it", hint="change its mode or owner") from None
    except _unreadable() as problem:
        raise DdkError(
            f"{path}: cannot be read ({reason(problem)})", hint="is it complete, and what it says it is?"
        ) from None


def _unreadable() -> tuple[type[Exception], ...]:
    """What a damaged file, or one cut short, raises."""
    import lzma

    import pyarrow as pa

    return (OSError, EOFError, lzma.LZMAError, pa.ArrowException)


def _plain(path: Path, domain: Domain) -> Iterator[Document]:
    text = whole_text(path)
    if text.strip():
        yield text_document(text, str(path))


READERS: dict[str, Callable[[Path, Domain], Iterator[Document]]] = {
    kinds.JSON_LINES: read_json_lines,
    kinds.JSON_VALUES: read_json_values,
    kinds.PARQUET: read_parquet,
    kinds.CSV: read_csv,
    kinds.TSV: read_tsv,
    kinds.TEXT: _plain,
}
