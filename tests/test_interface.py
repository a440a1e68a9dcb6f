"""What others rely on stays as tests/interface.txt has it, and a change of that is told in the changelog."""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from pathlib import Path
from typing import Annotated

import pytest
import typer
from interface import CHANGELOG, PROMISED, TEXT, command_lines, field_lines, interface, mark, rooms
from pydantic import BaseModel, Field
from signatures import handed_out, lines_of

import ddk_pipe

RENEW = (
    "run `.venv/bin/python tests/support/interface.py --write` and tell it in CHANGELOG.md (CONTRIBUTING.md)"
)
LOADED = [*(f"ddk_pipe.{name}" for name in ddk_pipe.__all__), *PROMISED[:-1]]  # the last one needs triton


def test_interface_is_as_written_down() -> None:
    old, new = TEXT.read_text(encoding="utf-8").splitlines(), interface().splitlines()
    changed = [line for line in difflib.unified_diff(old, new, lineterm="", n=0) if line[:1] in "+-"]
    assert not changed, "\n".join([RENEW, *changed[2:]])


def test_changelog_tells_of_the_last_change() -> None:
    """The mark is a digest of the text: who changes the text has to write into the changelog."""
    wanted = mark(TEXT.read_text(encoding="utf-8"))
    lines = [line for line in CHANGELOG.read_text(encoding="utf-8").splitlines() if line.endswith(wanted)]
    assert lines, f"no line of CHANGELOG.md that tells of the interface's last change ends with {wanted}"
    assert all(len(line.removesuffix(wanted).split()) > 3 for line in lines), "the mark alone tells nobody"


@pytest.mark.parametrize(
    "name", [*LOADED, *(f"{room}.{name}" for room in rooms() for name in handed_out(room))]
)
def test_every_name_is_there(name: str) -> None:
    module, attribute = name.rsplit(".", 1)
    assert getattr(importlib.import_module(module), attribute) is not None


SAMPLE = """
class Made:
    def __init__(self, size: int, *, seed: int = 0) -> None:
        self.size = size
        self._seed = seed

    @property
    def half(self) -> float: ...

    @classmethod
    def empty(cls) -> Made: ...

    def __len__(self) -> int: ...
    def _inner(self) -> None: ...
"""


def lines_of_sample(sample: str) -> list[str]:
    return list(lines_of("Made", "ddk_pipe", ast.parse(sample).body[0]))


def test_a_class_is_how_it_is_made_and_what_it_offers() -> None:
    expected = [
        "Made(size: int, *, seed: int=0)",
        "Made.size",
        "Made.half: float",
        "@classmethod Made.empty() -> Made",
        "Made.__len__() -> int",
    ]
    assert lines_of_sample(SAMPLE) == expected
    assert lines_of_sample("class Made(NamedTuple):\n    a: int\n    b: str = 'x'") == [
        "Made(a: int, b: str = 'x')"
    ]


def test_a_command_is_its_arguments_and_options() -> None:
    program = typer.Typer(add_completion=False)

    @program.callback()
    def everything() -> None: ...

    @program.command("make")
    def make(
        place: Annotated[Path, typer.Argument()],
        count: Annotated[int | None, typer.Option("-n", "--count", min=1)] = None,
        dry: Annotated[bool, typer.Option("--dry/--wet")] = False,
    ) -> None: ...

    assert list(command_lines(program)) == [
        "ddk-pipe --help",
        "ddk-pipe make",
        "ddk-pipe make <place, argument 1>: Path, required",
        "ddk-pipe make -n, --count: int | None >= 1 = null",
        "ddk-pipe make --dry, --wet: bool = false",
    ]


class Inner(BaseModel):
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5


class Outer(BaseModel):
    name: str
    plain: Inner = Inner()
    other: Inner = Inner(share=0.25)
    each: dict[str, list[Inner | str]] = Field({}, min_length=1)


def test_a_field_is_its_type_limits_and_default() -> None:
    lines = list(field_lines(Outer))
    share = "number (< 1, > 0) = 0.5"
    assert lines == [
        "name: string, required",
        "plain: section = as its fields say",
        f"plain.share: {share}",
        'other: section = {"share": 0.25}',
        f"other.share: {share}",
        "each: mapping to list of section | string (minProperties 1) = {}",
        f"each.<name>[].share: {share}",
    ]


def test_text_has_no_trace_of_a_machine_or_a_version() -> None:
    assert not re.findall(
        r"0x[0-9a-f]{6,}|<class|typing\.|_local|/home|/root", TEXT.read_text(encoding="utf-8")
    )
