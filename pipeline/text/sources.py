"""Sources of text -> documents, streamed: never a whole corpus in memory.

A document is a dict with either "text" (str) or "messages" (a chat), and where it came from. Compressed files
(.gz, .zst, .bz2) are unpacked on the way by pyarrow.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.pipeline.manifest import DatasetSource, Domain, Project, Source
from ddk_pipe.pipeline.text.chat_records import read_chat

COMPRESSED = (".gz", ".zst", ".bz2")
BATCH_ROWS = 256  # Parquet rows in memory at a time


@dataclass(frozen=True)
class Document:
    """One document: plain text, or the messages of a chat; `where` is file and line or row, for errors."""

    where: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None  # that the chat's assistant may call

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name its content: equal documents have equal ones, wherever they stand.

        Salted: text that was sampled or sorted by a plain hash of its content is spread by this one all the same.
        """
        shown = [self.messages, self.tools] if self.tools else self.messages
        content = self.text if self.text is not None else json.dumps(shown, sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16, person=b"ddk-pipe text").digest()


def find_files(project: Project, sources: list[Source], *, field: str) -> list[Path]:
    """Files behind the names, sorted inside a glob or a folder; raises DdkError if one matches nothing.

    A folder stands for every file below it; like a glob it leaves out names that begin with a dot.
    """
    files: list[Path] = []
    for source in sources:
        if isinstance(source, DatasetSource):
            continue
        pattern = project.path(source, field=field)
        if pattern.is_file():
            files.append(pattern)
            continue
        if pattern.is_dir() and project.output.resolve().is_relative_to(pattern.resolve()):
            raise DdkError(
                f"{field}: {pattern} is a folder that holds the output too",
                hint=f"name its files, e.g. {source}/*.txt",
            )
        names = str(Path(glob.escape(str(pattern)), "**") if pattern.is_dir() else pattern)
        found = sorted(Path(name) for name in glob.glob(names, recursive=True))
        found = [path for path in found if path.is_file()]
        if not found:
            raise DdkError(
                f"{field}: no file {pattern}", hint="mend the path; globs like text/*.jsonl are fine"
            )
        files += found
    return files


def documents(project: Project, domain: Domain, sources: list[Source], *, field: str) -> Iterator[Document]:
    """All documents of the sources in order; raises DdkError naming file and line of a bad one."""
    for source in sources:
        if isinstance(source, DatasetSource):
            yield from _dataset(project, source, domain, field=field)
        else:
            for path in find_files(project, [source], field=field):
                yield from _file(path, domain)


def _file(path: Path, domain: Domain) -> Iterator[Document]:
    try:
        yield from _READERS.get(_kind(path), _plain)(path, domain)
    except PermissionError:
        raise DdkError(f"{path}: no permission to read it", hint="change its mode or owner") from None
    except OSError as problem:
        raise DdkError(
            f"{path}: cannot be read ({problem})", hint="is it complete and what its name says?"
        ) from None


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    compression = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get(path.suffix)
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20)


def _jsonl(path: Path, domain: Domain) -> Iterator[Document]:
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield _record(_json(line, where), domain, where)


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise DdkError(f"{where}: not UTF-8 (byte {problem.start})", hint="save the file as UTF-8") from None
    except json.JSONDecodeError as problem:
        raise DdkError(
            f"{where}: not JSON ({problem.msg}, column {problem.colno})",
            hint="one JSON object a line; mend or drop it",
        ) from None


def _parquet(path: Path, domain: Domain) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid as problem:
        raise DdkError(f"{path}: not Parquet ({problem})", hint="write it again") from None
    columns = [
        name
        for name in (domain.text_field, domain.messages_field, domain.tools_field)
        if name in table.schema_arrow.names
    ]
    row = 0
    for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
        for record in batch.to_pylist():
            row += 1
            yield _record(record, domain, f"{path}: row {row}", structs=True)


def _plain(path: Path, domain: Domain) -> Iterator[Document]:
    with _open(path) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as problem:
        line = content[: problem.start].count(b"\n") + 1
        raise DdkError(
            f"{path}:{line}: not UTF-8 (byte {problem.start})", hint="save the file as UTF-8"
        ) from None
    if text.strip():
        yield Document(where=str(path), text=text)


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _jsonl, ".parquet": _parquet}


def _dataset(project: Project, source: DatasetSource, domain: Domain, *, field: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise DdkError(
            f"{field}: dataset {source.dataset} needs the package `datasets`",
            hint=install_hint("datasets"),
        ) from None
    name = project.model(source.dataset, field=field)
    try:
        rows = datasets.load_dataset(
            name, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except Exception as problem:  # noqa: BLE001 - the library raises dozens of kinds
        first_line = str(problem).split("\n")[0]
        raise DdkError(
            f"{field}: dataset {source.dataset} cannot be opened ({first_line})",
            hint="check id, config, split and network",
        ) from None
    for number, record in enumerate(rows, 1):
        yield _record(record, domain, f"{source.dataset}: row {number}", structs=True)


def _record(record: Any, domain: Domain, where: str, *, structs: bool = False) -> Document:
    """One record as a document; `structs`: from Arrow, where every field of every record is there, null or not."""
    if not isinstance(record, dict):
        raise DdkError(f"{where}: not a JSON object", hint=f'write {{"{domain.text_field}": "..."}}')
    messages = record.get(domain.messages_field)
    if messages is not None:
        tools = record.get(domain.tools_field) if domain.tools_field else None
        messages, tools = read_chat(messages, tools, where, field=domain.messages_field, structs=structs)
        return Document(where=where, messages=messages, tools=tools)
    text = record.get(domain.text_field)
    if not isinstance(text, str):
        known = ", ".join(map(str, record)) or "none"
        raise DdkError(
            f"{where}: no field {domain.text_field!r} with text (fields: {known})",
            hint="set text_field or messages_field of the domain",
        )
    return Document(where=where, text=text)
