"""One setting tried on a sample of each domain: what it takes, and the targets that a student would read.

The sample of a domain is cut into two halves; each is coded with a rank table fitted on what the teacher kept of the
other.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache import (
    CacheReader,
    CacheSpec,
    CacheWriter,
    ShardRecord,
    SplitSize,
    all_shards,
    is_input,
)
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.models import stack_starts
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Selected, SparseTargets, stack
from ddk_pipe.pipeline.text import SPLITS, TRAIN, Split, open_split
from ddk_pipe.stages.cache_teacher.maker import Job
from ddk_pipe.stages.cache_teacher.sample import kept_counts, ranks_of, sample_windows
from ddk_pipe.stages.teachers import Teacher, Window

SAMPLE_TOKENS = 4096  # of a domain


@dataclass(frozen=True)
class Sample:
    """The sampled windows of one domain, and what the whole of it will hold."""

    windows: list[Window]
    split: Split  # the training split, from which they are
    labels: int  # of both splits
    positions: int  # of both splits: windows * seq_len

    @property
    def halves(self) -> list[slice]:
        """Two runs of windows; one, where there is only one window."""
        cut, end = -(-len(self.windows) // 2), len(self.windows)
        return [slice(0, cut), slice(cut, end)] if end > 1 else [slice(0, 1)]


def samples_of(project: Project, spec: CacheSpec, windows: int | None) -> dict[str, Sample]:
    """`windows` training windows of each domain (None: about SAMPLE_TOKENS), spread evenly over its prepared text."""
    count = windows or max(2, SAMPLE_TOKENS // spec.seq_len)
    out = {}
    for name in project.manifest.domains:
        splits = [open_split(project.tokens / name / split) for split in SPLITS]
        facts = [split.facts for split in splits]
        train = splits[SPLITS.index(TRAIN)]
        labels, whole = sum(fact.labels for fact in facts), sum(fact.windows for fact in facts)
        out[name] = Sample(sample_windows(name, train, count), train, labels, whole * spec.seq_len)
    return out


@dataclass
class Sizes:
    """What the shards of one domain's sample hold. Tokens are no part of targets, nor is their metadata."""

    labels: int = 0
    entries: int = 0
    target_bytes: int = 0  # of what grows with the windows
    input_bytes: int = 0  # of tokens
    # Of each shard's metadata, however many windows it has:
    target_fixed: list[int] = field(default_factory=list)
    input_fixed: list[int] = field(default_factory=list)
    record_bytes: list[int] = field(default_factory=list)

    def add(self, record: ShardRecord) -> None:
        """A shard more."""
        fixed = {name: size for name, size in record.sizes.items() if name.endswith("zarr.json")}
        input_fixed = sum(size for name, size in fixed.items() if is_input(name))
        target_fixed = sum(fixed.values()) - input_fixed
        self.labels += record.positions
        self.entries += record.entries
        self.input_bytes += record.input_bytes - input_fixed
        self.target_bytes += record.target_bytes - target_fixed
        self.input_fixed.append(input_fixed)
        self.target_fixed.append(target_fixed)
        self.record_bytes.append(len(record.sealed()))


@dataclass(frozen=True)
class Measured:
    """What the samples say about one plan."""

    seconds: float  # the teacher's
    domains: list[Sizes]
    targets: SparseTargets  # as decoded, at the first temperature; positions with a label


def try_plan(job: Job, plan: Plan, teacher: Teacher, samples: list[Sample]) -> Measured:
    """Teacher, codec and writer on all samples."""
    windows = [window for sample in samples for window in sample.windows]
    step = job.manifest.teacher.batch_windows
    teacher.select(windows[:1], plan)  # what is set up once must not count for every position
    began = time.monotonic()
    selected: list[Selected] = []
    for start in range(0, len(windows), step):
        selected += teacher.select(windows[start : start + step], plan)
    seconds = time.monotonic() - began
    sizes, targets = [], []
    for sample in samples:
        mine, selected = selected[: len(sample.windows)], selected[len(sample.windows) :]
        with tempfile.TemporaryDirectory(prefix="ddk-pipe-") as folder:
            domain = _write(replace(job.spec, plan=plan), sample, mine, LocalFolder(Path(folder) / "cache"))
            sizes.append(domain[0])
            targets += domain[1]
    return Measured(seconds, sizes, stack(targets))


def _write(
    like: CacheSpec, sample: Sample, selected: list[Selected], folder: LocalFolder
) -> tuple[Sizes, list[SparseTargets]]:
    """Write each half of a sample as a domain of its own; what that took, and what a reader gets of each window."""
    halves = {f"half{number}": half for number, half in enumerate(sample.halves)}
    domains = {
        name: {TRAIN: SplitSize(half.stop - half.start, half.stop - half.start, "sample")}
        for name, half in halves.items()
    }
    writer = CacheWriter(folder, replace(like, domains=domains))
    sizes, targets = Sizes(), []
    for shard in all_shards(writer.spec):
        half = halves[shard.domain]
        others = [item for number, item in enumerate(selected) if not half.start <= number < half.stop]
        writer.add_ranks(shard.domain, ranks_of(kept_counts(others, like.vocab_size), sample.split))
        windows = sample.windows[half]
        tokens = np.stack([window.tokens for window in windows])
        starts = stack_starts([window.starts for window in windows], tokens.shape[1])
        sizes.add(writer.write(shard, tokens, _loss_mask(windows), selected[half], {}, starts))
    reader = CacheReader(folder, like.plan.temperatures[0])
    for shard in all_shards(writer.spec):
        for number in range(shard.windows):
            window = reader.read(shard.domain, shard.split, number)
            targets.append(window.targets.rows(torch.from_numpy(window.labels != NO_LABEL)))
    return sizes, targets


def _loss_mask(windows: list[Window]) -> NDArray[np.uint8]:
    """Which tokens are labels, [windows, seq_len]: the inverse of labels_of."""
    labels = np.stack([window.labels for window in windows])
    mask = np.zeros(labels.shape, np.uint8)
    mask[:, 1:] = labels[:, :-1] != NO_LABEL
    return mask
