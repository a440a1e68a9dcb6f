"""`ddk-pipe cache-teacher`: windows -> teacher -> sparse targets -> shards on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ddk_pipe.pipeline.cache import (
    CacheSpec,
    CacheWriter,
    Shard,
    all_shards,
    committed,
    planned,
    uncommitted,
)
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.storage import Folder, LocalFolder, durable
from ddk_pipe.stages.cache_teacher import local
from ddk_pipe.stages.cache_teacher.maker import Job, ShardReport
from ddk_pipe.stages.cache_teacher.plan import count_positions, expected_bytes, only_domains, plan_job
from ddk_pipe.stages.cache_teacher.status import ShardProgress, StatusStream
from ddk_pipe.stages.common import Terminated, Tracker, check_engine, say, stops_in_time, track


@dataclass(frozen=True)
class Request:
    """What the command line may ask of one run; nothing of it changes what a shard holds."""

    limit: int | None = None  # shards at most
    domains: tuple[str, ...] = ()  # none: all
    dry_run: bool = False
    status: Path | None = None  # file for the JSON lines
    engine: str = "local"
    workers: int | None = None  # none: one here, on Ray as many as there is room for

    def check(self) -> None:
        """Raises DdkError for what cannot be."""
        check_engine(self.engine)
        for name, value in (("--limit", self.limit), ("--workers", self.workers)):
            if value is not None and value < 1:
                raise DdkError(f"{name} {value}: at least 1", hint=f"leave {name} out, or raise it")


@dataclass
class Outcome:
    """What one run of the stage did."""

    shards_done: int
    shards_skipped: int
    positions: int  # windows * seq_len predicted by this run
    seconds: float
    bytes_per_position: float  # of the whole cache, per position with a label


def cache_teacher(project: Project, request: Request | None = None) -> Outcome:
    """Predict and commit every shard that is not in the cache yet; loads no teacher if there is none.

    Raises DdkError for what cannot be done, Terminated (a KeyboardInterrupt) on SIGTERM.
    """
    request = request or Request()
    request.check()
    project = only_domains(project, request.domains)
    job = plan_job(project)
    shards = all_shards(job.spec)
    settle = planned if request.dry_run else _settled
    job = replace(job, spec=settle(project.cache, job.spec))
    pending = uncommitted(project.cache, shards)
    expected = expected_bytes(job.spec, pending[: request.limit])
    if request.dry_run:
        return _dry_run(project, job, request, shards, pending, expected)
    stream = StatusStream(request.status)
    done = len(shards) - len(pending)
    if not pending:
        say(f"cache-teacher: nothing to do, all {done} shards are committed; the teacher was not loaded")
        stream.send("finished", done=done, total=done)
        return Outcome(0, done, 0, 0.0, bytes_per_position(project.cache, job.spec))
    if isinstance(project.cache, LocalFolder):
        durable.need_space(project.cache.path, expected, what="the cache")
    if done:
        say(f"cache-teacher: {done} of {len(shards)} shards are committed already")
    left = count_positions(job.spec, pending)
    progress = ShardProgress(stream, done=done, total=len(shards), positions_left=left)
    return _run(project, job, request, pending[: request.limit], progress, count_positions(job.spec, shards))


def _settled(cache: Folder, spec: CacheSpec) -> CacheSpec:
    """Create or extend cache.json; the spec with what is there merged in. Raises DdkError for another cache."""
    return CacheWriter(cache, spec).spec


def _dry_run(
    project: Project, job: Job, request: Request, shards: list[Shard], pending: list[Shard], expected: int
) -> Outcome:
    """Say what would be done."""
    chosen = pending[: request.limit]
    say(f"cache-teacher: would load {job.model} with {job.backend} ({request.engine} engine)")
    say(
        f"cache-teacher: would predict {len(chosen):,} of {len(shards):,} shards, {len(shards) - len(pending):,} are"
        f" committed: {count_positions(job.spec, chosen):,} positions"
    )
    say(f"cache-teacher: at most about {expected / 1e9:.3f} GB in {project.cache.name}{_free(project.cache)}")
    return Outcome(0, len(shards) - len(pending), 0, 0.0, 0.0)


def _free(cache: Folder) -> str:
    if not isinstance(cache, LocalFolder):
        return ""
    return f", {durable.free_bytes(cache.path) / 1e9:.3f} GB free there"


def _run(
    project: Project,
    job: Job,
    request: Request,
    shards: list[Shard],
    progress: ShardProgress,
    everything: int,
) -> Outcome:
    skipped = progress.done
    say(f"cache-teacher: loading {job.model} with {job.backend}")
    progress.send("started", shards=len(shards), engine=request.engine, model=str(job.model))
    left = progress.positions_left
    with (
        stops_in_time(),
        _last_word(progress),
        track("cache-teacher", everything, "positions", done=everything - left) as advance,
    ):
        _engine(job, request, shards, progress, advance)
    size = bytes_per_position(project.cache, job.spec)
    progress.send("finished", bytes_per_position=round(size, 2))
    rate = progress.positions / progress.seconds
    say(
        f"cache-teacher: {progress.shards} shards, {progress.positions:,} positions at {rate:,.0f} positions/s,"
        f" {size:.1f} bytes/position"
    )
    return Outcome(progress.shards, skipped, progress.positions, progress.seconds, size)


def _engine(
    job: Job, request: Request, shards: list[Shard], progress: ShardProgress, advance: Tracker
) -> None:
    """Hand the shards to the engine that was asked for."""

    def report(done: ShardReport) -> None:
        progress.shard(done, count_positions(job.spec, [done.shard]))

    def report_and_advance(done: ShardReport) -> None:
        report(done)
        advance(count_positions(job.spec, [done.shard]), done.shard.name)

    if request.engine == "ray":
        from ddk_pipe.stages.cache_teacher import ray

        ray.run(job, shards, report_and_advance, workers=request.workers)
    elif (request.workers or 1) > 1:
        local.run_processes(job, shards, report_and_advance, workers=request.workers or 1)
    else:
        local.run(job, shards, report, advance)


@contextmanager
def _last_word(progress: ShardProgress) -> Iterator[None]:
    """The status stream ends with what the run ended with."""
    try:
        yield
    except KeyboardInterrupt as stop:
        progress.send("terminated" if isinstance(stop, Terminated) else "interrupted")
        raise
    except Exception as problem:
        progress.send("failed", error=str(problem))
        raise


def bytes_per_position(folder: Folder, spec: CacheSpec) -> float:
    """Bytes of targets on disk per position with a label (tokens and masks left out)."""
    records = [record for _, record in committed(folder, spec)]
    positions = sum(record.positions for record in records)
    return float(sum(record.target_bytes for record in records) / max(1, positions))
