"""The figures of a report as rows of text, for the page and for the terminal."""

from __future__ import annotations

from rich.markup import escape

from ddk_pipe.stages.common import TableData, domain_rows, evaluation_tables, perplexity, show_table, terminal
from ddk_pipe.stages.report.data import Report, state_of


def answer(report: Report) -> str:
    """The one sentence somebody opens the report for."""
    if not report.is_sweep:
        run = report.runs[0]
        if not run.validation:
            return "No validation has been recorded yet."
        first = [row["gap"] for row in run.validation if row["step"] == run.validation[0]["step"]]
        return (
            f"Mean validation gap to the teacher {sum(first) / len(first):.3f} → {run.gap_nats:.3f} nats/token"
            f" after {run.step:,} steps."
        )
    if not report.groups:
        return "No run has finished yet."
    best = report.groups[0]
    text = f"Best: {best.name}, mean validation gap {_pm(best.gap, best.gap_error)} nats/token."
    if len(report.groups) > 1:
        second = report.groups[1]
        text += f" Next: {second.name}, {_pm(second.gap, second.gap_error)}"
        if second.difference is not None and second.pairs > 1:
            text += f"; seed by seed {_pm(second.difference, second.difference_error)} worse ({second.pairs} pairs)"
            if second.difference < 2 * (second.difference_error or 0.0):
                text += ", which these seeds cannot tell from nothing"
        text += "."
    return text


def _pm(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def ranking_rows(report: Report) -> TableData:
    """Groups, the best first; ± is the standard error over seeds."""
    head = [
        "group",
        "seeds",
        "gap, nats/token",
        "difference to the best, by seed",
        "perplexity ratio",
        "tokens/s",
    ]
    rows = []
    for group in report.groups:
        speeds = [run.summary["tokens_per_second"] for run in group.runs if run.summary]
        difference = (
            f"{_pm(group.difference, group.difference_error)} ({group.pairs})"
            if group.difference is not None
            else ""
        )
        rows.append(
            [
                group.name,
                str(len(group.runs)),
                _pm(group.gap, group.gap_error),
                difference,
                f"{perplexity(group.gap):.3f}",
                f"{sum(speeds) / len(speeds):,.0f}" if speeds else "",
            ]
        )
    return TableData("Groups of runs that differ by their seed alone; ± is the standard error", head, rows)


def stopped_rows(report: Report) -> TableData:
    """Groups that the sweep's rule ended, apart from the ranking: their gaps are of fewer steps."""
    rows = [
        [group.name, str(len(group.runs)), f"{group.step:,}", _pm(group.gap, group.gap_error)]
        for group in report.stopped
    ]
    return TableData(
        "Stopped early by the median rule; gaps where they stopped",
        ["group", "seeds", "step", "gap, nats/token"],
        rows,
    )


def show(report: Report) -> None:
    """The report as text on standard output."""
    console = terminal()
    console.print(escape(report.title))
    console.print(escape(answer(report)))
    tables = [ranking_rows(report), stopped_rows(report)]
    tables += [domain_rows(report.runs[0])] if len(report.runs) == 1 else []
    for table in [*tables, *evaluation_tables(report.runs)]:
        if table.rows:
            show_table(table)
    for run in report.unfinished:
        console.print(escape(f"{run.name}: {state_of(run)}"))
