"""When a run of a sweep ends early: the median rule.

After Golovin et al., Google Vizier (KDD 2017), section 3.2.2: a run is stopped at a step if the best it has reached by
then is worse than the median of what the others had reached by that step. There the others' running averages
are taken; here their best values too, because a gap falls from its first value on and an average would lag behind it.

What makes the outcome a function of the sweep file, one run at a time: a group is judged by its first seed alone and
against the first seeds of the groups before it, and its other seeds stop where the first one did. So no group is
ranked by its lucky seeds only. With several runs at once it depends on how far those before have come.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.stages.sweep.table import read_note

STOPPED = "stopped early"


@dataclass(frozen=True)
class Judge:
    """Says of one run whether it is clearly bad. Plain values: other machines read it."""

    run: Path  # the run's folder
    leader: Path | None  # the note of the group's first seed; none: this is the first
    before: tuple[tuple[Path, Path], ...]  # (folder, note) of the first seeds of the groups before
    first_step: int  # judged from here on
    others: int  # so many must have come as far

    def is_bad(self, step: int) -> bool:
        """At a step that the run has just validated at."""
        if self.leader is not None:
            stop = stopped_at(self.leader)
            return stop is not None and step >= stop
        if step < self.first_step:
            return False
        reached = [best for run, note in self.before if (best := _best_by(step, run, note)) is not None]
        if len(reached) < self.others:
            return False
        mine = min(_mean_gaps(self.run, step).values())
        return mine > statistics.median(reached)


def stopped_at(note: Path) -> int | None:
    """The step at which a run was stopped early, by the sweep's note of it; none if it was not."""
    noted = read_note(note)
    return int(noted["step"]) if noted.get("status") == STOPPED else None


def _best_by(step: int, run: Path, note: Path) -> float | None:
    """The least mean gap by this step of a run that came as far, or was stopped early before; else none."""
    gaps = _mean_gaps(run)
    by_then = [gap for at, gap in gaps.items() if at <= step]
    came_so_far = bool(gaps) and (max(gaps) >= step or stopped_at(note) is not None)
    return min(by_then) if by_then and came_so_far else None


def _mean_gaps(run: Path, last_step: int | None = None) -> dict[int, float]:
    """{step: mean gap over the domains, nats per token} of a run's validations."""
    gaps: dict[int, list[float]] = {}
    for row in read_rows(run, "validation"):
        if last_step is None or row["step"] <= last_step:
            gaps.setdefault(row["step"], []).append(row["gap"])
    return {step: statistics.fmean(values) for step, values in gaps.items()}
