"""`ddk-pipe cache-teacher`: windows -> teacher -> sparse targets -> shards on disk."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import ddk_pipe
from ddk_pipe.pipeline.cache import (
    CacheSpec,
    CacheWriter,
    Shard,
    all_shards,
    committed,
    planned,
    split_size,
    uncommitted,
)
from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.models import (
    check_length,
    load_tokenizer,
    model_folder,
    read_config,
    text_config,
    tokenizer_of_model,
    weights_digest,
)
from ddk_pipe.pipeline.storage import Folder, LocalFolder, durable
from ddk_pipe.pipeline.targets import Plan
from ddk_pipe.pipeline.text import Split, tokenizer_digest, tokenizer_size
from ddk_pipe.stages.cache_teacher import local
from ddk_pipe.stages.cache_teacher.maker import Job, ShardReport
from ddk_pipe.stages.cache_teacher.status import ShardProgress, StatusStream
from ddk_pipe.stages.common import Terminated, Tracker, pick_device, pick_dtype, say, stops_in_time, track
from ddk_pipe.stages.prepare import prepare
from ddk_pipe.stages.teachers import check_capture, check_head, choose_backend, open_teacher

# Bytes per position to expect, by scheme: for the check of free space only. Entries cost 1.4 to 2.3 bytes.
EXPECTED_BYTES = {"pps": 40.0, "threshold": 120.0, "topk": 150.0, "random": 60.0}
ENGINES = ("local", "ray")


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
        if self.engine not in ENGINES:
            raise DdkError(f"--engine {self.engine}: unknown", hint=f"use one of {', '.join(ENGINES)}")
        for name, value in (("--limit", self.limit), ("--workers", self.workers)):
            if value is not None and value < 1:
                raise DdkError(f"{name} {value}: at least 1", hint=f"leave {name} out, or raise it")
        if self.engine == "ray":
            _need_ray()


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


def only_domains(project: Project, names: tuple[str, ...]) -> Project:
    """The project with these domains only (all, if none is named); raises DdkError for unknown ones."""
    known = project.manifest.domains
    for name in names:
        if name not in known:
            raise DdkError(f"--domains: no domain {name}", hint=f"the manifest has {', '.join(known)}")
    if not names:
        return project
    chosen = {name: domain for name, domain in known.items() if name in names}
    return Project(project.manifest.model_copy(update={"domains": chosen}), project.root)


def plan_job(project: Project) -> Job:
    """Everything about the cache that can be known and checked before a weight is loaded; prepares the text."""
    options = project.manifest.teacher
    backend = choose_backend(options)
    plan = Plan.of(project.manifest.cache)
    folder = model_folder(project.teacher_model, field="teacher.model", revision=options.revision)
    config = read_config(folder, field="teacher.model", trust_remote_code=options.trust_remote_code)
    check_length(config, project.manifest.seq_len, field="teacher.model")
    check_plan(project, plan, backend)
    splits = prepare(project)
    head_size = int(text_config(config).vocab_size)
    spec = make_spec(project, splits, plan, folder, head_size)
    if backend == "vllm":
        check_head(options, head_size, spec.vocab_size)
    return Job(project.manifest, project.root, spec, folder, backend, open_teacher)


def count_positions(spec: CacheSpec, shards: list[Shard]) -> int:
    """Positions the teacher predicts in these shards: windows * seq_len."""
    return sum(shard.windows for shard in shards) * spec.seq_len


def expected_bytes(spec: CacheSpec, shards: list[Shard]) -> int:
    """Disk space to reckon with for these shards, on the safe side: targets, tokens and labels."""
    per_position = EXPECTED_BYTES[spec.plan.scheme] * len(spec.plan.temperatures) + 6
    return int(count_positions(spec, shards) * per_position)


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


def check_plan(project: Project, plan: Plan, backend: str) -> None:
    """Raises DdkError for a plan that the backend or the student's loss cannot serve, before anything is loaded."""
    if backend == "vllm":
        check_capture(project.manifest.teacher, plan)


def make_spec(
    project: Project, splits: dict[str, dict[str, Split]], plan: Plan, folder: Path, head_size: int
) -> CacheSpec:
    """What cache.json will say. `head_size`: rows of the teacher's output layer; those beyond the tokenizer's ids
    are padding, and the distributions are cut to the ids.

    Raises DdkError if the tokenizer is not the teacher's, or has more ids than the teacher predicts.
    """
    options = project.manifest.teacher
    tokenizer = load_tokenizer(
        project.tokenizer, field="tokenizer", trust_remote_code=options.trust_remote_code
    )
    own = tokenizer_of_model(folder, trust_remote_code=options.trust_remote_code)
    if own is not None and tokenizer_digest(own) != tokenizer_digest(tokenizer):
        raise DdkError(
            f"tokenizer: {project.tokenizer} is not the teacher's ({tokenizer_difference(tokenizer, own)})",
            hint="leave tokenizer out of the manifest",
        )
    vocab_size = tokenizer_size(tokenizer)
    if vocab_size > head_size:
        raise DdkError(
            f"tokenizer: its {vocab_size:,} ids exceed the teacher's vocabulary of {head_size:,}",
            hint="use the teacher's own tokenizer",
        )
    device = torch.device(pick_device(options.device))
    shard_windows = project.manifest.cache.shard_windows
    return CacheSpec(
        teacher={
            "weights_digest": weights_digest(folder),
            "dtype": str(pick_dtype(options.dtype, device)).removeprefix("torch."),
        },
        tokenizer_digest=tokenizer_digest(tokenizer),
        vocab_size=vocab_size,
        seq_len=project.manifest.seq_len,
        plan=plan,
        domains={
            name: {split: split_size(opened, shard_windows) for split, opened in domain.items()}
            for name, domain in splits.items()
        },
        about={"model": options.model, "head_size": head_size, "ddk_pipe": ddk_pipe.__version__},
    )


def tokenizer_difference(one: Any, other: Any) -> str:
    """How two tokenizers differ, in numbers: "385 ids, the teacher's has 400; id 301 is 'a' and 'b'"."""
    names, others = (
        {index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (one, other)
    )
    sizes = f"{tokenizer_size(one):,} ids, the teacher's has {tokenizer_size(other):,}"
    first = min((index for index in {*names, *others} if names.get(index) != others.get(index)), default=None)
    if first is None:
        return f"{sizes}; other special tokens"
    return f"{sizes}; id {first:,} is {names.get(first)!r} there and {others.get(first)!r} here"


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


def _need_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise DdkError("--engine ray: Ray is not installed", hint=install_hint("ray"))


def bytes_per_position(folder: Folder, spec: CacheSpec) -> float:
    """Bytes of targets on disk per position with a label (tokens and masks left out)."""
    records = [record for _, record in committed(folder, spec)]
    positions = sum(record.positions for record in records)
    return float(sum(record.target_bytes for record in records) / max(1, positions))
