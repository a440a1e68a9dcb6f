"""A checkpoint on the disk: its name, its position, and how it is removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ddk_pipe.pipeline.errors import first_mistake
from ddk_pipe.stages.distill.checkpoints.failures import damaged

T = TypeVar("T")
NAME = "step-{:08d}"
POSITION_BYTES = 1 << 24


@dataclass(frozen=True)
class Found:
    """A checkpoint on the disk."""

    folder: Path
    position: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.position["step"])

    def position_as(self, kind: type[T], check: Callable[[T], object]) -> T:
        """Its position as this dataclass; raises DdkError for other types, and where `check` raises ValueError."""
        try:
            position = TypeAdapter(kind).validate_json(json.dumps(self.position), strict=True)
            check(position)
        except ValidationError as problem:
            raise damaged(self.folder, ValueError(f"position.json: {first_mistake(problem)}")) from None
        except (ValueError, TypeError) as problem:
            raise damaged(self.folder, problem) from None
        return position


def read_position(folder: Path) -> dict[str, Any]:
    """The content of position.json; raises OSError or ValueError."""
    path = folder / "position.json"
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        raise ValueError("position.json is not an ordinary file of this folder")
    if path.stat().st_size > POSITION_BYTES:
        raise ValueError(f"position.json has more than {POSITION_BYTES:,} bytes")
    position = json.loads(path.read_bytes())
    if not isinstance(position, dict) or type(position.get("step")) is not int:
        raise ValueError("position.json holds no step")
    if folder.name != NAME.format(position["step"]):
        raise ValueError(f"position.json is of step {position['step']}")
    return position


def remove_checkpoint(folder: Path) -> None:
    """A folder that goes has lost its name first: a kill leaves no half of one behind."""
    going = folder.with_name(f".{folder.name}.old.partial")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)
