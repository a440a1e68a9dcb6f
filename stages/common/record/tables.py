"""The figures of a run's record as rows of text: the report, `evaluate` and the model card show the same."""

from __future__ import annotations

from typing import Any

from ddk_pipe.stages.common.record.run import RunRecord
from ddk_pipe.stages.common.tables import TableData, perplexity


def domain_rows(run: RunRecord) -> TableData:
    """Perplexities and weights, first and last."""
    first = {row["domain"]: row for row in reversed(run.validation)}
    head = [
        "domain",
        "teacher",
        "student, first",
        "student, last",
        "gap, nats",
        "first weight",
        "last weight",
    ]
    rows = [
        [
            row["domain"],
            f"{perplexity(row['teacher_ce']):,.2f}",
            f"{perplexity(first[row['domain']]['student_ce']):,.2f}",
            f"{perplexity(row['student_ce']):,.2f}",
            f"{row['gap']:.3f}",
            f"{first[row['domain']]['weight']:.3f}",
            f"{row['weight']:.3f}",
        ]
        for row in (run.last if run.validation else [])
    ]
    return TableData("Perplexity on validation windows, and domain weights", head, rows)


def evaluation_tables(runs: list[RunRecord]) -> list[TableData]:
    """What `ddk-pipe evaluate` found: one table of the built-in figures, one of the tasks."""
    several = len(runs) > 1
    builtin, tasks = [], []
    for run in runs:
        mark = (
            [f"{run.group or run.name}, seed {run.seed}" if run.seed is not None else run.name]
            if several
            else []
        )
        for domain, facts in run.evaluation.get("builtin", {}).get("domains", {}).items():
            builtin.append([*mark, domain, *(_figure(facts.get(name)) for name in BUILTIN)])
        for task, figures in run.evaluation.get("tasks", {}).items():
            for metric, value in figures.items():
                tasks.append([*mark, task, metric, _figure(value)])
    head = ["run"] if several else []
    out = []
    if builtin:
        out.append(
            TableData("On the cached validation windows", [*head, "domain", *BUILTIN.values()], builtin)
        )
    if tasks:
        out.append(TableData("lm-eval", [*head, "task", "metric", "value"], tasks))
    return out


BUILTIN = {
    "perplexity": "perplexity",
    "teacher_perplexity": "teacher's",
    "bits_per_byte": "bits/byte",
    "teacher_agreement": "agreement with the teacher",
    "calibration_error": "calibration error (ECE)",
}


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
