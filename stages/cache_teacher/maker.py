"""Makes shards: the teacher predicts one while those before it are encoded and written."""

from __future__ import annotations

import pickle
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache import CacheSpec, CacheWriter, Shard
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Manifest, Project
from ddk_pipe.pipeline.models import Starts
from ddk_pipe.pipeline.targets import NO_LABEL, Selected
from ddk_pipe.pipeline.text import TRAIN, Split, labels_of, open_split
from ddk_pipe.stages.cache_teacher.sample import fit_ranks
from ddk_pipe.stages.common import say
from ddk_pipe.stages.teachers import Teacher, Window, open_teacher

DEPTH = 3  # shards a worker has at once: one with the teacher, the others being encoded and written


class Stopped(Exception):
    """This worker was told to stop before the shard was predicted."""


@dataclass(frozen=True)
class Job:
    """What a worker must know, wherever it runs: plain values, so that it can be sent to another process."""

    manifest: Manifest
    root: Path  # the manifest's folder
    spec: CacheSpec
    model: Path  # the teacher's folder
    backend: str
    opener: Callable[..., Teacher] = open_teacher

    @property
    def project(self) -> Project:
        return Project(self.manifest, self.root)


@dataclass(frozen=True)
class ShardReport:
    """What became of one shard."""

    shard: Shard
    positions: int  # predicted: windows * seq_len; 0 if somebody else had committed the shard before
    labels: int  # of them with a label
    target_bytes: int
    teacher_seconds: float
    waited_seconds: float  # the teacher had nothing to do before this shard, because writing was slower


@dataclass(frozen=True)
class _Predicted:
    tokens: NDArray[np.int64]  # [windows, seq_len]
    loss_mask: NDArray[np.uint8]  # the same
    starts: Starts | None  # the same
    selected: list[Selected]  # by window
    seconds: float
    waited: float


class ShardMaker:
    """A loaded teacher and a cache to write to.

    The teacher runs in one thread of its own, encoding and writing in those that call `make`. With DEPTH of them
    at most DEPTH - 1 shards wait for the disk: where the disk is slower than the teacher, the teacher waits.
    """

    def __init__(self, job: Job, advance: Callable[[int, str], None] | None = None) -> None:
        """`advance(positions, shard name)` is called after each batch of windows, in the teacher's thread."""
        self.job, self.spec = job, job.spec
        project = job.project
        self.tokens = project.tokens
        self.writer = CacheWriter(project.cache, job.spec)
        self.batch_windows = job.manifest.teacher.batch_windows
        self.teacher = job.opener(
            job.model,
            job.manifest.teacher,
            backend=job.backend,
            seq_len=job.spec.seq_len,
            vocab_size=job.spec.vocab_size,
        )
        if self.teacher.vocab_size != job.spec.vocab_size:
            raise DdkError(
                f"the teacher predicts {self.teacher.vocab_size:,} tokens, its configuration and the tokenizer say {job.spec.vocab_size:,}",
                hint="mend vocab_size in its config.json",
            )
        self._advance = advance or (lambda positions, name: None)
        self._stopped = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._idle_since: float | None = None
        self._splits: dict[tuple[str, str], Split] = {}

    def make(self, shard: Shard) -> ShardReport:
        """Predict, encode, write and commit a shard, unless somebody has committed it.

        Raises Stopped after stop(); DdkError if the teacher predicts NaN or infinity: then nothing is written.
        """
        if self.writer.is_committed(shard):
            return ShardReport(shard, 0, 0, 0, 0.0, 0.0)
        predicted = self._thread.submit(self._predict, shard).result()
        facts = {"teacher": self.teacher.describe(), "seconds": round(predicted.seconds, 3)}
        record = self.writer.write(
            shard, predicted.tokens, predicted.loss_mask, predicted.selected, facts, predicted.starts
        )
        return ShardReport(
            shard,
            predicted.tokens.size,
            record.positions,
            record.target_bytes,
            predicted.seconds,
            predicted.waited,
        )

    def stop(self) -> None:
        """Drop what the teacher is doing after its current batch; shards it is done with are still written."""
        self._stopped.set()

    def close(self) -> None:
        """Wait for the teacher's thread and give the device back."""
        self.stop()
        self._thread.shutdown(cancel_futures=True)
        self.teacher.close()

    def _predict(self, shard: Shard) -> _Predicted:
        self._check_stopped()
        began = time.monotonic()
        waited = began - (self._idle_since or began)
        self._need_ranks(shard.domain)
        split = self._split(shard.domain, shard.split)
        rows = slice(shard.first_window, shard.first_window + shard.windows)
        (tokens, loss_mask), starts = split.window(rows), split.starts(rows)
        labels = labels_of(tokens, loss_mask, no_label=NO_LABEL)
        windows = [
            Window(
                shard.key(shard.first_window + row),
                tokens[row],
                labels[row],
                None if starts is None else starts[row],
            )
            for row in range(shard.windows)
        ]
        selected: list[Selected] = []
        for start in range(0, len(windows), self.batch_windows):
            self._check_stopped()
            batch = windows[start : start + self.batch_windows]
            selected += self.teacher.select(batch, self.spec.plan)
            self._advance(len(batch) * self.spec.seq_len, shard.name)
        self._idle_since = time.monotonic()
        return _Predicted(tokens, loss_mask, starts, selected, self._idle_since - began, waited)

    def _need_ranks(self, domain: str) -> None:
        if self.writer.has_ranks(domain):
            return
        say(f"cache-teacher: {domain}: a few windows to see which ids the teacher keeps")
        ranks = fit_ranks(
            self.teacher,
            domain,
            self._split(domain, TRAIN),
            self.spec.plan,
            vocab_size=self.spec.vocab_size,
            batch_windows=self.batch_windows,
        )
        self.writer.add_ranks(domain, ranks)

    def _split(self, domain: str, split: str) -> Split:
        if (domain, split) not in self._splits:
            self._splits[domain, split] = open_split(self.tokens / domain / split)
        return self._splits[domain, split]

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise Stopped


def portable(problem: Exception) -> Exception:
    """The exception itself if another process can read it, else one that says the same.

    Its traceback goes along as a note, unless it is a user's mistake, which needs none.
    """
    if isinstance(problem, DdkError):
        return problem
    where = "".join(traceback.format_exception(problem))
    try:
        pickle.loads(pickle.dumps(problem))
    except Exception:  # noqa: BLE001 - constructors that take more than their message
        problem = RuntimeError(f"{type(problem).__name__}: {problem}")
    problem.add_note(f"in a worker:\n{where}")
    return problem
