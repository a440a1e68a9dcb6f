"""A sweep file and what it expands to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Sweep, load_sweep
from ddk_pipe.pipeline.manifest.sweep import describe


def write(folder: Path, **values: Any) -> Sweep:
    path = folder / "rules.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return load_sweep(path)


def test_a_grid_times_variants_times_seeds(tmp_path: Path) -> None:
    sweep = write(
        tmp_path,
        set={"distill.steps": 5},
        grid={"distill.mixing": ["ddk", "uniform"], "distill.gamma": [0.2, 1.0]},
        runs=[{}, {"student.keep_layers": [0, 2]}],
        seeds=[0, 1, 2],
    )
    runs = sweep.expand()
    assert len(runs) == sweep.spec.size == 24 and len({run.name for run in runs}) == 24
    assert len({run.group for run in runs}) == 8
    first, last = runs[0], runs[-1]
    assert first.group == "mixing=ddk, gamma=0.2" and first.seed == 0
    assert last.group == "mixing=uniform, gamma=1.0, keep_layers=[0, 2]" and last.seed == 2
    assert set(last.overrides) == {
        "distill.steps=5",
        'distill.mixing="uniform"',
        "distill.gamma=1.0",
        "student.keep_layers=[0, 2]",
        f'distill.name="{last.name}"',
        "distill.seed=2",
    }
    assert all(len(run.name) <= 64 and run.name.startswith("rules.") for run in runs)


def test_names_do_not_depend_on_the_place_in_the_file(tmp_path: Path) -> None:
    """Values may be added later: what is finished keeps its name. What all runs share is part of the name."""
    few = write(tmp_path, grid={"distill.mixing": ["ddk"]}).expand()
    more = write(tmp_path, grid={"distill.mixing": ["uniform", "ddk"]}, seeds=[3, 0]).expand()
    assert few[0].name in {run.name for run in more}
    other = write(tmp_path, grid={"distill.mixing": ["ddk"]}, set={"distill.steps": 9}).expand()
    assert other[0].name != few[0].name


def test_size_is_known_without_making_the_runs(tmp_path: Path) -> None:
    grid = {f"distill.{name}": list(range(100)) for name in ("gamma", "alpha", "steps", "interval_steps")}
    assert write(tmp_path, grid=grid, seeds=list(range(10))).spec.size == 10**9


def test_a_search_names_no_runs_before_it_is_run(tmp_path: Path) -> None:
    found = write(
        tmp_path, search={"trials": 20, "space": {"distill.gamma": {"low": 0, "high": 1}}}, seeds=[0, 1]
    )
    assert found.spec.size == 40 and found.expand() == []
    assert [run.seed for run in found.group({"distill.gamma": 0.25})] == [0, 1]


def test_short_names_that_tell_apart() -> None:
    assert describe({}) == "as in the manifest"
    assert describe({"distill.gamma": 1, "cache.path": "x"}) == "gamma=1, path=x"
    assert describe({"a.path": 1, "b.path": 2}) == "a.path=1, b.path=2"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"gird": {}}, "gird: unknown key; did you mean grid?"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"seeds": [-1]}, "greater than or equal to 0"),
        ({"grid": {"distill.gamma": []}}, "grid.distill.gamma: List should have at least 1 item"),
        ({"grid": {"distill.seed": [1]}}, "distill.seed cannot be varied; list the seeds in `seeds`"),
        ({"runs": [{"distill.name": "x"}]}, "distill.name cannot be varied"),
        ({"set": {"output": "x"}}, "output cannot be varied"),
        ({"name": "../x"}, "name: String should match pattern"),
        ({"stop_early": {"rule": "mean"}}, "stop_early.rule: Input should be 'median'"),
        ({"stop_early": {"after": 1}}, "stop_early.after: Input should be less than 1"),
        ({"search": {"space": {"a": {"choices": [1]}}}}, "search.trials: missing"),
        ({"search": {"trials": 1, "space": {}}}, "search.space: Dictionary should have at least 1 item"),
        (
            {"search": {"trials": 1, "space": {"a.b": {"low": 0, "hihg": 1}}}},
            "search.space.a.b.hihg: unknown key; did you mean high?",
        ),
        ({"search": {"trials": 1, "space": {"a": {"low": 0}}}}, "give low and high, or choices"),
        ({"search": {"trials": 1, "space": {"a": {"low": 2, "high": 1}}}}, "low 2 is not below high 1"),
        (
            {"search": {"trials": 1, "space": {"a": {"low": 0, "high": 1, "log": True}}}},
            "log needs low above 0",
        ),
        (
            {"search": {"trials": 1, "space": {"a": {"choices": [1], "step": 1}}}},
            "either choices, or a range",
        ),
        (
            {"search": {"trials": 1, "space": {"a": {"choices": [1]}}}, "grid": {"b": [1]}},
            "a search and a grid (or runs); put what is to vary into search.space",
        ),
        (
            {"search": {"trials": 1, "space": {"distill.seed": {"choices": [1]}}}},
            "distill.seed cannot be varied",
        ),
    ],
)
def test_refused(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(DdkError) as mistake:
        write(tmp_path, **values)
    assert expected in str(mistake.value)


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    for values in (
        {"grid": {"distill.mixing": ["ddk", "ddk"]}},
        {"seeds": [1, 1]},
        {"runs": [{"distill.gamma": 1}, {"distill.gamma": 1}]},
    ):
        with pytest.raises(DdkError, match="stands there twice"):
            write(tmp_path, **values).expand()
