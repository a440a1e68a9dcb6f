"""A step queues work and waits for nothing; what it found is read in one go."""

from __future__ import annotations

from pathlib import Path

import pytest
from waits import Waits

from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.windows import steps_of_windows

SETS = ["distill.batch_tokens=256", "distill.micro_batch_windows=2"]


def opened(manifest: Path, *sets: str) -> tuple[Parts, Position]:
    parts = Parts(load_project(manifest, [*SETS, *sets]))
    return parts, Position(0, 0.0, [0.5, 0.5], [0.5, 0.5], parts.sampler.state_dict(), "")


def assert_no_waits(parts: Parts, position: Position) -> None:
    data = steps_of_windows(parts, position)
    parts.stepper.step(0, next(data))  # makes what is made once
    second = next(data)
    with Waits() as waits:
        parts.stepper.step(1, second)
    assert not waits.counts
    with Waits() as waits:
        rows = list(parts.stepper.settle())
    assert [row["step"] for row in rows] == [1, 2]
    assert waits.total == 1, waits.counts


def test_a_step_waits_for_nothing(cached: Path) -> None:
    assert_no_waits(*opened(cached))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_nor_with_a_tail_at_another_temperature(cached: Path, direction: str) -> None:
    sets = ["cache.scheme=topk", "cache.k=8", "cache.temperatures=[2.0]", "cache.path=other"]
    cache_teacher(load_project(cached, sets))
    assert_no_waits(*opened(cached, *sets, "distill.temperature=2.0", f"distill.direction={direction}"))
