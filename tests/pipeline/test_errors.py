"""The hint that adds an extra fits where this installation came from."""

from __future__ import annotations

import json
import re
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddk_pipe.pipeline import errors
from ddk_pipe.pipeline.errors import install_hint

ROOT = Path(__file__).resolve().parents[2]
GIT = {"url": "https://example.org/ddk-pipe.git", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}


@pytest.mark.parametrize(
    ("origin", "hint"),
    [
        (None, "pip install 'ddk-pipe[s3]'"),
        (
            {"url": "file:///home/me/ddk-pipe", "dir_info": {"editable": True}},
            "pip install -e '/home/me/ddk-pipe[s3]'",
        ),
        ({"url": "file:///home/my%20self/x", "dir_info": {}}, "pip install '/home/my self/x[s3]'"),
        (GIT, "pip install 'ddk-pipe[s3] @ git+https://example.org/ddk-pipe.git@0123abc'"),
        (
            {"url": "file:///tmp/ddk_pipe-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install 'ddk-pipe[s3] @ file:///tmp/ddk_pipe-0.1.0-py3-none-any.whl'",
        ),
    ],
)
def test_hint_names_where_the_package_came_from(
    origin: dict[str, Any] | None, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(errors, "distribution", lambda name: SimpleNamespace(read_text=lambda file: note))
    assert install_hint("s3") == hint


def test_the_extras_that_hints_name_exist() -> None:
    known = set(metadata("ddk-pipe").get_all("Provides-Extra") or ())
    sources = [path for name in ("pipeline", "stages") for path in (ROOT / name).rglob("*.py")]
    named = {
        extra
        for path in sources
        for extra in re.findall(r"install_hint\(['\"]([a-z0-9-]+)['\"]\)", path.read_text())
    }
    assert {"s3", "ray", "vllm", "optuna", "eval", "datasets", "demo"} <= named <= known
