"""How far the student is behind the teacher: every domain's validation windows, shared among the processes.

An update of the weights rests on as many windows as `validation_budget` allows; what the student is judged by at the end
of its run are all of them.

A process reads its own windows again at each validation, in threads and ahead of the forward pass: held decoded, those of
a thousand domains would be gigabytes a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import N_SUMS, summary
from ddk_pipe.pipeline.manifest import Project, windows_per_domain
from ddk_pipe.pipeline.storage import prefetch
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.stages.distill.batches import Batch, BatchMaker, Copier
from ddk_pipe.stages.distill.sources import Source, silent_window
from ddk_pipe.stages.distill.world import Wrapped

FloatArray = NDArray[np.float64]
Place = tuple[int, list[int]]  # a domain, and numbers of windows in it


@dataclass(frozen=True)
class Outcome:
    """What one validation found: a dictionary of means per domain (`pipeline.losses.summary`), the sums behind them
    (float64 [domains, N_SUMS]), and the teacher's CE on the same windows (float64 [domains], nats per token)."""

    domains: list[dict[str, float | None]]
    sums: FloatArray
    teacher_ce: FloatArray

    @property
    def student_ce(self) -> FloatArray:
        """Nats per token, float64 [domains]."""
        return np.array([domain["student_ce"] for domain in self.domains], dtype=np.float64)


