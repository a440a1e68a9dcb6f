"""The interface as text: what others' programs, shell scripts and manifests rely on, one line an item.

    .venv/bin/python tests/support/interface.py --write

renews tests/interface.txt. It reads the same on every version of Python that we support.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from signatures import handed_out, signatures

import ddk_pipe
from ddk_pipe.pipeline.manifest import Manifest, SweepSpec
from ddk_pipe.pipeline.mixing import RULES
from ddk_pipe.stages.cli import app

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "tests" / "interface.txt"
CHANGELOG = ROOT / "CHANGELOG.md"
TITLE = """\
# What others rely on, one line an item: a change of this file is told in CHANGELOG.md (CONTRIBUTING.md says how).
# Renewed by `.venv/bin/python tests/support/interface.py --write`, compared by tests/test_interface.py.
"""
PROMISED = [  # beside `ddk_pipe.__all__`: names that DESIGN section 4 keeps
    "ddk_pipe.pipeline.losses.SparseKdLoss",
    "ddk_pipe.pipeline.losses.linear_sparse_kd",
    "ddk_pipe.pipeline.losses.sparse_kd_reference",
    "ddk_pipe.triton_kernels.sparse_kl.sparse_kl",
]
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
LIMITS |= {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # as pydantic has them of a union
STRUCTURE = {"$defs", "$ref", "additionalProperties", "anyOf", "const", "default", "description", "enum"}
STRUCTURE |= {"items", "prefixItems", "properties", "required", "title", "type"}


def interface() -> str:
    """The whole text. Raises LookupError for a promised name whose definition is not found."""
    parts = {
        "Python: what is promised": python_lines(),
        "Python: what each room hands out": room_lines(),
        "commands": command_lines(app),
        "manifest": field_lines(Manifest),
        "sweep file": field_lines(SweepSpec),
    }
    return TITLE + "".join(f"\n[{name}]\n" + "\n".join(sorted(set(ls))) + "\n" for name, ls in parts.items())


def mark(text: str) -> str:
    """What ends the changelog's line about the last change of the text: a digest of its items."""
    items = [line for line in text.splitlines() if line and not line.startswith("#")]
    return f"<!-- interface {hashlib.sha256(chr(10).join(items).encode()).hexdigest()[:12]} -->"


def python_lines() -> Iterator[str]:
    """The promised names, with what stands in their signatures."""
    rules = [f"ddk_pipe.pipeline.mixing.{name}" for name in RULES]
    return signatures([*(f"ddk_pipe.{name}" for name in ddk_pipe.__all__), *PROMISED, *rules])


def room_lines() -> Iterator[str]:
    """The names that each room of pipeline/ hands out at its door."""
    for room in rooms():
        yield from (f"{room}.{name}" for name in handed_out(room))


def rooms() -> list[str]:
    """Dotted names of the folders of pipeline/."""
    doors = sorted((ROOT / "pipeline").glob("*/__init__.py"))
    return [f"ddk_pipe.pipeline.{door.parent.name}" for door in doors]


# ---------------------------------------------------------------- commands


def command_lines(program: typer.Typer) -> Iterator[str]:
    """Every command with its arguments, by their place, and its options with all their flags."""
    group: Any = typer.main.get_command(program)
    yield f"ddk-pipe {', '.join(group.context_settings.get('help_option_names', ['--help']))}"
    yield from _parameter_lines("ddk-pipe", group)
    for name, command in group.commands.items():
        yield f"ddk-pipe {name}"
        yield from _parameter_lines(f"ddk-pipe {name}", command)


def _parameter_lines(label: str, command: Any) -> Iterator[str]:
    hints = typing.get_type_hints(command.callback, include_extras=True)
    written = inspect.signature(command.callback).parameters
    place = 0
    for parameter in command.params:
        annotation, about = typing.get_args(hints[parameter.name])
        flags = ", ".join([*parameter.opts, *parameter.secondary_opts])
        if isinstance(about, typer.models.ArgumentInfo):
            place += 1
            flags = f"<{parameter.name}, argument {place}>"
        bounds = [f">= {about.min}"] if about.min is not None else []
        bounds += [f"<= {about.max}"] if about.max is not None else []
        kind = " ".join([_plain(annotation), *bounds])
        yield f"{label} {flags}: {kind}{_option_default(written[parameter.name].default)}"


def _option_default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ", required"
    return f" = {json.dumps(str(value) if isinstance(value, Path) else value)}"


def _plain(annotation: Any) -> str:
    """A type without its module, which is another one in some versions of Python."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\w+\.", "", text)


# ---------------------------------------------------------------- fields of the YAML files


def field_lines(model: type[BaseModel]) -> Iterator[str]:
    """Dotted path, type, limits and default of every field, from the JSON schema; `[]` is an item of a list."""
    schema = model.model_json_schema()
    yield from _fields(schema, "", schema.get("$defs", {}))


def _fields(section: dict[str, Any], path: str, sections: dict[str, Any]) -> Iterator[str]:
    for name, field in section["properties"].items():
        yield f"{path}{name}: {_kind(field)}{_default(field, sections)}"
        for suffix, below in _sections_in(field):
            yield from _fields(sections[below], f"{path}{name}{suffix}.", sections)


def _kind(field: dict[str, Any]) -> str:
    limits = {LIMITS.get(key, key): value for key, value in sorted(field.items()) if key not in STRUCTURE}
    text = ", ".join(f"{key} {_limit(value)}" for key, value in limits.items())
    return _bare_kind(field) + (f" ({text})" if text else "")


def _limit(value: Any) -> str:
    """1.0 as 1: pydantic's versions differ in it."""
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _bare_kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return "section"
    if "anyOf" in field:
        return " | ".join(map(_kind, field["anyOf"]))
    if "const" in field or "enum" in field:
        return " | ".join(map(json.dumps, [field["const"]] if "const" in field else field["enum"]))
    if "prefixItems" in field:
        return f"list of {', '.join(map(_kind, field['prefixItems']))}"
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"mapping to {_kind(values if isinstance(values, dict) else {})}"
    return str(field.get("type", "anything"))


def _default(field: dict[str, Any], sections: dict[str, Any]) -> str:
    if "default" not in field:
        return ", required"
    if "$ref" in field:
        below = sections[_section(field)]["properties"]
        if field["default"] == {name: inner.get("default") for name, inner in below.items()}:
            return " = as its fields say"
    return f" = {json.dumps(field['default'])}"


def _sections_in(field: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Of what is written below a field: (what its path adds, name of the section)."""
    if "$ref" in field:
        yield "", _section(field)
    for choice in field.get("anyOf", []):
        yield from _sections_in(choice)
    for key, more in (("items", "[]"), ("additionalProperties", ".<name>")):
        if isinstance(field.get(key), dict):
            yield from ((more + suffix, name) for suffix, name in _sections_in(field[key]))


def _section(field: dict[str, Any]) -> str:
    return str(field["$ref"].rsplit("/", 1)[1])


def main() -> None:
    """Print the text, or write it and say what the changelog needs."""
    text = interface()
    if sys.argv[1:] != ["--write"]:
        print(text, end="")
        return
    TEXT.write_text(text, encoding="utf-8")
    told = mark(text) in CHANGELOG.read_text(encoding="utf-8")
    still = f"tell the change in a line of CHANGELOG.md and end that line with {mark(text)}"
    print(f"wrote {TEXT.relative_to(ROOT)}; {'CHANGELOG.md has its mark' if told else still}")


if __name__ == "__main__":
    main()
