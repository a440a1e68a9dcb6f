"""identity.json may come from a stranger: whatever is wrong with it is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.distill.identity.comparing import differences, other_run
from ddk_pipe.stages.distill.identity.record import Identity, read_identity, write_identity

KNOWN = {"/models/teacher": {"stamp": "s", "digest": "d"}}
SAMPLE = Identity({"distill": {"steps": 3}}, {"student": "1" * 32}, ["2" * 32])


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_identity(tmp_path) == (None, {})
    write_identity(tmp_path / "run", SAMPLE, KNOWN)
    assert read_identity(tmp_path / "run") == (SAMPLE, KNOWN)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(version=2),
        lambda values: values.update(version=True),
        lambda values: values.update(made_of=[1]),
        lambda values: values.update(extends="2" * 32),
        lambda values: values.update(extends=[1]),
        lambda values: values.update(more=1),
        lambda values: values.pop("settings"),
        lambda values: values["weights"].update({"/models/teacher": "d"}),
    ],
)
def test_values_of_other_kinds(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    write_identity(tmp_path, SAMPLE, KNOWN)
    path = tmp_path / "identity.json"
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values))
    refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff", b"{}"])
def test_what_is_no_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "identity.json").write_bytes(content)
    refused(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write_identity(tmp_path / "elsewhere", SAMPLE, KNOWN)
    (tmp_path / "identity.json").symlink_to(tmp_path / "elsewhere" / "identity.json")
    refused(tmp_path)


def refused(run: Path) -> None:
    with pytest.raises(DdkError, match=r"identity\.json: damaged, so it cannot be told") as refusal:
        read_identity(run)
    assert len(str(refusal.value)) < 600 and "\n" not in str(refusal.value)


def test_differences_are_named_by_their_first_kind(tmp_path: Path) -> None:
    before = {
        "cache": {"teacher": {"weights_digest": "a" * 32}},
        "student": "b" * 32,
        "tokens": {"x/train": 1},
    }
    now = {"cache": {"teacher": {"weights_digest": "c" * 32}}, "student": "d" * 32, "tokens": {"y/train": 1}}
    found = differences(before, now)
    assert found["cache.teacher.weights_digest"] == ("a" * 32, "c" * 32) and len(found) == 4
    assert str(other_run(tmp_path, found)) == (
        f"{tmp_path}: holds a run from another cache (teacher weights aaaaaaaa, now cccccccc); set another"
        " distill.name, or delete that folder"
    )
    del before["cache"], now["cache"]
    assert "on other tokens (tokens.x/train 1, now none, tokens.y/train none, now 1)" in str(
        other_run(tmp_path, differences(before, now))
    )
    assert not differences(before, before)
    assert "of another kind (color 1, now 2)" in str(other_run(tmp_path, {"color": (1, 2)}))
