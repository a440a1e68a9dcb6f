"""What a sweep knows of its runs: one row each, read from the runs' own records, as Parquet and for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict
from rich.markup import escape

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import RunSpec
from ddk_pipe.pipeline.metrics import last_row, read_rows
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common import load_run, new_table, terminal

RESULTS = "results.parquet"
Row = dict[str, Any]


class _Note(BaseModel):
    """How a run ended."""

    model_config = ConfigDict(strict=True, extra="allow")
    status: str
    error: str | None = None


def note_of(folder: Path, name: str) -> Path:
    """Where the sweep in `folder` notes how a run of it ended."""
    return folder / "runs" / f"{name}.json"


def read_note(note: Path) -> dict[str, Any]:
    """What a note says, nothing if there is none; raises DdkError for a damaged one."""
    try:
        return _Note.model_validate_json(note.read_bytes()).model_dump() if note.is_file() else {}
    except ValueError:
        raise DdkError(f"{note}: damaged", hint="remove it") from None


def row_of(run: RunSpec, run_folder: Path, note: Path) -> Row:
    """A run's row: what it is, how it stands, and what its record says of the last validation.

    `gap_nats`, `student_ce` and `teacher_ce` are means over the domains, nats per token; with `.<domain>` of one.
    `status` is finished, stopped early, failed, unfinished or pending.
    """
    row: Row = {
        "run": run.name,
        "group": run.group,
        "seed": run.seed,
        "status": "pending",
        "error": None,
        "settings": json.dumps(run.changes, sort_keys=True),
        "steps": 0,
    }
    summary = run_folder / "run.json"
    if summary.is_file():
        names = ("steps", "tokens", "parameters", "cache_fingerprint", "seconds", "tokens_per_second")
        facts = load_run(run_folder).summary or {}
        row |= {"status": "finished"} | {name: facts.get(name) for name in names}
    elif (last := last_row(run_folder, "steps")) is not None:
        row |= {"status": "unfinished", "steps": last["step"]}
    if row["status"] != "finished" and (noted := read_note(note)):
        row |= {"status": noted["status"], "error": noted["error"] or None}
    return row | _last_validation(run_folder)


def _last_validation(run_folder: Path) -> Row:
    rows = read_rows(run_folder, "validation")
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    if not last:
        return {}
    means = {name: sum(row[name] for row in last) / len(last) for name in ("gap", "student_ce", "teacher_ce")}
    out: Row = {
        "gap_nats": means["gap"],
        "student_ce": means["student_ce"],
        "teacher_ce": means["teacher_ce"],
    }
    for row in last:
        for name, column in (
            ("gap", "gap_nats"),
            ("student_ce", "student_ce"),
            ("teacher_ce", "teacher_ce"),
            ("weight", "weight"),
        ):
            out[f"{column}.{row['domain']}"] = row[name]
    return out


def write_results(folder: Path, rows: list[Row]) -> None:
    """Put the table in its place, whole; a column that a row lacks is null there."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    path = folder / RESULTS
    durable.make_folder(folder)
    partial = durable.partial_name(path)
    pq.write_table(table, partial)
    partial.replace(path)


def show_results(title: str, rows: list[Row]) -> None:
    """To the terminal: finished runs first, the smallest mean gap on top, then those that were stopped early."""
    out = new_table(title, "run", "status", "steps", "mean gap, nats", "tokens/s", "seconds")
    ranks = {"finished": 0, "stopped early": 1}
    order = sorted(
        rows,
        key=lambda row: (ranks.get(row["status"], 2), row.get("gap_nats", float("inf")), row["run"]),
    )
    for row in order:
        done, ranked = row["status"] == "finished", row["status"] in ranks
        out.add_row(
            escape(_title(row)),
            row["status"],
            f"{row['steps']:,}",
            f"{row['gap_nats']:.4f}" if ranked and "gap_nats" in row else "",
            f"{row['tokens_per_second']:,.0f}" if done else "",
            f"{row['seconds']:,.0f}" if done else "",
        )
    console = terminal()
    console.print(out)
    for row in order:
        if row["error"]:
            console.print(f"{_title(row)} failed: {row['error']}", markup=False)


def _title(row: Row) -> str:
    return f"{row['group']}, seed {row['seed']}"
