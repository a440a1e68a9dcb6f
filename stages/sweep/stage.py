"""`ddk-pipe sweep`: many students from one read-only cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Sweep, load_sweep
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common import alone, check_engine, new_table, say, stops_in_time, terminal
from ddk_pipe.stages.sweep.record import cache_changed, write_record
from ddk_pipe.stages.sweep.run import Job, Outcome
from ddk_pipe.stages.sweep.search import need_optuna, propose
from ddk_pipe.stages.sweep.state import ENDED, State
from ddk_pipe.stages.sweep.stop import STOPPED
from ddk_pipe.stages.sweep.table import Row, show_results

ASK_BEYOND = 200  # runs: more are asked for
LISTED = 30  # runs printed before a sweep starts


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
        check_engine(self.engine)
        for name, value in (("--parallel", self.parallel), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise DdkError(f"{name} {value}: at least 1", hint=f"leave {name} out, or raise it")


def sweep(path: Path, request: Request | None = None) -> list[Row]:
    """Run what is not finished of the sweep file; returns the table, one row per run, in the file's order.

    Raises DdkError for a file that is wrong, for a cache that is not the one the sweep began with, if another process
    runs the sweep, and at the end if runs have failed.
    """
    request = request or Request()
    request.check()
    plan = load_sweep(path)
    if plan.spec.search is not None and request.engine == "ray" and request.parallel is None:
        raise DdkError(
            f"{path}: a search on Ray needs to know how many runs at once", hint="add --parallel N"
        )
    state = _open(plan, request)
    _announce(state, request)
    if request.dry_run:
        return list(state.rows.values())
    if plan.spec.search is not None:
        need_optuna()
    hint = "wait for it, or give the file another `name`"
    with alone(state.folder, what="runs this sweep", hint=hint):
        caches = write_record(state.folder, plan, state.runs, state.projects)
        state.check_finished()
        left = list(state.left_tokens)
        for name in left:  # an earlier failure says nothing of the new attempt
            state.note(name).unlink(missing_ok=True)
        state.write(left)
        try:
            if left or len(state.runs) < state.total:
                with stops_in_time():
                    _engine(request, _jobs(state, caches, request), _threads(state, request))(
                        _listener(state)
                    )
        finally:
            state.write(list(state.left_tokens))
    return _close(state)


def status(path: Path) -> list[Row]:
    """Print how every run of the sweep stands; writes nothing."""
    state = _open(load_sweep(path), Request(yes=True))
    show_results(f"sweep {state.sweep.name}", list(state.rows.values()))
    return list(state.rows.values())


def _open(plan: Sweep, request: Request) -> State:
    if plan.spec.size > ASK_BEYOND and not request.yes:
        _ask(plan)
    return State.open(plan, request.parallel or 1)


def _ask(plan: Sweep) -> None:
    question = f"{plan.path}: {plan.spec.size:,} runs"
    if not sys.stdin.isatty():
        raise DdkError(f"{question}, more than {ASK_BEYOND}", hint="add --yes if that is what you want")
    if not typer.confirm(f"{question}. Go on?", err=True):
        raise DdkError(f"{question}: not started", hint="make the grid smaller")


def _announce(state: State, request: Request) -> None:
    rows = list(state.rows.values())
    table = new_table(
        f"sweep {state.sweep.name}: {state.total:,} runs", "run", "seed", "status", "tokens to go"
    )
    for row in rows[:LISTED]:
        left = state.left_tokens.get(row["run"])
        table.add_row(row["group"], str(row["seed"]), row["status"], f"{left:,}" if left else "")
    if rows:
        terminal().print(table)
    if search := state.sweep.spec.search:
        fields = ", ".join(search.space)
        say(f"sweep: {len(state.groups)} of {search.trials} trials of a search over {fields} have begun")
    if len(rows) > LISTED:
        say(f"sweep: and {len(rows) - LISTED:,} more")
    how = f"{state.at_once} at once" if request.parallel or request.engine == "local" else "on Ray"
    done, stopped = state.count("finished"), state.count(STOPPED)
    more = f", {stopped} were stopped early" if stopped else ""
    say(f"sweep: {done} of {state.total} runs are finished{more}, {how}, {state.eta()}")


def _jobs(state: State, caches: dict[str, str | None], request: Request) -> Iterator[Job]:
    """What is left to run; beyond that a search is asked whenever somebody has room for a run."""
    for name in list(state.left_tokens):
        yield _job(state, name, caches[name], request)
    search = state.sweep.spec.search
    while search is not None and len(state.groups) < search.trials:
        values = propose(search, state.trials)
        if values is None:
            say("sweep: the search space holds nothing that was not tried")
            return
        runs = state.sweep.group(values)
        state.add(runs)
        caches = write_record(state.folder, state.sweep, state.runs, state.projects)
        for run in runs:
            if run.name in state.left_tokens:
                yield _job(state, run.name, caches[run.name], request)


def _job(state: State, name: str, cache: str | None, request: Request) -> Job:
    log = state.folder / "logs" / f"{name}.log" if state.at_once > 1 else None
    threads = _threads(state, request)
    return Job(state.runs[name], state.sweep.manifest, cache, threads, log, state.judge(name))


def _threads(state: State, request: Request) -> int | None:
    """CPU threads of each run; none: torch's own choice."""
    if request.threads is not None or (request.engine == "local" and state.at_once == 1):
        return request.threads
    return max(1, (os.cpu_count() or 1) // state.at_once) if request.engine == "local" else 1


def _engine(
    request: Request, jobs: Iterator[Job], threads: int | None
) -> Callable[[Callable[[Outcome], None]], None]:
    if request.engine == "ray":
        from ddk_pipe.stages.sweep import ray as runs_ray

        return lambda report: runs_ray.run(jobs, report, workers=request.parallel, threads=threads or 1)
    from ddk_pipe.stages.sweep import local as runs_local

    return lambda report: runs_local.run(jobs, report, workers=request.parallel or 1)


def _listener(state: State) -> Callable[[Outcome], None]:
    """What hears of every run that ends: notes it, writes the table, says how far the sweep is."""

    def listen(outcome: Outcome) -> None:
        if outcome.status == "cache changed":
            raise cache_changed(state.projects[outcome.name].cache.name)
        note = {"status": outcome.status, "error": outcome.error, "seconds": outcome.seconds}
        if outcome.status == STOPPED:
            note |= {"step": outcome.step, "rule": state.rule}
        durable.write_file(state.note(outcome.name), durable.to_json(note))
        state.write([outcome.name])
        row = state.rows[outcome.name]
        say(
            f"sweep: {state.count(*ENDED)} of {state.total}: {row['group']}, seed {row['seed']}:"
            f" {_told(row)}, {state.eta()}"
        )

    return listen


def _told(row: Row) -> str:
    if row["status"] == "failed":
        return f"failed: {row['error']}"
    where = f"stopped early at step {row['steps']:,}, " if row["status"] == STOPPED else ""
    return f"{where}mean gap {row['gap_nats']:.4f} nats/token"


def _close(state: State) -> list[Row]:
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
