"""The documentation builds without a warning, and what it quotes exists."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("cli.md", "manifest.md")
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in GENERATED]
SOURCES = [path for name in ("pipeline", "stages") for path in (ROOT / name).rglob("*.py")]
HAS_SITE = all(importlib.util.find_spec(name) for name in ("mkdocs", "material"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, with the generated pages; without a warning."""
    if not HAS_SITE:
        pytest.skip("mkdocs and mkdocs-material are not installed: `make setup`")
    place = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", place / "docs")
    for name, command in (
        ("manifest", ["ddk_pipe.stages.cli", "schema", "--markdown"]),
        ("cli", ["ddk_pipe.stages.cli.reference"]),
    ):
        text = subprocess.run(
            [sys.executable, "-P", "-m", *command], capture_output=True, text=True, check=True
        ).stdout
        assert len(text.splitlines()) > 50
        (place / "docs" / f"{name}.md").write_text(text)
    shutil.copy(ROOT / "mkdocs.yml", place)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--quiet"],
        cwd=place,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # Material's word about its successor
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return place / "site"


@pytest.mark.slow
def test_builds_without_a_warning(site: Path) -> None:
    pages = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    assert {path.relative_to(ROOT / "docs") for path in PAGES} | {Path("cli.md"), Path("manifest.md")} <= {
        Path("cluster/README.md") if page == Path("cluster/index.md") else page for page in pages
    }
    assert "report.png" in (site / "index.html").read_text()


@pytest.mark.slow
def test_nothing_comes_from_another_host(site: Path) -> None:
    """Neither a page nor a style sheet names a script, style, font, picture or frame elsewhere; links may."""
    fetched = re.compile(
        r"""<(?:script|img|iframe|source|link|embed|object)\b[^>]*?\b(?:src|href|data)=["']?((?:https?:)?//[^"'\s>]+)"""
    )
    named = re.compile(r"""(?:url\(|@import\s+)["']?((?:https?:)?//[^"')\s]+)""")
    assert fetched.search('<script async src="//host/x.js">') and named.search(
        "src: url(https://host/f.woff2)"
    )
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 15 and len(styles) > 2
    for path in [*pages, *styles]:
        text = path.read_text()
        assert not fetched.findall(text) + named.findall(text), path


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
