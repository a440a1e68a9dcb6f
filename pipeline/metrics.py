"""The run's record: rows appended as JSON lines while it runs, and the same rows as Parquet to read.

JSON lines survive a kill at any moment; Parquet is what reports and people read. Two tables per run:
`steps` (one row per optimizer step) and `validation` (one row per domain at each weight update).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable

TABLES = ("steps", "validation")
LAST_BYTES = 1 << 16  # holds the last rows of any table


class Record:
    """Tables of one run in `folder`; `last_step` drops what came after the step a run resumes from.

    With `writes` False nothing is written: several processes have one record.
    """

    def __init__(self, folder: Path, *, last_step: int, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        if not writes:
            return
        durable.make_folder(folder)
        for table in TABLES:
            rows = [row for row in read_rows(folder, table) if row["step"] <= last_step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            durable.write_file(self._lines(table), text.encode())

    def _lines(self, table: str) -> Path:
        return self.folder / f"{table}.jsonl"

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Append one row; every row has a `step`."""
        if not self.writes:
            return
        path = self._lines(table)
        with durable.naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Make the rows so far durable: no checkpoint may know of a step whose row a power loss can take away."""
        for table in TABLES if self.writes else ():
            path = self._lines(table)
            with durable.naming(path), open(path, "rb") as file:
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Write the Parquet form of both tables."""
        if not self.writes:
            return
        for table in TABLES:
            rows = read_rows(self.folder, table)
            if rows:
                self._write_parquet(self.folder / f"{table}.parquet", rows)

    def _write_parquet(self, path: Path, rows: list[dict[str, Any]]) -> None:
        partial = durable.partial_name(path)
        try:
            with durable.naming(path):
                pq.write_table(pa.Table.from_pylist(rows), partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_rows(folder: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table, oldest first; a line cut short by a kill ends the table.

    Raises DdkError for a line that is JSON and no row.
    """
    path = folder / f"{table}.jsonl"
    rows: list[dict[str, Any]] = []
    if path.exists():
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not _is_row(row):
                raise DdkError(
                    f"{path}: line {number} is no row of a run's record",
                    hint="delete that run's folder and train it again",
                )
            rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and type(row.get("step")) is int


def last_row(folder: Path, table: str) -> dict[str, Any] | None:
    """The last whole row of a table, without reading the others; none if there is none."""
    path = folder / f"{table}.jsonl"
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a kill, or by the place we began to read at
            continue
        if _is_row(row):
            return dict(row)
    return None
