"""A run's folder as others read it: what was asked, how far it came, where its cache is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddk_pipe.pipeline.errors import DdkError, first_mistake
from ddk_pipe.pipeline.manifest import Manifest, recorded_manifest
from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.pipeline.storage import Folder, is_url, open_folder

EVALUATION = "evaluation.json"
FIGURES = {
    "steps": ("loss", "tokens_per_second"),
    "validation": ("gap", "student_ce", "teacher_ce", "weight"),
}
MAKE_AGAIN = "remove it and make it again"
Rows = list[dict[str, Any]]
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]  # a terminal would obey the others
Facts = dict[Name, Any]


class _Read(BaseModel):
    """Of what types the fields are that are read from a run's files; others may stand beside them."""

    model_config = ConfigDict(strict=True)


class _Cache(_Read):
    path: str | None = None


class _Manifest(_Read):
    output: str = ""
    cache: _Cache = _Cache()
    teacher: Facts = {}
    distill: Facts = {}


class Summary(_Read):
    """run.json."""

    settings: Name = ""
    command: Name | None = None
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    parameters: int = 0
    peak_memory_bytes: int | None = None
    cache_fingerprint: Name | None = None
    student: Facts | None = None
    manifest: _Manifest = _Manifest()
    versions: dict[Name, Name] = {}


class _Builtin(_Read):
    domains: dict[Name, Facts] = {}


class Evaluation(_Read):
    """evaluation.json."""

    builtin: _Builtin = _Builtin()
    tasks: dict[Name, Facts] = {}


@dataclass(frozen=True)
class RunRecord:
    """One run. `summary` is run.json, none while it is unfinished; `evaluation` what `ddk-pipe evaluate` found."""

    folder: Path
    steps: Rows
    validation: Rows
    summary: dict[str, Any] | None
    evaluation: dict[str, Any] = field(default_factory=dict)
    group: str = ""  # of a sweep
    seed: int | None = None
    command: str | None = None
    error: str | None = None
    stopped_early: bool = False  # by the sweep's rule

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(row["domain"] for row in self.validation))

    @property
    def last(self) -> Rows:
        """The last validation: one row per domain."""
        return [row for row in self.validation if row["step"] == self.validation[-1]["step"]]

    @property
    def gap_nats(self) -> float | None:
        """Mean over the domains at the last validation."""
        return sum(row["gap"] for row in self.last) / len(self.last) if self.validation else None

    def gap_at(self, step: int) -> float:
        """Mean over the domains at a validation; NaN if there was none at that step."""
        gaps = [row["gap"] for row in self.validation if row["step"] == step]
        return sum(gaps) / len(gaps) if gaps else math.nan

    @property
    def output(self) -> Path:
        """<output> of the manifest: runs are in <output>/distill/<name>."""
        return self.folder.absolute().parent.parent

    def cache(self) -> Folder:
        """The cache it was trained from; raises DdkError if the record does not say where it is."""
        named = (self.summary or {}).get("manifest", {}).get("cache", {}).get("path")
        if named is None:
            return open_folder(self.output / "cache")
        if is_url(named):
            return open_folder(named)
        path = Path(named).expanduser()
        if path.is_absolute():
            return open_folder(path)
        output = Path((self.summary or {})["manifest"]["output"]).expanduser()
        if output.is_absolute():
            raise DdkError(
                f"{self.folder}: its cache {named} is relative to a manifest that is not known here",
                hint="name it with --cache",
            )
        root = self.output
        for part in output.parts:
            root = root.parent if part not in (".", "") else root
        return open_folder(root / path)

    @property
    def manifest(self) -> Manifest | None:
        """As it was when the run finished; None for an unfinished run, or one of another version."""
        try:
            return recorded_manifest((self.summary or {})["manifest"])
        except (KeyError, ValueError):
            return None


def is_run(folder: Path) -> bool:
    """True for the folder of a run, also of one that has only begun."""
    return (folder / "steps.jsonl").is_file() or (folder / "run.json").is_file()


def load_run(folder: Path, **known: Any) -> RunRecord:
    """Read the record; raises DdkError if `folder` holds no run or a damaged one."""
    if not is_run(folder):
        raise DdkError(f"{folder}: no run", hint="name a folder that `ddk-pipe distill` wrote")
    summary = _json(folder / "run.json", Summary)
    return RunRecord(
        folder=folder,
        steps=_rows(folder, "steps"),
        validation=_rows(folder, "validation"),
        summary=summary,
        evaluation=_json(folder / EVALUATION, Evaluation) or {},
        **{"command": (summary or {}).get("command"), **known},
    )


def _rows(folder: Path, table: str) -> Rows:
    """The rows of a table; raises DdkError for one without its figures, or with a domain that is no name."""
    rows = read_rows(folder, table)
    for number, row in enumerate(rows, start=1):
        figures = all(isinstance(row.get(name), int | float) for name in FIGURES[table])
        if not figures or not str(row.get("domain", "")).isprintable():
            raise DdkError(f"{folder / table}.jsonl: line {number} is damaged", hint=MAKE_AGAIN)
    return rows


def _json(path: Path, kind: type[_Read]) -> dict[str, Any] | None:
    """A JSON object whose fields are of the types that `kind` names."""
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        kind.model_validate(values)
    except FileNotFoundError:
        return None
    except ValidationError as problem:
        raise DdkError(f"{path}: damaged ({first_mistake(problem)})", hint=MAKE_AGAIN) from None
    except (ValueError, TypeError, RecursionError):
        raise DdkError(f"{path}: damaged", hint=MAKE_AGAIN) from None
    return values
