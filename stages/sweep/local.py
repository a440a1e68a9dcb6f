"""Runs of a sweep on this machine: worker processes that take one run after the other.

Also one at a time they are in a process of their own: a run that is killed for its memory fails alone.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from ddk_pipe.stages.common import gone_in_time, grace_seconds, say, stops_in_time
from ddk_pipe.stages.sweep.run import Job, Outcome, run_one

Report = Callable[[Outcome], None]


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None  # that it has and has not reported


def run(jobs: Iterator[Job], report: Report, *, workers: int) -> None:
    """Hand the jobs out in order, each taken when there is a worker for it; `report` hears of each as it ends.

    What report() raises stops the others. On Ctrl-C and SIGTERM (raised here as KeyboardInterrupt) the runs under
    way write their checkpoints first.
    """
    crew: list[_Worker] = []
    try:
        while True:
            _hand_out(jobs, crew, workers)
            busy = [worker.connection for worker in crew if worker.job]
            if not busy:
                return
            ready = wait(busy)
            for place, worker in enumerate(crew):
                if worker.job and worker.connection in ready:
                    outcome = _answer(worker)
                    if outcome is None:
                        outcome, crew[place] = _died(worker), _start()
                    worker.job = None
                    report(outcome)
    finally:
        _dismiss(crew)


def _hand_out(jobs: Iterator[Job], crew: list[_Worker], workers: int) -> None:
    """A job for everyone who has none, as long as there are some; workers start as they are needed."""
    for place in range(workers):
        if place < len(crew) and crew[place].job is not None:
            continue
        job = next(jobs, None)
        if job is None:
            return
        if place == len(crew):
            crew.append(_start())
        crew[place] = _hand(crew[place], job)


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _hand(worker: _Worker, job: Job) -> _Worker:
    """Send the job; to a new worker, if this one has died idle."""
    try:
        worker.connection.send(job)
    except OSError:
        worker.connection.close()
        worker = _start()
        worker.connection.send(job)
    worker.job = job
    return worker


def _answer(worker: _Worker) -> Outcome | None:
    try:
        answer: Outcome = worker.connection.recv()
        return answer
    except (EOFError, OSError):
        return None


def _died(worker: _Worker) -> Outcome:
    worker.connection.close()
    worker.process.join()
    code, job = worker.process.exitcode or 0, worker.job
    assert job is not None
    why = f"killed by signal {-code} (out of memory?)" if code < 0 else f"ended with status {code}"
    where = f"; its lines are in {job.log}" if job.log else ""
    return Outcome(job.run.name, "failed", f"the run's process was {why}{where}")


def _dismiss(crew: list[_Worker]) -> None:
    """Idle workers leave when the connection closes; busy ones are told, and get the time to write a checkpoint."""
    for worker in crew:
        if worker.job is not None:
            worker.process.terminate()
        with suppress(OSError):
            worker.connection.close()
    gone_in_time((worker.process for worker in crew), grace_seconds())


def _serve(connection: Connection) -> None:
    """A worker process: runs the jobs that it is sent until the connection closes."""
    os.setsid()  # Ctrl-C goes to the terminal's group: the sweep says when to stop, once
    _leave_with_parent()
    stderr = os.dup(2)
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            job: Job = connection.recv()
            _lines_to(job, stderr)
            with stops_in_time():
                outcome = run_one(job)
            if job.log and outcome.error:
                say(f"sweep: {outcome.error}")
            connection.send(outcome)


def _lines_to(job: Job, stderr: int) -> None:
    sys.stderr.flush()
    if job.log is None:
        os.dup2(stderr, 2)
        return
    job.log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 2)
    os.close(file)


def _leave_with_parent() -> None:
    """Be gone as soon as the sweep is, however it ended: the next one must not meet us in a run's folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
