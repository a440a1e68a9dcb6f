"""The sweep file: a manifest and how its runs differ, expanded into runs with names of their own.

    manifest: manifest.yaml
    set: {distill.steps: 500}                  # for every run
    grid:                                      # every combination
      distill.mixing: [ddk, uniform]
      distill.gamma: [0.2, 1.0]
    runs:                                      # and each of these, with all of the grid
      - {}
      - {student.keep_layers: [0, 2, 4], distill.optimizer.learning_rate: 1.0e-4}
    seeds: [0, 1, 2]                           # runs that differ in nothing else are one group
    stop_early: {after: 0.3}                   # clearly bad groups end early, by the median rule

In place of `grid` and `runs`, values may be searched for, each trial a group:

    search:
      trials: 20
      space:
        distill.optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
        distill.mixing: {choices: [ddk, uniform]}

A run's name comes from what it changes and not from its place in the file: values may be added later, and what is
finished stays finished.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest.fields import DOMAIN_NAME
from ddk_pipe.pipeline.manifest.project import Project, first_problem, load_project, read_yaml
from ddk_pipe.pipeline.manifest.section import Section
from ddk_pipe.pipeline.storage import durable

OURS = {  # fields that a sweep sets itself, and where to say what is wanted
    "distill.name": "the sweep names its runs; set `name` of the sweep",
    "distill.seed": "list the seeds in `seeds`",
    "output": "set it in the manifest: all runs share it",
}
MOST_SLUG = 24  # characters of a run's name that say what it changes


class StopEarly(Section):
    """When a group of runs is clearly bad: the median rule, see `ddk_pipe.stages.sweep.stop`."""

    rule: Literal["median"] = Field("median", description="how it is told; there is one rule")
    after: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.3, description="share of a run's steps that it makes in any case"
    )
    others: Annotated[int, Field(ge=1)] = Field(
        3, description="earlier groups that must have come as far; before that nothing is stopped"
    )


class Dimension(Section):
    """The values that a search may give one field: a range, or choices."""

    low: int | float | None = Field(None, description="the least value")
    high: int | float | None = Field(None, description="the greatest value")
    log: bool = Field(False, description="search by the value's logarithm")
    step: Annotated[int | float, Field(gt=0)] | None = Field(
        None, description="low, low + step, ...; whole numbers if all three are"
    )
    choices: Annotated[list[Any], Field(min_length=1)] | None = Field(None, description="any values")

    @pydantic.model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if self.choices is not None:
            if {"low", "high", "log", "step"} & self.model_fields_set:
                raise ValueError("either choices, or a range of low and high")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0, and no step")
        return self

    def examples(self) -> list[Any]:
        """Values that show whether the field takes what the search may give it: every choice, or ends and middle."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None and self.high is not None
        if self.step is not None:
            return [self.low, self.low + self.step]
        return [float(self.low), 0.62 * self.low + 0.38 * self.high, float(self.high)]


