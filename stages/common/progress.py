"""Progress with rate and ETA: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line to the user, shown as it is."""
    console.print(escape(text))


class Tracker(Protocol):
    """Advances a progress display by `amount` units; `note` stands at the end of the line."""

    def __call__(self, amount: float, note: str = "") -> None: ...


@contextmanager
def track(what: str, total: float | None, unit: str, *, done: int = 0) -> Iterator[Tracker]:
    """Show progress of `total` units (None: unknown), of which `done` were done before this run."""
    if console.is_terminal:
        with _bar() as progress:
            task = progress.add_task(what, total=total, completed=done, unit=unit, note="", rate="")
            began, moved = time.monotonic(), 0.0

            def advance(amount: float, note: str = "") -> None:
                nonlocal moved
                moved += amount
                rate = moved / max(time.monotonic() - began, 1e-9)
                progress.update(task, advance=amount, note=note, rate=f"{rate:,.0f} {unit}/s")

            yield advance
        return
    yield _Lines(what, total, unit, done)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}  ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=False,
    )


class _Lines:
    """The same for logs."""

    def __init__(self, what: str, total: float | None, unit: str, done: int) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.at, self.moved = float(done), 0.0
        self.began = self.shown = time.monotonic()

    def __call__(self, amount: float, note: str = "") -> None:
        self.at += amount
        self.moved += amount
        now = time.monotonic()
        finished = self.total is not None and self.at >= self.total
        if now - self.shown < LINE_SECONDS and not finished:
            return
        self.shown = now
        rate = self.moved / max(now - self.began, 1e-9)
        share = f"{100 * self.at / self.total:.0f}%" if self.total else f"{self.at:,.0f} {self.unit}"
        eta = (
            f", ETA {clock((self.total - self.at) / rate)}"
            if self.total and rate > 0 and not finished
            else ""
        )
        say(f"{self.what}: {share}, {rate:,.0f} {self.unit}/s{eta}{'  ' + note if note else ''}")


def clock(seconds: float) -> str:
    """65 -> '1:05', 3661 -> '1:01:01'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
