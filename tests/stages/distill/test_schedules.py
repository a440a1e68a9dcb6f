"""Learning rate and gamma by step."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from ddk_pipe.pipeline.manifest import Distill, load_project
from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.schedules import gamma_at, learning_rate

MANIFESTS = Path(__file__).resolve().parents[3] / "manifests"


def options(**values: Any) -> Distill:
    return Distill.model_validate({"steps": 100, **values})


def test_learning_rates() -> None:
    shapes = {
        name: [
            learning_rate(options(schedule={"name": name, "warmup_fraction": 0.1}), step)
            for step in range(100)
        ]
        for name in ("cosine", "linear", "wsd", "constant")
    }
    for rates in shapes.values():
        assert rates[:10] == pytest.approx([3e-4 * (step + 1) / 10 for step in range(10)])
    assert set(shapes["constant"][9:]) == {3e-4} == set(shapes["wsd"][9:81])
    assert shapes["wsd"][90] == pytest.approx(3e-4 * 0.55)  # half of the way from 1 to 0.1
    assert shapes["linear"][55] == pytest.approx(3e-4 * 0.55) == shapes["cosine"][55]
    for name in ("cosine", "linear", "wsd"):
        assert all(a >= b for a, b in itertools.pairwise(shapes[name][10:]))
        assert 3e-5 <= shapes[name][-1] < 5e-5


def test_the_papers_schedule() -> None:
    paper = load_project(MANIFESTS / "ddk-qwen1.5-14b-to-1.8b.yaml").manifest.distill
    assert learning_rate(paper, 0) == pytest.approx(3e-8)
    assert learning_rate(paper, 999) == pytest.approx(3e-5) == learning_rate(paper, 1000)
    assert learning_rate(paper, 29_999) == pytest.approx(3e-6, rel=1e-3)


@pytest.mark.slow
def test_gamma_schedules(cached: Path) -> None:
    constant = options(gamma=0.5)
    assert {gamma_at(constant, step) for step in range(100)} == {0.5}
    falling = options(gamma=0.5, gamma_schedule={"name": "linear", "first_ratio": 2.0, "final_ratio": 0.0})
    values = [gamma_at(falling, step) for step in range(100)]
    assert values[0] == 1.0 and values[-1] == 0.0 and values[33] == pytest.approx(2 / 3)
    project = load_project(cached, ["distill.gamma_schedule={name: cosine, first_ratio: 0, final_ratio: 1}"])
    distill(project)
    rows = read_rows(project.run, "steps")
    assert rows[0]["gamma"] == 0 and rows[0]["loss"] == rows[0]["ce"]
    assert rows[-1]["gamma"] == pytest.approx(0.2) and rows[-1]["loss"] > rows[-1]["ce"]
