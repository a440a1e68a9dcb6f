"""identity.json, in a run's folder from its start on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import ddk_pipe
from ddk_pipe.pipeline.errors import DdkError, first_mistake
from ddk_pipe.pipeline.storage import durable

NAME = "identity.json"
MOST_BYTES = 1 << 24
VERSION = 1


@dataclass(frozen=True)
class Identity:
    """What a run is, besides its name and place."""

    settings: dict[str, Any]  # of the manifest, by section
    made_of: dict[str, Any]  # what it reads and starts from, by digests
    extends: list[str] = field(
        default_factory=list
    )  # digests of the settings of shorter runs that it goes on from

    @property
    def settings_digest(self) -> str:
        return durable.digest(durable.to_json(self.settings))

    @property
    def made_of_digest(self) -> str:
        return durable.digest(durable.to_json(self.made_of))


class _Weights(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    stamp: str
    digest: str


class _File(BaseModel):
    """identity.json; it may come from a stranger."""

    model_config = ConfigDict(strict=True, extra="forbid")
    version: int
    ddk_pipe: str
    settings: dict[str, Any]
    made_of: dict[str, Any]
    extends: list[str]
    weights: dict[str, _Weights]  # digests that are known, by folder


def read_identity(run: Path) -> tuple[Identity | None, dict[str, dict[str, str]]]:
    """What the folder's run is, and the digests of model folders that it knows; None if it is not on record.

    Raises DdkError for a damaged file.
    """
    path = run / NAME
    if not path.exists() and not path.is_symlink():
        return None, {}
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise ValueError("no ordinary file")
        file = _File.model_validate_json(path.read_bytes())
        if file.version != VERSION:
            raise ValueError("another version")
    except (ValidationError, ValueError, RecursionError) as problem:
        raise DdkError(
            f"{path}: damaged, so it cannot be told what this run was made of ({_first(problem)})",
            hint="bring it back, set another distill.name, or delete that folder",
        ) from None
    known = {folder: weights.model_dump() for folder, weights in file.weights.items()}
    return Identity(file.settings, file.made_of, file.extends), known


def write_identity(run: Path, identity: Identity, known: dict[str, dict[str, str]]) -> None:
    """Put it in its place, durably."""
    durable.make_folder(run)
    values = {
        "version": VERSION,
        "ddk_pipe": ddk_pipe.__version__,
        "settings": identity.settings,
        "made_of": identity.made_of,
        "extends": identity.extends,
        "weights": known,
    }
    durable.write_file(run / NAME, durable.to_json(values))


def _first(problem: Exception) -> str:
    return (first_mistake(problem) if isinstance(problem, ValidationError) else str(problem))[:200]