class Search(Section):
    """Values found by trying: Optuna's TPE sampler (the extra `optuna`), by the mean gap of the last validation."""

    trials: Annotated[int, Field(ge=1)] = Field(description="groups that are tried, failed ones included")
    space: Annotated[dict[str, Dimension], Field(min_length=1)] = Field(
        description="dotted field: {low, high, log, step} or {choices}"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the search")
    random_trials: Annotated[int, Field(ge=0)] = Field(
        10, description="first trials, drawn at random; from then on by what was found"
    )


class SweepSpec(Section):
    """What a sweep file may say."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,23}$")] | None = Field(
        None, description="the sweep's folder: <output>/sweeps/<name>; none: the file's own name"
    )
    manifest: str = Field("manifest.yaml", description="the base manifest, from this file's folder")
    set: dict[str, Any] = Field({}, description="dotted field: value, for every run")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="dotted field: values; every combination is run"
    )
    runs: list[dict[str, Any]] = Field(
        [{}],
        min_length=1,
        description="dotted field: value, one mapping per variant; each with all of the grid",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="distill.seed of the runs of a group"
    )
    search: Search | None = Field(None, description="in place of grid and runs: values found by trying")
    stop_early: StopEarly | None = Field(None, description="end clearly bad groups early; none: never")

    @property
    def fields(self) -> list[str]:
        """Dotted names of all fields that the file sets, sorted."""
        space = self.search.space if self.search else {}
        return sorted({*self.set, *self.grid, *space, *(field for run in self.runs for field in run)})

    @property
    def size(self) -> int:
        """Number of runs, without making them."""
        if self.search is not None:
            return self.search.trials * len(self.seeds)
        return len(self.runs) * len(self.seeds) * math.prod(len(values) for values in self.grid.values())


@dataclass(frozen=True)
class RunSpec:
    """One student of a sweep."""

    name: str  # of its folder: <output>/distill/<name>
    group: str  # what it changes, for people; runs that differ by their seed alone share it
    seed: int
    changes: dict[str, Any]  # dotted field: value, in which the sweep's groups differ
    overrides: tuple[str, ...]  # "field=value", all of them, for load_project

    def project(self, manifest: Path) -> Project:
        """The run's checked manifest; raises DdkError as load_project does."""
        return load_project(manifest, list(self.overrides))


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file. `manifest` is an absolute path."""

    path: Path
    name: str
    spec: SweepSpec
    manifest: Path

    @property
    def output(self) -> Path:
        """The output folder, which all runs share; raises DdkError as load_project does."""
        return self.group({})[0].project(self.manifest).output

    def group(self, changes: dict[str, Any]) -> list[RunSpec]:
        """The runs of one group, a run per seed."""
        return [self._run(changes, seed) for seed in self.spec.seeds]

    def expand(self) -> list[RunSpec]:
        """All runs that are listed: groups in the file's order, seeds innermost; none of a search.

        Raises DdkError for two runs that are the same.
        """
        if self.spec.search is not None:
            return []
        runs = [
            run
            for variant in self.spec.runs
            for values in itertools.product(*self.spec.grid.values())
            for run in self.group({**dict(zip(self.spec.grid, values, strict=True)), **variant})
        ]
        twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
        if twice:
            run = next(run for run in runs if run.name == twice[0])
            raise DdkError(
                f"{self.path}: {run.group} with seed {run.seed} stands there twice",
                hint="remove one of the two values, variants or seeds",
            )
        return runs

    def _run(self, changes: dict[str, Any], seed: int) -> RunSpec:
        everything = {**self.spec.set, **changes}
        label = describe(changes)
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", ".".join(str(value) for value in changes.values())).strip("-")
        key = durable.digest(durable.to_json(everything))[:6]
        name = ".".join(filter(None, [self.name, slug[:MOST_SLUG].strip("-_"), f"{key}-s{seed}"]))
        fields = {**everything, "distill.name": name, "distill.seed": seed}
        return RunSpec(name, label, seed, changes, tuple(f"{k}={json.dumps(v)}" for k, v in fields.items()))


def describe(changes: dict[str, Any]) -> str:
    """{"distill.gamma": 1.0} -> "gamma=1.0": the shortest ends of the fields' names that tell them apart."""
    ends = Counter(name.split(".")[-1] for name in changes)
    short = {name: name.split(".")[-1] if ends[name.split(".")[-1]] == 1 else name for name in changes}
    return (
        ", ".join(f"{short[name]}={_plain(value)}" for name, value in changes.items()) or "as in the manifest"
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def load_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises DdkError with one line, for unknown keys with the nearest name."""
    values = read_yaml(path)
    try:
        spec = SweepSpec.model_validate(values)
    except pydantic.ValidationError as failure:
        raise first_problem(path, failure, SweepSpec) from None
    name = spec.name or re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem)[:24].strip("-_")
    if not DOMAIN_NAME.fullmatch(name):
        raise DdkError(f"{path}: its name makes no folder's name", hint="set `name` in it")
    if spec.search is not None and {"grid", "runs"} & spec.model_fields_set:
        raise DdkError(
            f"{path}: a search and a grid (or runs)",
            hint="put what is to vary into search.space, or leave search out",
        )
    for field in spec.fields:
        if field in OURS:
            raise DdkError(f"{path}: {field} cannot be varied", hint=OURS[field])
    manifest = Path(spec.manifest).expanduser()
    return Sweep(path, name, spec, (path.parent / manifest).absolute())
