"""Tables for people, on standard output."""

from __future__ import annotations

from math import exp

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 120  # columns, where standard output is no terminal


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
