"""A sweep while it runs: its groups in order, how each run stands, what is left to do."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, RunSpec, Sweep, windows_per_step
from ddk_pipe.stages.common import clock
from ddk_pipe.stages.sweep.record import finished_tokens_per_second, trials_before
from ddk_pipe.stages.sweep.search import Trial
from ddk_pipe.stages.sweep.stop import STOPPED, Judge
from ddk_pipe.stages.sweep.table import Row, note_of, read_note, row_of, write_results

ENDED = ("finished", "failed", STOPPED)


@dataclass
class State:
    """Runs by name, in the file's order, a group's seeds behind each other; a search adds some as it goes."""

    sweep: Sweep
    folder: Path
    at_once: int
    runs: dict[str, RunSpec] = field(default_factory=dict)
    projects: dict[str, Project] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    left_tokens: dict[str, int] = field(default_factory=dict)  # of runs that have not ended
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, sweep: Sweep, at_once: int) -> State:
        """As the records say it stands; writes nothing. Raises DdkError for a field or a value that cannot be."""
        runs = sweep.expand()
        state = cls(sweep, sweep.output / "sweeps" / sweep.name, at_once)
        if sweep.spec.search is not None:
            check_space(sweep)
            runs = [run for values in trials_before(state.folder, sweep) for run in sweep.group(values)]
        state.add(runs)
        return state

    def add(self, runs: list[RunSpec]) -> None:
        """More runs, behind those that are there."""
        for run in runs:
            project = project_of(self.sweep, run)
            self.runs[run.name], self.projects[run.name] = run, project
            self.rows[run.name] = row_of(run, project.run, self.note(run.name))
            if not self._is_done(run.name):
                self.left_tokens[run.name] = _tokens(project)

    def check_finished(self) -> None:
        """Every run that is finished is the one that the file asks for now; one that is to have more steps is left to run.

        Raises DdkError, naming what differs. What is compared is what the runs themselves keep: a sweep's own folder
        may be gone, and the manifest may have changed.
        """
        names = [name for name, row in self.rows.items() if row["status"] == "finished"]
        if not names:
            return
        from ddk_pipe.stages.distill import finished_run

        for name in names:
            try:
                summary = finished_run(self.projects[name])
            except DdkError as mistake:
                hint = "delete that folder to train it again, or give the sweep another `name`"
                raise DdkError(mistake.message, hint=hint) from None
            if summary is None:
                self.left_tokens[name] = _tokens(self.projects[name])

    def _is_done(self, name: str) -> bool:
        """Finished; or stopped early by the rule that the file still has. Without it, it goes on where it stopped."""
        if self.rows[name]["status"] == STOPPED:
            return bool(read_note(self.note(name)).get("rule") == self.rule)
        return bool(self.rows[name]["status"] == "finished")

    @property
    def rule(self) -> dict[str, Any] | None:
        """By which runs are stopped early, as the notes keep it."""
        rule = self.sweep.spec.stop_early
        return rule.model_dump() if rule else None

    def note(self, name: str) -> Path:
        """Where it is noted how a run ended."""
        return note_of(self.folder, name)

    @property
    def groups(self) -> list[list[RunSpec]]:
        """Runs that differ by their seed alone; of a search, its trials."""
        return [list(runs) for _, runs in itertools.groupby(self.runs.values(), lambda run: run.changes)]

    @property
    def total(self) -> int:
        """Number of runs, with those that a search has still to name."""
        return max(len(self.runs), self.sweep.spec.size)

    @property
    def trials(self) -> list[Trial]:
        """What a search knows so far, in order."""
        return [self._trial(runs) for runs in self.groups]

    def _trial(self, runs: list[RunSpec]) -> Trial:
        rows = [self.rows[run.name] for run in runs]
        stands = {row["status"] for row in rows}
        if "failed" in stands or not stands <= set(ENDED):
            return Trial(runs[0].changes, "failed" if "failed" in stands else "running")
        return Trial(
            runs[0].changes,
            "stopped early" if STOPPED in stands else "complete",
            statistics.fmean(row["gap_nats"] for row in rows),
            min(row["steps"] for row in rows),
        )

    def judge(self, name: str) -> Judge | None:
        """Who says whether the run is clearly bad; none where the file asks for no early stop."""
        rule, groups = self.sweep.spec.stop_early, self.groups
        if rule is None:
            return None
        place = next(at for at, runs in enumerate(groups) if name in {run.name for run in runs})
        leaders = [runs[0].name for runs in groups[: place + 1]]
        return Judge(
            run=self.projects[name].run,
            leader=None if leaders[-1] == name else self.note(leaders[-1]),
            before=tuple((self.projects[leader].run, self.note(leader)) for leader in leaders[:-1]),
            first_step=math.ceil(rule.after * self.projects[name].manifest.distill.steps),
            others=rule.others,
        )

    def write(self, names: list[str]) -> None:
        """Read the records of these runs again and write the table; what has ended takes no more time."""
        for name in names:
            self.rows[name] = row_of(self.runs[name], self.projects[name].run, self.note(name))
            if self.rows[name]["status"] in ENDED:
                self.left_tokens.pop(name, None)
        write_results(self.folder, list(self.rows.values()))

    def count(self, *statuses: str) -> int:
        """Runs that stand so."""
        return sum(row["status"] in statuses for row in self.rows.values())

    def eta(self) -> str:
        """Time to go by the rate of finished runs, of this sweep and of others beside it."""
        rates = [row["tokens_per_second"] for row in self.rows.values() if row["status"] == "finished"]
        rates = rates or finished_tokens_per_second(self.folder.parent.parent)
        unnamed = self.total - len(self.runs)
        left = sum(self.left_tokens.values())
        left += unnamed * _tokens(project_of(self.sweep, self.sweep.group({})[0])) if unnamed else 0
        if not left:
            return "nothing left to do"
        if not rates:
            return "no finished run to tell the time by yet"
        return f"about {clock(left / statistics.median(rates) / self.at_once)} to go"


def project_of(sweep: Sweep, run: RunSpec) -> Project:
    """The run's checked manifest; raises DdkError that names the sweep's file and what the run changes."""
    try:
        return run.project(sweep.manifest)
    except DdkError as mistake:
        where = f" ({run.group})" if run.changes else ""
        message = mistake.message.removeprefix(f"{sweep.manifest}: ")
        raise DdkError(f"{sweep.path}{where}: {message}", hint=mistake.hint) from None


def check_space(sweep: Sweep) -> None:
    """Raises DdkError for a field that is not there, and for values that it does not take."""
    for name, dimension in sweep.spec.search.space.items() if sweep.spec.search else ():
        for value in dimension.examples():
            try:
                project_of(sweep, sweep.group({name: value})[0])
            except DdkError as mistake:
                if "valid integer" in mistake.message and dimension.step is None:
                    raise DdkError(mistake.message, hint=f"give {name} `step: 1`: whole numbers") from None
                raise


def _tokens(project: Project) -> int:
    options, seq_len = project.manifest.distill, project.manifest.seq_len
    return options.steps * windows_per_step(options, seq_len) * seq_len
