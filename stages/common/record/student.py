"""ddk_pipe.json beside a student's weights: what it was made of, and the digests of the files that were saved then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import ddk_pipe
from ddk_pipe.pipeline.errors import DdkError, first_mistake
from ddk_pipe.pipeline.models import weights_files
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common.progress import say

NAME = "ddk_pipe.json"
MOST_BYTES = 1 << 20
Text = Annotated[
    str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
]  # a terminal obeys the others


class _File(BaseModel):
    """ddk_pipe.json; it may come from a stranger."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ddk_pipe: Text
    teacher: Text
    teacher_weights: Text | None
    cache_fingerprint: Text
    tokenizer_digest: Text
    started_from: Text | None
    settings: Text
    ids: Annotated[int, Field(ge=1)] | None = None  # that it was taught; none: saved before this was recorded
    files: Annotated[dict[Text, Text], Field(max_length=4096)]


def write_student_record(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Put the record beside the weights that `folder` holds now; `facts` are its fields but for versions and files."""
    record = {"ddk_pipe": ddk_pipe.__version__, **facts, "files": _files(folder)}
    durable.write_file(folder / NAME, durable.to_json(record))
    return record


def read_student_record(folder: Path) -> dict[str, Any] | None:
    """The record of a model folder; None if it has none. Raises DdkError for a damaged one."""
    path = folder / NAME
    try:
        if path.is_symlink() or path.stat().st_size > MOST_BYTES:
            raise ValueError("no ordinary file")
        values: dict[str, Any] = json.loads(path.read_bytes())
        _File.model_validate(values)
    except FileNotFoundError:
        return None
    except ValidationError as problem:
        raise _damaged(path, first_mistake(problem)) from None
    except (OSError, ValueError, RecursionError):
        raise _damaged(path, "no record of a student") from None
    return values


def check_student(folder: Path, summary: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The student's record, once it agrees with the files beside it; `summary` is the run's, if it is of a run.

    Raises DdkError, naming the file, for weights that are not those that were saved. Of a run of an older version,
    which kept no record, that is said; a model folder without a record is anybody's, and None is returned.
    """
    record = read_student_record(folder)
    known = (summary or {}).get("student")
    if known is not None and record != known:
        raise DdkError(
            f"{folder / NAME}: {'not there' if record is None else 'not what the run wrote'}, so it cannot be told"
            " whether these are the weights that the run saved",
            hint="bring the folder back as the run left it, or train again",
        )
    if record is None:
        if summary is not None:
            say(f"{folder}: saved before students had a record, so its weights cannot be checked")
        return None
    now, saved = _files(folder), record["files"]
    for name in sorted({*now, *saved}):
        if now.get(name) != saved.get(name):
            raise DdkError(
                f"{folder / name}: {_changed(saved.get(name), now.get(name))}",
                hint=f"bring it back; a model of your own making is a folder without {NAME}, outside of a run",
            )
    return record


def _changed(saved: str | None, now: str | None) -> str:
    if saved is None:
        return "not a file that the run saved"
    return f"not what the run saved (blake2b {saved[:8]}, now {now[:8] if now else 'not there'})"


def _files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): durable.file_digest(path)
        for path in weights_files(folder)
        if path.is_file()
    }


def _damaged(path: Path, why: str) -> DdkError:
    return DdkError(f"{path}: damaged ({why[:200]})", hint="bring it back, or remove it")
