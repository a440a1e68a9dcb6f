"""Tables -> records: Parquet by batches, and CSV and TSV by lines."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, reason
from ddk_pipe.pipeline.manifest import Domain
from ddk_pipe.pipeline.text.sources.opening import text_lines
from ddk_pipe.pipeline.text.sources.records import Document, listed, read_record, text_document

BATCH_ROWS = 256  # Parquet rows in memory at a time


def row_groups(path: Path) -> list[tuple[int, int]]:
    """Rows and packed bytes of each row group. Raises DdkError for what is not Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        groups = pq.ParquetFile(path).metadata
        found = [groups.row_group(number) for number in range(groups.num_row_groups)]
        return [
            (group.num_rows, sum(group.column(at).total_compressed_size for at in range(group.num_columns)))
            for group in found
        ]
    except pa.ArrowException as problem:
        raise DdkError(
            f"{path}: not Parquet that can be read ({reason(problem)})", hint="write it again"
        ) from None


def read_parquet(
    path: Path, domain: Domain, first: int = 0, last: int | None = None, *, before: int = 0
) -> Iterator[Document]:
    """The text or chat of every row; of row groups `first` to `last` (left out), `before` rows stand before them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = before
    try:
        table = pq.ParquetFile(path)
        names = table.schema_arrow.names
        wanted = (domain.text_field, domain.messages_field, domain.tools_field)
        columns = [name for name in wanted if name in names]
        _check_columns(path, names, domain, rows=table.metadata.num_rows)
        groups = range(first, table.num_row_groups if last is None else last)
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns, row_groups=groups):
            for record in _rows(batch, path, row):
                row += 1
                yield read_record(record, domain, f"{path}: row {row}", structs=True)
    except pa.ArrowException as problem:
        raise DdkError(
            f"{path}: not Parquet that can be read, after row {row} ({reason(problem)})",
            hint="write it again",
        ) from None


def _check_columns(path: Path, names: list[str], domain: Domain, *, rows: int) -> None:
    wanted = (domain.text_field, domain.messages_field)
    for name in wanted:
        if names.count(name) > 1:
            raise DdkError(f"{path}: column {name!r} is there twice", hint="write it again with one of them")
    if rows and not set(wanted) & set(names):
        raise DdkError(
            f"{path}: no column {domain.text_field!r} (columns: {listed(names)})",
            hint="set text_field or messages_field of the domain",
        )


def _rows(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    """The batch as Python values; one row at a time where that fails, to name the row."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, TypeError):  # not UTF-8, a time out of range, columns of one name
        found: list[dict[str, Any]] = []
    for index in range(batch.num_rows):
        where = f"{path}: row {before + index + 1}"
        try:
            found += batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError:
            raise DdkError(f"{where}: a string that is not UTF-8", hint="write it again as UTF-8") from None
        except (ValueError, OverflowError, TypeError) as problem:
            raise DdkError(f"{where}: cannot be read ({reason(problem)})", hint="write it again") from None
    return found


def read_csv(path: Path, domain: Domain) -> Iterator[Document]:
    """The text column of a comma-separated file with a header."""
    return _delimited(path, domain, ",")


def read_tsv(path: Path, domain: Domain) -> Iterator[Document]:
    """The text column of a tab-separated file with a header."""
    return _delimited(path, domain, "\t")


def _delimited(path: Path, domain: Domain, delimiter: str) -> Iterator[Document]:
    """By the standard library and not pyarrow.csv: that names no line, and refuses a document longer than its block."""
    csv.field_size_limit(sys.maxsize)  # a document is a field; the default is 128 KiB
    rows = csv.reader((line for _, line in text_lines(path)), delimiter=delimiter, strict=True)
    first, names = 1, None
    try:
        for row in rows:
            if row and names is None:
                names, column = row, _text_column(path, row, domain)
            elif row and names is not None:
                where = f"{path}:{first}"
                if len(row) != len(names):
                    raise DdkError(
                        f"{where}: {len(row)} fields, and the header names {len(names)} columns",
                        hint="quote fields that hold the delimiter, a quote or a line end",
                    )
                yield text_document(row[column], where)
            first = rows.line_num + 1
    except csv.Error as problem:
        raise DdkError(
            f"{path}:{first}: not a table's row ({reason(problem)})",
            hint="quote fields that hold the delimiter, a quote or a line end; double a quote inside them",
        ) from None


def _text_column(path: Path, names: list[str], domain: Domain) -> int:
    if domain.messages_field in names:
        raise DdkError(
            f"{path}: a column {domain.messages_field!r}, but no chat can stand in a table of text",
            hint="write chats as JSON lines or Parquet",
        )
    if names.count(domain.text_field) != 1:
        how = "twice" if domain.text_field in names else "not there"
        raise DdkError(
            f"{path}: column {domain.text_field!r} is {how} (columns: {listed(names)})",
            hint="set text_field of the domain to the column with the text; the first line names the columns",
        )
    return names.index(domain.text_field)
