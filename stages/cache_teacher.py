"""`ddk-pipe cache-teacher`: windows -> teacher -> sparse targets -> shards on disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ddk_pipe
from ddk_pipe.pipeline.cache import (
    CacheSpec,
    CacheWriter,
    Shard,
    ShardRecord,
    all_shards,
    committed,
    split_size,
)
from ddk_pipe.pipeline.codec import Ranks
from ddk_pipe.pipeline.durable import need_space
from ddk_pipe.pipeline.errors import DdkError
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
from ddk_pipe.pipeline.selection import Plan
from ddk_pipe.pipeline.storage import Folder, LocalFolder
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.pipeline.tokens import TRAIN, Split, labels_of, tokenizer_digest, tokenizer_size
from ddk_pipe.stages.engines import local
from ddk_pipe.stages.prepare import prepare
from ddk_pipe.stages.progress import say, track
from ddk_pipe.stages.runtime import pick_device, pick_dtype
from ddk_pipe.stages.sample import fit_ranks
from ddk_pipe.stages.teachers import Teacher, Window, choose_backend, open_teacher

# Bytes per position to expect, by scheme: for the check of free space only. Entries cost 1.4 to 2.3 bytes.
EXPECTED_BYTES = {"pps": 40.0, "threshold": 120.0, "topk": 150.0, "random": 60.0}


@dataclass
class Outcome:
    """What one run of the stage did."""

    shards_done: int
    shards_skipped: int
    positions: int  # windows * seq_len predicted by this run
    seconds: float
    bytes_per_position: float  # of the whole cache, per position with a label


def cache_teacher(project: Project) -> Outcome:
    """Predict and commit every shard that is not in the cache yet; loads no teacher if there is none."""
    options = project.manifest.teacher
    backend = choose_backend(options)
    plan = Plan.of(project.manifest.cache)
    folder = model_folder(project.teacher_model, field="teacher.model", revision=options.revision)
    config = read_config(folder, field="teacher.model", trust_remote_code=options.trust_remote_code)
    check_length(config, project.manifest.seq_len, field="teacher.model")
    check_plan(project, plan, backend)
    splits = prepare(project)
    vocab_size = int(text_config(config).vocab_size)
    spec = make_spec(project, splits, plan, folder, vocab_size)
    cache = project.cache
    writer = CacheWriter(cache, spec)
    pending = [shard for shard in writer.pending() if shard.domain in splits]
    total = len([shard for shard in all_shards(writer.spec) if shard.domain in splits])
    if not pending:
        say(f"cache-teacher: nothing to do, all {total} shards are committed; the teacher was not loaded")
        return Outcome(0, total, 0, 0.0, bytes_per_position(cache, writer.spec))
    positions = sum(shard.windows for shard in pending) * spec.seq_len
    expected = positions * (EXPECTED_BYTES[plan.scheme] * len(plan.temperatures) + 6)
    if isinstance(cache, LocalFolder):
        need_space(cache.path, int(expected), what="the cache")
    if len(pending) < total:
        say(f"cache-teacher: {total - len(pending)} of {total} shards are committed already")
    say(f"cache-teacher: loading {folder} with {backend}")
    teacher = open_teacher(folder, options, backend=backend, seq_len=spec.seq_len)
    try:
        return _run(project, writer, teacher, splits, pending, total)
    finally:
        teacher.close()


def check_plan(project: Project, plan: Plan, backend: str) -> None:
    """Raises DdkError for a plan that the backend or the student's loss cannot serve, before anything is loaded."""
    if backend == "vllm":
        from ddk_pipe.stages.teachers.vllm import check_capture

        check_capture(project.manifest.teacher, plan)


