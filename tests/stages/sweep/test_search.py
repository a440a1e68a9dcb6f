"""A sweep that searches: what is proposed, and a search that is continued."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweeps import project_without_teacher, results, write_sweep
from typer.testing import CliRunner

from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.pipeline.manifest import Search
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.report.data import load_report
from ddk_pipe.stages.sweep import Request, status, sweep
from ddk_pipe.stages.sweep.search import Trial, Values, propose

optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="optuna is not installed: `make setup`"
)
RATE = "distill.optimizer.learning_rate"
SPACE: dict[str, Any] = {
    RATE: {"low": 1e-4, "high": 1e-1, "log": True},
    "distill.mixing": {"choices": ["ddk", "uniform"]},
}


def of(trials: int = 20, **space: Any) -> Search:
    return Search.model_validate({"trials": trials, "space": space})


def gap_of(values: Values) -> float:
    """Least at x = 0.01 of choice b, two decades below the middle."""
    return float((np.log10(values["x"]) + 2) ** 2 + (values["c"] != "b"))


@optuna
def test_finds_the_better_region_and_is_the_same_every_time() -> None:
    search = of(x={"low": 1e-4, "high": 1e4, "log": True}, c={"choices": ["a", "b", "c"]})
    trials: list[Trial] = []
    for _ in range(30):
        values = propose(search, trials)
        assert values is not None and values == propose(search, trials)
        trials.append(Trial(values, "complete", gap_of(values)))
    drawn, found = ([gap_of(trial.values) for trial in part] for part in (trials[:10], trials[-10:]))
    assert np.mean(found) < np.mean(drawn) / 2
    assert min(found) < min(drawn)


@optuna
def test_what_went_wrong_is_no_reason_to_stop() -> None:
    """Failed and running trials, and ones that were stopped early, are told too."""
    search = of(x={"low": 0.0, "high": 1.0}).model_copy(update={"random_trials": 0})
    trials = [
        Trial({"x": 0.1}, "failed"),
        Trial({"x": 0.2}, "running"),
        Trial({"x": 0.3}, "stopped early", 2.0, 5),
        Trial({"x": 0.4}, "complete", 1.0),
    ]
    values = propose(search, trials)
    assert values is not None and 0 <= values["x"] <= 1


@optuna
def test_values_are_of_the_kind_that_was_asked_for() -> None:
    parts: dict[str, Any] = {
        "whole": {"low": 10, "high": 50, "step": 10},
        "tenths": {"low": 0, "high": 1, "step": 0.1},
        "real": {"low": 0, "high": 1},
        "layers": {"choices": [[0, 1], [0, 2], None]},
    }
    trials: list[Trial] = []
    for number in range(25):
        values = propose(of(**parts), trials)
        assert values is not None
        assert type(values["whole"]) is int and values["whole"] in (10, 20, 30, 40, 50)
        assert values["tenths"] in [place / 10 for place in range(11)]
        assert type(values["real"]) is float and len(str(values["real"])) <= 10 and 0 <= values["real"] <= 1
        assert values["layers"] in ([0, 1], [0, 2], None)
        trials.append(Trial(values, "complete", number / 10))
    assert len({trial.values["whole"] for trial in trials}) > 2


@optuna
def test_a_space_that_is_used_up() -> None:
    search = of(x={"choices": ["a", "b"]}, y={"low": 1, "high": 2, "step": 1})
    trials: list[Trial] = []
    while (values := propose(search, trials)) is not None:
        trials.append(Trial(values, "complete", 1.0))
    assert sorted((trial.values["x"], trial.values["y"]) for trial in trials) == [
        ("a", 1),
        ("a", 2),
        ("b", 1),
        ("b", 2),
    ]


@pytest.fixture
def prepared(tmp_path: Path, tiny_teacher: Path, cached_output: Path) -> Path:
    """A manifest without a teacher; runs of two steps."""
    distill = {"steps": 2, "batch_tokens": 64, "interval_steps": 2, "validation_windows": 1}
    return project_without_teacher(tmp_path / "p", tiny_teacher, cached_output, distill=distill)


@pytest.mark.slow
@optuna
def test_a_search_that_is_continued_equals_an_undisturbed_one(prepared: Path) -> None:
    """From the second trial on by what was found; the table has a row per run, and people see groups."""
    options: dict[str, Any] = {"space": SPACE, "random_trials": 1}
    whole = write_sweep(prepared, name="whole", search={"trials": 3, **options}, seeds=[0, 1])
    sweep(whole, Request(threads=1))
    expected = results(prepared.parent, "whole")
    assert [row["status"] for row in expected] == ["finished"] * 6
    assert [row["seed"] for row in expected] == [0, 1] * 3
    assert len({row["group"] for row in expected}) == 3

    done: dict[Path, int] = {}
    for trials, at_once in ((2, 1), (3, 2)):  # at last the two seeds of one trial beside each other
        path = write_sweep(prepared, name="parts", search={"trials": trials, **options}, seeds=[0, 1])
        sweep(path, Request(parallel=at_once, threads=1))
        rows = results(prepared.parent, "parts")
        assert len(rows) == 2 * trials
        assert all(path.stat().st_mtime_ns == time for path, time in done.items())  # none is repeated
        folder = prepared.parent / "out/distill"
        done = {path: path.stat().st_mtime_ns for path in folder.glob("parts.*/run.json")}
        assert len(done) == 2 * trials
    assert [row | {"run": ""} for row in rows] == [row | {"run": ""} for row in expected]
    assert len(load_report(prepared.parent / "parts.yaml").groups) == 3
    assert len(status(prepared.parent / "parts.yaml")) == 6

    other = write_sweep(
        prepared, name="parts", search={"trials": 3, **options}, set={"distill.gamma": 1}, seeds=[0, 1]
    )
    with pytest.raises(DdkError, match="not the search that parts began as"):
        sweep(other)


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr


def test_without_optuna(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the extra; what can be seen without it still can."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    path = write_sweep(prepared, search={"trials": 3, "space": SPACE})
    assert call(path, "--dry-run")[0] == 0 and call(path, "--status")[0] == 0
    code, err = call(path)
    assert code == 2
    assert err.splitlines()[-1].endswith(f"search: optuna is not installed; {install_hint('optuna')}")
    assert not (prepared.parent / "out/sweeps").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"space": {"distill.gama": {"low": 0, "high": 1}}},
            "distill.gama: unknown key; did you mean gamma?",
        ),
        ({"space": {"distill.gamma": {"low": -1, "high": 1}}}, "distill.gamma: Input should be greater"),
        (
            {"space": {"distill.mixing": {"choices": ["ddk", 3]}}},
            "distill.mixing: Input should be a valid str",
        ),
        ({"space": {"distill.steps": {"low": 1, "high": 9}}}, "give distill.steps `step: 1`: whole numbers"),
        ({"trials": 300, "space": SPACE}, "300 runs, more than 200; add --yes"),
    ],
)
def test_refused_before_anything_is_run(prepared: Path, values: dict[str, Any], expected: str) -> None:
    code, err = call(write_sweep(prepared, search={"trials": 3, **values}))
    assert code == 2 and expected in err and len(err.splitlines()) == 1
    assert not (prepared.parent / "out/sweeps").exists()


def test_on_ray_it_must_know_how_many_at_once(prepared: Path) -> None:
    code, err = call(write_sweep(prepared, search={"trials": 3, "space": SPACE}), "--engine", "ray")
    assert code == 2 and "add --parallel N" in err
