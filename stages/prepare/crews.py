"""Who tokenises parts: this process when a part is asked for, processes on this machine, or actors on a Ray cluster."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Manifest, Project
from ddk_pipe.pipeline.text import Encoder, Part, documents_of, encode, write_pieces
from ddk_pipe.stages.common import MAX_RESTARTS, connect, say
from ddk_pipe.stages.prepare.rules import encoder_now


@dataclass(frozen=True)
class Job:
    """A part of a domain's text, and the file that its tokens are to become; goes to other processes."""

    manifest: Manifest
    root: Path
    domain: str
    field: str
    part: Part
    path: Path


def make_part(job: Job, encoder: Encoder) -> None:
    """Tokenise a part and write it. Raises DdkError for a document that is wrong: nothing is written then."""
    project = Project(job.manifest, job.root)
    domain = job.manifest.domains[job.domain]
    write_pieces(job.path, encode(documents_of(project, domain, job.part, field=job.field), encoder))


class Crew(Protocol):
    """Makes parts; `ahead` of them may be asked for before the first is waited for."""

    ahead: int

    def submit(self, job: Job) -> Future[None]: ...

    def result(self, future: Future[None]) -> None:
        """Wait for a part. Raises DdkError for text that is wrong, and if nobody is left to make it."""

    def give_up(self, futures: list[Future[None]]) -> None:
        """Nobody wants these: once it returns, none is being made."""


@contextmanager
def open_crew(project: Project, encoder: Encoder, *, engine: str, workers: int | None) -> Iterator[Crew]:
    """`workers` processes here (none, or 1: this one), or as many actors on Ray (none: one a CPU)."""
    if engine == "local" and (workers or 1) == 1:
        yield Alone(encoder)
        return
    crew = OnRay(project, workers) if engine == "ray" else Processes(project, workers or 1)
    try:
        yield crew
    finally:
        crew.dismiss()


class Alone:
    """This process; the tokenizer uses all cores."""

    ahead = 1

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def submit(self, job: Job) -> Future[None]:
        future: Future[None] = Future()
        make_part(job, self._encoder)
        future.set_result(None)
        return future

    def result(self, future: Future[None]) -> None:
        future.result()

    def give_up(self, futures: list[Future[None]]) -> None:
        pass


class Processes:
    """`workers` processes on this machine, each with its share of the cores."""

    def __init__(self, project: Project, workers: int) -> None:
        self.ahead = 2 * workers
        self._before = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(project.manifest, project.root, max(1, (os.cpu_count() or 1) // workers)),
        )

    def submit(self, job: Job) -> Future[None]:
        with _worker_died():
            return self._pool.submit(_make, job)

    def result(self, future: Future[None]) -> None:
        with _worker_died():
            future.result()

    def give_up(self, futures: list[Future[None]]) -> None:
        wait([future for future in futures if not future.cancel()])

    def dismiss(self) -> None:
        """What is not finished is left: a part is written whole or not at all."""
        for process in set(multiprocessing.active_children()) - self._before:
            process.terminate()
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _worker_died() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise DdkError(
            "prepare: a worker process died",
            hint="is there memory enough? run the same command again, with fewer --workers",
        ) from None


_ENCODERS: list[Encoder] = []  # of this worker process


def _begin(manifest: Manifest, root: Path, threads: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a part that is not finished is not there
        signal.signal(number, signal.SIG_DFL)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizer
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _ENCODERS.append(encoder_now(Project(manifest, root)))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _make(job: Job) -> None:
    make_part(job, _ENCODERS[0])


class Actor:
    """A tokenizer somewhere on the cluster."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self._project = Project(manifest, root)

    @functools.cached_property
    def _encoder(self) -> Encoder:  # made by the first part: an actor that cannot start has no last words
        return encoder_now(self._project)

    def make(self, job: Job) -> None:
        make_part(job, self._encoder)


class OnRay:
    """Actors on a Ray cluster; sources and tokens are reachable under the same path from every node."""

    def __init__(self, project: Project, workers: int | None) -> None:
        self._ray = connect("prepare")
        count = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        say(f"prepare: {count} Ray actors; lost ones are replaced")
        kind = self._ray.remote(
            num_cpus=1, max_restarts=MAX_RESTARTS, max_task_retries=-1, scheduling_strategy="SPREAD"
        )(Actor)
        self._crew = deque(kind.remote(project.manifest, project.root) for _ in range(count))
        self.ahead = 2 * count

    def submit(self, job: Job) -> Future[None]:
        self._crew.rotate()
        call: Any = self._crew[0].make.remote(job)
        future: Future[None] = call.future()
        return future

    def result(self, future: Future[None]) -> None:
        errors = self._ray.exceptions
        try:
            future.result()
        except errors.RayTaskError as problem:
            raise problem.cause if isinstance(problem.cause, DdkError) else problem from None
        except errors.RayActorError:
            raise DdkError(
                "prepare: a Ray actor died for good",
                hint="see Ray's logs; run the same command again to continue",
            ) from None

    def give_up(self, futures: list[Future[None]]) -> None:
        wait(futures)

    def dismiss(self) -> None:
        """What is not finished is left, as by `Processes`."""
        for actor in self._crew:
            with suppress(Exception):
                self._ray.kill(actor)