def make_spec(
    project: Project, splits: dict[str, dict[str, Split]], plan: Plan, folder: Path, vocab_size: int
) -> CacheSpec:
    """What cache.json will say."""
    options = project.manifest.teacher
    tokenizer = load_tokenizer(
        project.tokenizer, field="tokenizer", trust_remote_code=options.trust_remote_code
    )
    own = tokenizer_of_model(folder, trust_remote_code=options.trust_remote_code)
    if own is not None and tokenizer_digest(own) != tokenizer_digest(tokenizer):
        raise DdkError(
            f"tokenizer: {project.tokenizer} is not the teacher's (other tokens behind the ids)",
            hint="leave tokenizer out of the manifest",
        )
    if tokenizer_size(tokenizer) > vocab_size:
        raise DdkError(
            f"tokenizer: its {tokenizer_size(tokenizer):,} ids exceed the teacher's vocabulary of {vocab_size:,}",
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
        about={"model": options.model, "ddk_pipe": ddk_pipe.__version__},
    )


def _run(
    project: Project,
    writer: CacheWriter,
    teacher: Teacher,
    splits: dict[str, dict[str, Split]],
    pending: list[Shard],
    total: int,
) -> Outcome:
    if teacher.vocab_size != writer.spec.vocab_size:
        raise DdkError(
            f"the teacher predicts {teacher.vocab_size:,} tokens, its configuration says {writer.spec.vocab_size:,}",
            hint="mend vocab_size in its config.json",
        )
    for domain in dict.fromkeys(shard.domain for shard in pending):
        if not writer.has_ranks(domain):
            say(f"cache-teacher: {domain}: a few windows to see which ids the teacher keeps")
            writer.add_ranks(domain, _ranks(project, writer, teacher, domain, splits[domain][TRAIN]))
    seq_len = writer.spec.seq_len
    everything = sum(shard.windows for shard in all_shards(writer.spec) if shard.domain in splits) * seq_len
    positions = sum(shard.windows for shard in pending) * seq_len
    began = time.monotonic()
    with track("cache-teacher", everything, "positions", done=everything - positions) as advance:

        def work(shard: Shard) -> None:
            if writer.is_committed(shard):  # by another process since we looked
                return advance(shard.windows * seq_len, shard.name)
            record = _shard(writer, teacher, splits[shard.domain][shard.split], shard, project, advance)
            per_position = record.target_bytes / max(record.positions, 1)
            advance(0, f"{shard.name} {per_position:.1f} B/position")

        local.run(pending, work)
    seconds = time.monotonic() - began
    size = bytes_per_position(project.cache, writer.spec)
    say(
        f"cache-teacher: {len(pending)} shards, {positions:,} positions at {positions / seconds:,.0f} positions/s,"
        f" {size:.1f} bytes/position"
    )
    return Outcome(len(pending), total - len(pending), positions, seconds, size)


def _ranks(project: Project, writer: CacheWriter, teacher: Teacher, domain: str, split: Split) -> Ranks:
    return fit_ranks(
        teacher,
        domain,
        split,
        writer.spec.plan,
        vocab_size=writer.spec.vocab_size,
        batch_windows=project.manifest.teacher.batch_windows,
    )


def _shard(
    writer: CacheWriter, teacher: Teacher, split: Split, shard: Shard, project: Project, advance: Any
) -> ShardRecord:
    began = time.monotonic()
    tokens, loss_mask = split.window(slice(shard.first_window, shard.first_window + shard.windows))
    labels = labels_of(tokens, loss_mask, no_label=NO_LABEL)
    windows = [
        Window(shard.key(shard.first_window + row), tokens[row], labels[row]) for row in range(shard.windows)
    ]
    selected = []
    step = project.manifest.teacher.batch_windows
    for start in range(0, len(windows), step):
        batch = windows[start : start + step]
        selected += teacher.select(batch, writer.spec.plan)
        advance(len(batch) * writer.spec.seq_len, shard.name)
    facts = {"teacher": teacher.describe(), "seconds": round(time.monotonic() - began, 3)}
    return writer.write(shard, tokens, loss_mask, selected, facts)


def bytes_per_position(folder: Folder, spec: CacheSpec) -> float:
    """Bytes of targets on disk per position with a label (tokens and masks left out)."""
    records = [record for _, record in committed(folder, spec)]
    positions = sum(record.positions for record in records)
    return float(sum(record.target_bytes for record in records) / max(1, positions))
