"""A manifest, one YAML file that says what to do, read and checked before anything is loaded.

Unknown keys are refused with the nearest known name. A relative path is relative to the manifest's folder and may
not leave it; an absolute path is the user's own word.
"""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Any

import pydantic

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest.fields import Manifest
from ddk_pipe.pipeline.manifest.section import Section, section_in
from ddk_pipe.pipeline.manifest.yaml_text import parse_yaml
from ddk_pipe.pipeline.storage import Folder, is_url, open_folder


class Project:
    """A checked manifest and the folder it lives in; turns its names into paths."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self.manifest = manifest
        self.root = root.resolve()

    def path(self, text: str, *, field: str) -> Path:
        """`text` as a path that is absolute by the user's word or stays inside the manifest's folder.

        Raises DdkError for a relative path that leaves it.
        """
        path = Path(text).expanduser()
        if path.is_absolute():
            return path
        inside = (self.root / path).resolve()
        if not inside.is_relative_to(self.root):
            raise DdkError(
                f"{field}: {text} leaves the manifest's folder {self.root}",
                hint="write it as an absolute path if that is what you want",
            )
        return self.root / path

    def model(self, text: str, *, field: str) -> str:
        """A model folder as an absolute path, or a hub id as it is."""
        if text.startswith(("/", "./", "../", "~")) or self.path(text, field=field).is_dir():
            return str(self.path(text, field=field))
        return text

    @property
    def output(self) -> Path:
        return self.path(self.manifest.output, field="output")

    @property
    def tokens(self) -> Path:
        return self.output / "tokens"

    @functools.cached_property
    def cache(self) -> Folder:
        """Where the teacher's predictions are; raises DdkError for a URL of an unknown kind."""
        named = self.manifest.cache.path
        if named and is_url(named):
            return open_folder(named)
        return open_folder(self.path(named, field="cache.path") if named else self.output / "cache")

    @property
    def run(self) -> Path:
        return self.output / "distill" / self.manifest.distill.name

    @property
    def teacher_model(self) -> str:
        return self.model(self.manifest.teacher.model, field="teacher.model")

    @property
    def tokenizer(self) -> str:
        named = self.manifest.tokenizer
        return self.model(named, field="tokenizer") if named else self.teacher_model


def load_project(path: Path, overrides: list[str] | None = None) -> Project:
    """Read a YAML manifest, apply dotted overrides ("distill.steps=50"), check it.

    Raises DdkError with one line: the file, the field, what is wrong, and the nearest known name.
    """
    values = read_yaml(path)
    for override in overrides or []:
        _apply(values, override)
    try:
        manifest = Manifest.model_validate(values)
    except pydantic.ValidationError as failure:
        raise first_problem(path, failure) from None
    return Project(manifest, path.parent)


def recorded_manifest(values: dict[str, Any]) -> Manifest:
    """A manifest as the record of a run holds it; one from before there was `attention` was of windows.

    Raises ValueError for one of another version.
    """
    return Manifest.model_validate({"attention": "window", **values})


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises DdkError, naming the line, if there is none, or a key is there twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DdkError(f"{path}: no such manifest", hint="write one with `ddk-pipe init`") from None
    except IsADirectoryError:
        raise DdkError(f"{path}: is a folder, not a manifest", hint="name the YAML file inside it") from None
    except UnicodeDecodeError as problem:
        raise DdkError(f"{path}: not UTF-8 ({problem.reason})", hint="save it as UTF-8") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise DdkError(f"{path}: not a mapping of fields", hint="write one with `ddk-pipe init`")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise DdkError(f"--set {override}: expected field=value", hint="for example --set distill.steps=50")
    *parents, last = name.split(".")
    node = values
    for parent in parents:
        below = node.get(parent)
        node[parent] = node = dict(below) if isinstance(below, dict) else {}
    node[last] = parse_yaml(text, f"--set {override}")


def first_problem(
    path: Path, failure: pydantic.ValidationError, root: type[Section] | None = None
) -> DdkError:
    """The first thing that is wrong with the file, in one line; `root` is what it was to be (none: Manifest)."""
    problems = failure.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    names = [str(part) for part in problem["loc"] if part not in ("str", "DatasetSource")]
    field = ".".join(names) or "manifest"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _fields_of(names[:-1], root or Manifest)
        nearest = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(sorted(known))}"
        return DdkError(f"{path}: {field}: unknown key{more}", hint=hint)
    if problem["type"] == "missing":
        return DdkError(f"{path}: {field}: missing{more}", hint="see `ddk-pipe schema`")
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    return DdkError(
        f"{path}: {field}: {message}, got {_short(problem['input'])}{more}", hint="see `ddk-pipe schema`"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_of(names: list[str], section: type[Section]) -> list[str]:
    """Field names of the section that a dotted location leads to from another."""
    for name in names:
        field = section.model_fields.get(name)
        below = section_in(field.annotation) if field else None
        section = below or section
    return list(section.model_fields)