class Validation:
    """The validation windows of every domain; `teacher_ce` is the teacher's on those behind an update of the weights
    (float64 [domains], nats per token)."""

    def __init__(
        self, project: Project, source: Source, wrapped: Wrapped, autocast: Callable[[], Any]
    ) -> None:
        self.options, self.source = project.manifest.distill, source
        self.wrapped, self.world, self.autocast = wrapped, wrapped.world, autocast
        self.domains, self.seq_len = list(project.manifest.domains), project.manifest.seq_len
        self.device = next(wrapped.student.parameters()).device
        self._make_batch = BatchMaker.of(wrapped.student, pin=self.device.type == "cuda")
        self._copy = Copier(self.device)
        most = windows_per_domain(self.options, self.seq_len, len(self.domains))
        self.counts = [min(size, most) for size in source.validation_sizes]
        self._label_sums = self._labels_behind_an_update()
        self.teacher_ce = _mean_ce(self._label_sums)

    def run(self) -> Outcome:
        """Measure the student as it is now, as an update of the weights wants it.

        Raises DdkError if its CE on a domain is not finite.
        """
        return self._outcome(self._sums([range(count) for count in self.counts]), self.teacher_ce)

    def complete(self, outcome: Outcome) -> Outcome:
        """The same student on all of its validation windows: on those that `run` left out, and what it found added.

        Raises DdkError as `run` does.
        """
        most = self.options.validation_windows
        rest = [
            range(n, min(size, most))
            for n, size in zip(self.counts, self.source.validation_sizes, strict=True)
        ]
        if not any(rest):
            return outcome
        labels = self._label_sums + self._sums_of_labels(dict(enumerate(rest)))
        return self._outcome(outcome.sums + self._sums(rest), _mean_ce(labels))

    def _outcome(self, sums: FloatArray, teacher_ce: FloatArray) -> Outcome:
        outcome = Outcome([summary(row, exact=self.source.exact) for row in sums], sums, teacher_ce)
        for domain, value in zip(self.domains, outcome.student_ce, strict=True):
            if not math.isfinite(value):
                raise DdkError(
                    f"distill: the student's validation loss on domain {domain} is {value}",
                    hint="lower distill.optimizer.learning_rate; the last checkpoint is kept",
                )
        return outcome

    @torch.no_grad()
    def _sums(self, windows: Sequence[range]) -> FloatArray:
        """Over these windows of each domain and all processes, float64 [domains, N_SUMS]."""
        self.wrapped.module.eval()
        sums = self._own_sums(windows)
        self.wrapped.reshard()
        self.wrapped.module.train()
        return self.world.sum(sums)

    def _own_sums(self, windows: Sequence[range]) -> FloatArray:
        """This process's share of the sums; the device is waited for once, at the end."""
        # the module's own forward: under FSDP2 its hooks have the weights whole; DDP's would synchronise in vain
        module = self.wrapped.module if self.wrapped.sharded else self.wrapped.student
        total = torch.zeros(len(self.domains), N_SUMS, dtype=torch.float64, device=self.device)
        places = list(self._batches(windows))
        readers = self.source.readers
        batches = prefetch(self._read, places, ahead=readers, threads=readers)
        for (domain, _), ready in zip(places, batches, strict=True):
            batch = self._copy(ready)
            with self.autocast():
                total[domain] += module(
                    batch.tokens,
                    batch.labels,
                    batch.rows,
                    documents=batch.documents,
                    measuring=True,
                    temperature=self.options.temperature,
                )
        return total.cpu().numpy()

    def _batches(self, windows: Sequence[range]) -> Iterator[Place]:
        """This process's windows by micro batch: as many of these on every process, for shards need everyone's
        forward; some may be of no window."""
        micro = self.options.micro_batch_windows
        for domain, numbers in enumerate(windows):
            own = self._own(numbers)
            for start in range(0, -(-len(numbers) // self.world.size), micro):
                yield domain, own[start : start + micro]

    def _own(self, numbers: range) -> list[int]:
        return list(numbers[self.world.rank :: self.world.size])

    def _read(self, place: Place) -> Batch:
        """A micro batch on the host, in memory that a device copies from without waiting."""
        domain, numbers = place
        windows = [self.source.validation(domain, number) for number in numbers]
        return self._make_batch(windows or [silent_window(self.seq_len)])

    def _labels_behind_an_update(self) -> FloatArray:
        """`_sums_of_labels` of every domain's first windows, `counts` of them: the same bits on each process.

        A domain whose windows have no label (the end of a long prompt) gets more of them. Raises DdkError, on all
        processes, for one without any label.
        """
        sums = self._sums_of_labels(dict(enumerate(map(range, self.counts))))
        sizes = self.source.validation_sizes
        while silent := [d for d, (_, labels) in enumerate(sums) if not labels and self.counts[d] < sizes[d]]:
            for domain in silent:
                self.counts[domain] = min(2 * self.counts[domain], sizes[domain])
            sums[silent] = self._sums_of_labels({domain: range(self.counts[domain]) for domain in silent})
        for name, (_, labels) in zip(self.domains, sums, strict=True):
            if not labels:
                raise DdkError(
                    f"{name}/validation: no window with a label, so there is no gap to weigh the domain by",
                    hint="give the domain more text, or name validation files for it",
                )
        return sums

    def _sums_of_labels(self, windows: Mapping[int, range]) -> FloatArray:
        """The labels' log-probabilities added up, and their number, of these domains' windows on all processes:
        [domains, 2]."""
        own = [(domain, number) for domain, numbers in windows.items() for number in self._own(numbers)]
        ahead = 2 * self.source.readers
        labelled = prefetch(self._labelled, own, ahead=ahead, threads=self.source.readers)
        found: dict[int, list[NDArray[np.float32]]] = {domain: [] for domain in windows}
        for (domain, _), logprobs in zip(own, labelled, strict=True):
            found[domain].append(logprobs)
        return self.world.sum(np.array([_sum_and_count(parts) for parts in found.values()]))

    def _labelled(self, place: tuple[int, int]) -> NDArray[np.float32]:
        """The teacher's log-probabilities of a window's labels."""
        window = self.source.validation(*place)
        return np.asarray(window.label_logprobs[window.labels != NO_LABEL], dtype=np.float32)


def _sum_and_count(parts: list[NDArray[np.float32]]) -> tuple[float, float]:
    values = np.concatenate(parts or [np.zeros(0, np.float32)]).astype(np.float64)
    return float(values.sum()), float(len(values))


def _mean_ce(sums: FloatArray) -> FloatArray:
    return np.asarray(-(sums[:, 0] / sums[:, 1]), dtype=np.float64)
