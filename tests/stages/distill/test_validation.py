"""What a validation reads and adds up, on one process and on several."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import N_SUMS
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.sources import CacheSource
from ddk_pipe.stages.distill.validation import Validation
from ddk_pipe.stages.distill.world import World, Wrapped

SETS = ["distill.validation_budget=null", "distill.micro_batch_windows=1"]


class Watched(CacheSource):
    """Notes which validation windows are read; plays has one only."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.validation_sizes[1] = 1
        self.asked: list[tuple[int, int]] = []

    def validation(self, domain: int, window: int) -> CachedWindow:
        self.asked.append((domain, window))
        return super().validation(domain, window)


class Among(World):
    """One of several processes, whose others' labels are made up: their sums are never zero."""

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values + 1


def alone(cached: Path, *sets: str) -> Parts:
    return Parts(load_project(cached, [*SETS, *sets]))


def of_rank(parts: Parts, rank: int, size: int) -> tuple[Validation, Watched]:
    source = Watched(parts.project)
    world = Among(rank, size)
    wrapped = Wrapped(parts.student, parts.student, world, sharded=False)
    return Validation(parts.project, source, wrapped, parts._autocast), source


def test_sums_are_those_of_every_micro_batch_in_order(cached: Path) -> None:
    parts = alone(cached)
    source = CacheSource(parts.project)
    wanted = torch.zeros(2, N_SUMS, dtype=torch.float64)
    with torch.no_grad():
        for domain, count in enumerate(parts.validation.counts):
            for number in range(count):
                batch = parts.make_batch([source.validation(domain, number)])
                wanted[domain] += parts.student(
                    batch.tokens, batch.labels, batch.rows, documents=batch.documents, measuring=True
                )
    assert parts.validation.counts[0] > 1
    with torch.no_grad():
        assert np.array_equal(parts.validation.run().sums, wanted.numpy())


def test_the_teachers_ce_is_the_mean_over_all_windows(cached: Path) -> None:
    """To the bit: a run's record and its resume compare it."""
    parts = alone(cached)
    for domain, found in enumerate(parts.teacher_ce):
        windows = [parts.source.validation(domain, n) for n in range(parts.validation.counts[domain])]
        labelled = np.concatenate([window.label_logprobs[window.labels != NO_LABEL] for window in windows])
        assert found == -labelled.astype(np.float64).mean()


@pytest.mark.parametrize("size", [2, 3])
def test_processes_read_their_own_windows_and_nothing_twice(cached: Path, size: int) -> None:
    """Not all have a window of plays: they take part in the forward pass all the same."""
    parts = alone(cached)
    ranks = [of_rank(parts, rank, size) for rank in range(size)]
    counts = ranks[0][0].counts
    everything = [(domain, window) for domain, count in enumerate(counts) for window in range(count)]
    with torch.no_grad():
        windows = [range(count) for count in counts]
        whole = of_rank(parts, 0, 1)[0]._own_sums(windows)
        before = [list(source.asked) for _, source in ranks]
        sums = [validation._own_sums(windows) for validation, _ in ranks]
    assert sorted(place for asked in before for place in asked) == everything
    for asked, (_, source) in zip(before, ranks, strict=True):
        assert sorted(source.asked[len(asked) :]) == sorted(asked)  # again, and only these
    assert len({len(list(validation._batches(windows))) for validation, _ in ranks}) == 1
    np.testing.assert_allclose(sum(sums), whole, rtol=1e-6, atol=1e-9)


def test_what_a_budget_left_out_is_added(cached: Path) -> None:
    """The student is judged by all windows at the end of its run."""
    parts = alone(cached)
    wanted = parts.validation.run()
    assert parts.validation.complete(wanted) is wanted
    few = alone(cached, "distill.validation_budget=0.001").validation
    assert few.counts == [1, 1]
    outcome = few.run()
    found = few.complete(outcome)
    assert found.sums[0, 0] > outcome.sums[0, 0]
    np.testing.assert_allclose(found.sums, wanted.sums, rtol=1e-6)
    np.testing.assert_allclose(found.teacher_ce, wanted.teacher_ce, rtol=1e-12)


def test_no_window_is_held(cached: Path) -> None:
    def windows() -> int:
        gc.collect()
        return sum(type(value) is CachedWindow for value in gc.get_objects())

    before = windows()
    parts = alone(cached)
    parts.validation.run()
    assert windows() == before


def test_windows_without_a_label_are_made_up_for(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first windows of a domain may be the inside of one long prompt."""
    real = CacheSource.validation

    def silent(self: CacheSource, domain: int, window: int) -> CachedWindow:
        found = real(self, domain, window)
        return replace(found, labels=np.full_like(found.labels, NO_LABEL)) if window == 0 else found

    monkeypatch.setattr(CacheSource, "validation", silent)
    parts = alone(cached, "distill.validation_windows=1")
    assert parts.validation.counts == [2, 2]
    assert np.isfinite(parts.validation.run().student_ce).all()


def test_a_domain_without_labels(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = CacheSource.validation

    def silent(self: CacheSource, domain: int, window: int) -> CachedWindow:
        found = real(self, domain, window)
        return CachedWindow(
            found.tokens, np.full_like(found.labels, NO_LABEL), found.label_logprobs, found.targets
        )

    monkeypatch.setattr(CacheSource, "validation", silent)
    with pytest.raises(DdkError, match="code/validation: no window with a label"):
        alone(cached)
