"""`ddk-pipe sweep`: many students from one read-only cache."""

from __future__ import annotations

import fcntl
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer

from ddk_pipe.pipeline import durable
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.sweep_spec import RunSpec, Sweep, load_sweep
from ddk_pipe.stages.progress import clock, say
from ddk_pipe.stages.stopping import stops_in_time
from ddk_pipe.stages.sweep_record import cache_changed, finished_tokens_per_second, write_record
from ddk_pipe.stages.sweep_run import Job, Outcome
from ddk_pipe.stages.sweep_table import Row, note_of, row_of, show_results, write_results
from ddk_pipe.stages.tables import new_table, terminal
from ddk_pipe.stages.training.checks import windows_per_step

ASK_BEYOND = 200  # runs: more are asked for
LISTED = 30  # runs printed before a sweep starts
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Request:
    """How a sweep is to be run; see the command's help."""

    parallel: int | None = None  # runs at once; none: one here, on Ray as many as there is room for
    engine: str = "local"
    threads: int | None = None  # of torch per run on a CPU; none: the cores, shared out among the runs here
    yes: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """Raises DdkError for what cannot be."""
        if self.engine not in ENGINES:
            raise DdkError(f"--engine {self.engine}: unknown", hint=f"use one of {', '.join(ENGINES)}")
        for name, value in (("--parallel", self.parallel), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise DdkError(f"{name} {value}: at least 1", hint=f"leave {name} out, or raise it")


@dataclass
class _State:
    """The sweep while it runs."""

    sweep: Sweep
    folder: Path
    runs: dict[str, RunSpec]
    projects: dict[str, Project]
    rows: dict[str, Row]
    left_tokens: dict[str, int]  # of runs that are not finished
    at_once: int
    began: float = field(default_factory=time.monotonic)

    def write(self, names: list[str]) -> None:
        """Read the records of these runs again and write the table; what has ended takes no more time."""
        for name in names:
            self.rows[name] = row_of(self.runs[name], self.projects[name].run, note_of(self.folder, name))
            if self.rows[name]["status"] in ("finished", "failed"):
                self.left_tokens.pop(name, None)
        write_results(self.folder, list(self.rows.values()))

    def count(self, status: str) -> int:
        return sum(row["status"] == status for row in self.rows.values())

    def eta(self) -> str:
        """Time to go by the rate of finished runs, of this sweep and of others beside it."""
        rates = [row["tokens_per_second"] for row in self.rows.values() if row["status"] == "finished"]
        output = next(iter(self.projects.values())).output
        rates = rates or finished_tokens_per_second(output)
        left = sum(self.left_tokens.values())
        if not left:
            return "nothing left to do"
        if not rates:
            return "no finished run to tell the time by yet"
        return f"about {clock(left / statistics.median(rates) / self.at_once)} to go"


def sweep(path: Path, request: Request | None = None) -> list[Row]:
    """Run what is not finished of the sweep file; returns the table, one row per run, in the file's order.

    Raises DdkError for a file that is wrong, for a cache that is not the one the sweep began with, if another process
    runs the sweep, and at the end if runs have failed.
    """
    request = request or Request()
    request.check()
    plan = load_sweep(path)
    state = _open(plan, request)
    _announce(state, request)
    if request.dry_run:
        return list(state.rows.values())
    with _alone(state.folder):
        caches = write_record(state.folder, plan, state.runs, state.projects)
        jobs = [_job(state, name, caches[name], request) for name in state.left_tokens]
        for job in jobs:  # an earlier failure says nothing of the new attempt
            note_of(state.folder, job.run.name).unlink(missing_ok=True)
        state.write(list(state.left_tokens))
        try:
            if jobs:
                with stops_in_time():
                    _engine(request, jobs)(_listener(state))
        finally:
            state.write(list(state.left_tokens))
    return _close(state)


def status(path: Path) -> list[Row]:
    """Print how every run of the sweep stands; writes nothing."""
    state = _open(load_sweep(path), Request(yes=True))
    show_results(f"sweep {state.sweep.name}", list(state.rows.values()))
    return list(state.rows.values())


def _open(plan: Sweep, request: Request) -> _State:
    if plan.spec.size > ASK_BEYOND and not request.yes:
        _ask(plan)
    runs = {run.name: run for run in plan.expand()}
    projects = {name: _project(plan, run) for name, run in runs.items()}
    folder = next(iter(projects.values())).output / "sweeps" / plan.name
    left = {}
    for name, project in projects.items():
        options = project.manifest.distill
        windows = windows_per_step(options, project.manifest.seq_len)
        left[name] = options.steps * windows * project.manifest.seq_len
    at_once = request.parallel or 1
    state = _State(plan, folder, runs, projects, {}, left, at_once)
    for name, run in runs.items():
        state.rows[name] = row_of(run, projects[name].run, note_of(folder, name))
        if state.rows[name]["status"] == "finished":
            del state.left_tokens[name]
    return state


def _ask(plan: Sweep) -> None:
    question = f"{plan.path}: {plan.spec.size:,} runs"
    if not sys.stdin.isatty():
        raise DdkError(f"{question}, more than {ASK_BEYOND}", hint="add --yes if that is what you want")
    if not typer.confirm(f"{question}. Go on?", err=True):
        raise DdkError(f"{question}: not started", hint="make the grid smaller")


def _project(plan: Sweep, run: RunSpec) -> Project:
    try:
        return run.project(plan.manifest)
    except DdkError as mistake:
        where = "" if run.group == "as in the manifest" else f" ({run.group})"
        message = mistake.message.removeprefix(f"{plan.manifest}: ")
        raise DdkError(f"{plan.path}{where}: {message}", hint=mistake.hint) from None


def _announce(state: _State, request: Request) -> None:
    rows = list(state.rows.values())
    table = new_table(
        f"sweep {state.sweep.name}: {len(rows):,} runs", "run", "seed", "status", "tokens to go"
    )
    for row in rows[:LISTED]:
        left = state.left_tokens.get(row["run"])
        table.add_row(row["group"], str(row["seed"]), row["status"], f"{left:,}" if left else "")
    terminal().print(table)
    if len(rows) > LISTED:
        say(f"sweep: and {len(rows) - LISTED:,} more")
    how = f"{state.at_once} at once" if request.parallel or request.engine == "local" else "on Ray"
    done = state.count("finished")
    say(f"sweep: {done} of {len(rows)} runs are finished, {how}, {state.eta()}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises DdkError if another process runs this sweep; the system frees the lock of one that was killed."""
    durable.make_folder(folder)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DdkError(
                f"{folder}: another process runs this sweep",
                hint="wait for it, or give the file another `name`",
            ) from None
        yield
    finally:
        os.close(handle)


def _job(state: _State, name: str, cache: str | None, request: Request) -> Job:
    threads = request.threads
    if threads is None and (request.engine == "ray" or state.at_once > 1):
        threads = max(1, (os.cpu_count() or 1) // state.at_once) if request.engine == "local" else 1
    log = state.folder / "logs" / f"{name}.log" if state.at_once > 1 else None
    return Job(state.runs[name], state.sweep.manifest, cache, threads, log)


def _engine(request: Request, jobs: list[Job]) -> Callable[[Callable[[Outcome], None]], None]:
    if request.engine == "ray":
        from ddk_pipe.stages.engines import runs_ray

        return lambda report: runs_ray.run(jobs, report, workers=request.parallel)
    from ddk_pipe.stages.engines import runs_local

    return lambda report: runs_local.run(jobs, report, workers=request.parallel or 1)


def _listener(state: _State) -> Callable[[Outcome], None]:
    """What hears of every run that ends: notes it, writes the table, says how far the sweep is."""

    def listen(outcome: Outcome) -> None:
        if outcome.status == "cache changed":
            raise cache_changed(state.projects[outcome.name].cache.name)
        note = {"status": outcome.status, "error": outcome.error, "seconds": outcome.seconds}
        durable.write_file(note_of(state.folder, outcome.name), durable.to_json(note))
        state.write([outcome.name])
        row = state.rows[outcome.name]
        told = (
            f"failed: {outcome.error}"
            if row["status"] == "failed"
            else f"mean gap {row['gap_nats']:.4f} nats/token"
        )
        ended = state.count("finished") + state.count("failed")
        say(f"sweep: {ended} of {len(state.rows)}: {row['group']}, seed {row['seed']}: {told}, {state.eta()}")

    return listen


def _close(state: _State) -> list[Row]:
    rows = list(state.rows.values())
    show_results(f"sweep {state.sweep.name}", rows)
    say(f"sweep: table in {state.folder / 'results.parquet'}; see `ddk-pipe report {state.folder}`")
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        first = failed[0]
        raise DdkError(
            f"{len(failed)} of {len(rows)} runs failed, the first: {first['group']}, seed {first['seed']}:"
            f" {first['error']}",
            hint="mend it and run the same command again: only what is not finished is run",
        )
    return rows
