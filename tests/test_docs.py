"""The documentation builds without a warning, and what it quotes exists."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for name in ("pipeline", "stages") for path in (ROOT / name).rglob("*.py")]


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_builds_without_a_warning(tmp_path: Path) -> None:
    """As `make docs` does, with the generated pages."""
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs)
    for name, command in (
        ("manifest", ["ddk_pipe.stages.cli", "schema", "--markdown"]),
        ("cli", ["ddk_pipe.stages.cli.reference"]),
    ):
        text = subprocess.run(
            [sys.executable, "-P", "-m", *command], capture_output=True, text=True, check=True
        ).stdout
        assert len(text.splitlines()) > 50
        (docs / f"{name}.md").write_text(text)
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr


def test_every_command_is_in_the_reference() -> None:
    from ddk_pipe.stages.cli.app import app
    from ddk_pipe.stages.cli.reference import reference

    text = reference()
    assert len(app.registered_commands) == len(re.findall(r"^## `ddk-pipe [a-z-]+`$", text, re.MULTILINE))
    assert "--parallel" in text and "Usage: ddk-pipe sweep" in text


def test_errors_that_the_docs_explain_exist() -> None:
    """Every phrase quoted in errors.md stands in the sources, up to what is filled in."""
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in SOURCES))
    rows = [line for line in (ROOT / "docs/errors.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    filled = re.compile(r"\.\.\.|;|\bx\b|\d[\d.,]*|\bnan\b|ddk-pipe")
    for row in rows:
        for phrase in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            for part in filled.split(phrase):
                assert part.strip(" ?;:,") in code, f"{part!r} of {phrase!r}"


def test_every_manifest_in_the_docs_is_valid(tmp_path: Path) -> None:
    from ddk_pipe.pipeline.manifest import load_project, load_sweep

    seen = 0
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            path = tmp_path / "x.yaml"
            path.write_text(text)
            if "domains:" in text:
                load_project(path)
            elif "grid:" in text or "search:" in text:
                found = load_sweep(path)
                assert found.expand() or found.spec.search
            else:
                assert yaml.safe_load(text)
            seen += 1
    assert seen >= 4
