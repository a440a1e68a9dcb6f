"""What a sweep's folder remembers: sweep.json, with the caches that its runs are made from.

<output>/sweeps/<name>/sweep.json       this file
                       runs/<run>.json  how a run ended
                       results.parquet  one row per run
                       logs/<run>.log   a run's lines, where several run at once
<output>/distill/<run>/                 the runs themselves, like any other
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import ddk_pipe
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import DOMAIN_NAME, Project, RunSpec, Sweep
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.sweep.run import cache_digest


class _Entry(BaseModel):
    """A run, whose name is that of a folder beside the others."""

    model_config = ConfigDict(strict=True)
    name: str = Field(pattern=f"^{DOMAIN_NAME.pattern}$")
    group: str
    seed: int | None
    overrides: list[str]


class _Record(BaseModel):
    """Of what types the fields of sweep.json are that a report reads."""

    model_config = ConfigDict(strict=True)
    name: str
    file: str
    manifest: str
    command: str
    caches: dict[str, str | None] = {}
    runs: list[_Entry]
    versions: dict[str, str]


def write_record(
    folder: Path, sweep: Sweep, runs: dict[str, RunSpec], projects: dict[str, Project]
) -> dict[str, str | None]:
    """Note the sweep; returns the digest of each run's cache.

    Raises DdkError if a cache is not there, or not the one that the sweep began with.
    """
    digests: dict[tuple[Any, ...], str | None] = {}
    caches = {}
    for name, project in projects.items():
        key = (
            project.cache.name,
            project.manifest.cache.model_dump_json(),
            project.manifest.distill.targets,
        )
        if key not in digests:
            digests[key] = cache_digest(project)
        caches[name] = digests[key]
    before = read_record(folder).get("caches", {}) if (folder / "sweep.json").is_file() else {}
    for name, digest in caches.items():
        if before.get(name, digest) != digest:
            raise cache_changed(projects[name].cache.name)
    record = {
        "name": sweep.name,
        "file": str(sweep.path),
        "manifest": str(sweep.manifest),
        "spec": sweep.spec.model_dump(mode="json"),
        "command": shlex.join(["ddk-pipe", *sys.argv[1:]]),
        "caches": {**before, **caches},
        "runs": [
            {
                "name": run.name,
                "group": run.group,
                "seed": run.seed,
                "changes": run.changes,
                "overrides": list(run.overrides),
            }
            for run in runs.values()
        ],
        "versions": {"ddk_pipe": ddk_pipe.__version__},
    }
    durable.write_file(folder / "sweep.json", durable.to_json(record))
    return caches


def cache_changed(name: str) -> DdkError:
    """The refusal to mix runs of two caches in one table."""
    return DdkError(
        f"{name}: not the cache that this sweep began with",
        hint="give the sweep another `name` to begin anew, or bring the old cache back",
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The content of sweep.json; raises DdkError if there is none, or if it is damaged."""
    path = folder / "sweep.json"
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        _Record.model_validate(values)
        return values
    except FileNotFoundError:
        raise DdkError(f"{folder}: no sweep", hint="run `ddk-pipe sweep`") from None
    except (ValueError, TypeError, RecursionError):
        raise DdkError(f"{path}: damaged", hint="remove it; `ddk-pipe sweep` writes it again") from None


def trials_before(folder: Path, sweep: Sweep) -> list[dict[str, Any]]:
    """The values that a search has tried so far, in order: {dotted field: value} of each trial.

    Raises DdkError if it was a search of something else: its findings say nothing of this one.
    """
    if not (folder / "sweep.json").is_file():
        return []
    record = read_record(folder)
    before, now = record["spec"], sweep.spec.model_dump(mode="json")
    then, search = before.get("search"), now["search"]
    if before["set"] != now["set"] or not then or any(then[key] != search[key] for key in ("space", "seed")):
        raise DdkError(
            f"{sweep.path}: not the search that {folder.name} began as (set, space, seed)",
            hint="give it another `name` to begin anew, or bring the old values back",
        )
    trials: list[dict[str, Any]] = []
    for run in record["runs"]:
        # in the space's order: the file is sorted, names are not
        values = {field: run["changes"][field] for field in search["space"]}
        if values not in trials:
            trials.append(values)
    return trials


def finished_tokens_per_second(output: Path) -> list[float]:
    """Of every finished run under an output folder."""
    rates = []
    for path in sorted((output / "distill").glob("*/run.json")):
        try:
            rates.append(float(json.loads(path.read_bytes())["tokens_per_second"]))
        except (ValueError, KeyError, TypeError, RecursionError):  # of another version: it only tells a rate
            continue
    return rates
