"""Tables for people, on standard output."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 120  # columns, where standard output is no terminal


@dataclass(frozen=True)
class TableData:
    """A table of ready text."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def terminal() -> Console:
    """Standard output; as wide as a screen where it is no terminal."""
    width = None if Console().is_terminal else WIDTH
    return Console(highlight=False, width=width, soft_wrap=False)


def new_table(title: str, *columns: str) -> Table:
    """An empty table: names on the left, figures on the right."""
    out = Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return out


def perplexity(nats: float) -> float:
    """exp, which no broken run makes infinite."""
    return exp(min(nats, 50.0))


def show_table(table: TableData) -> None:
    """On standard output."""
    shown = new_table(table.caption, *table.head)
    for row in table.rows:
        shown.add_row(*map(escape, row))
    terminal().print(shown)
