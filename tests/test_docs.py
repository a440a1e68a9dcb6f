"""The documentation builds without a warning, and what it quotes exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
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


REPOSITORY = ("pipeline", "stages", "triton_kernels", "tests", "benchmarks", "manifests", "examples", "docs")
PLACES = re.compile(rf"(?:{'|'.join(REPOSITORY)}|requirements|src)/[\w./-]*(?::[A-Za-z_][\w.]*)?")


def quoted(page: Path) -> list[str]:
    """What stands between backticks on the page, code blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))


def defined(path: Path) -> dict[str, ast.AST]:
    """Functions, classes (Class.name too) and constants of a file."""
    found: dict[str, ast.AST] = {}

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found.update({prefix + name.id: node for name in names})

    look(ast.parse(path.read_text()).body, "")
    return found


def missing(text: str) -> bool:
    """True if `folder/file.py:Class.name` or `folder:name` (a name in any file of it) is not there."""
    place, _, name = text.partition(":")
    path = ROOT / place
    if not path.exists() or not name:
        return not path.exists()
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return not any(name in defined(file) for file in files)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_files_and_names_on_a_page_exist(page: Path) -> None:
    named = [text for text in quoted(page) if PLACES.fullmatch(text)]
    assert len(named) >= {"structure.md": 70, "papers.md": 50, "decisions.md": 15}.get(page.name, 0)
    assert not [text for text in named if missing(text)]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_root_lead_somewhere(page: str) -> None:
    """Those of the site are checked where it is built."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_that_test_can_fail() -> None:
    assert not missing("pipeline/mixing:ddk") and not missing("pipeline/manifest/fields.py:Distill.mixing")
    for wrong in ("pipeline/mixing:ddkk", "pipeline/no.py", "pipeline/manifest/fields.py:Distill.mixin"):
        assert missing(wrong) and PLACES.fullmatch(wrong)


def test_eight_steps_and_six_additions_name_file_and_function() -> None:
    life, _, rest = (ROOT / "docs/structure.md").read_text().partition("## One sentence a folder")
    steps = re.findall(r"^\d\. (.*?)(?=^\d\. |\Z)", life, re.DOTALL | re.MULTILINE)
    added = re.findall(r"^\*\*A .*?(?=^\*\*A |\Z)", rest, re.DOTALL | re.MULTILINE)
    assert len(steps) == 8 and len(added) == 6
    for part in [*steps, *added]:
        assert re.search(r"`(pipeline|stages)/[\w/]+\.py:\w+", part), part


def test_every_room_has_its_sentence() -> None:
    table = (ROOT / "docs/structure.md").read_text().partition("## One sentence a folder")[2]
    rooms = [path.parent for name in ("pipeline", "stages") for path in (ROOT / name).glob("*/__init__.py")]
    assert len(rooms) > 15
    assert not [room.name for room in rooms if f"`{room.relative_to(ROOT)}/`" not in table]


def test_dotted_names_and_fields_on_a_page_exist() -> None:
    """`pipeline.room.name` can be imported, and `section.field` is a field of the manifest."""
    from ddk_pipe.pipeline.manifest import reference

    fields = {name for name, *_ in reference()}
    sections = "|".join({name.partition(".")[0] for name in fields if "." in name})
    field = re.compile(rf"((?:{sections})\.(?!jsonl?\b)[a-z_]+(?:\.[a-z_]+)*)(?::.*)?")
    dotted = re.compile(r"(?:ddk_pipe\.)?((?:pipeline|stages|triton_kernels)(?:\.\w+)+)")
    seen = 0
    for page in [*PAGES, ROOT / "README.md"]:
        for text in quoted(page):
            if found := dotted.fullmatch(text):
                seen += 1
                assert importable(f"ddk_pipe.{found[1]}"), (page.name, text)
            elif (found := field.fullmatch(text)) and not text.startswith("domains."):
                seen += 1
                known = found[1] in fields or any(name.startswith(f"{found[1]}.") for name in fields)
                assert known, (page.name, text)
    assert seen > 40


def importable(name: str) -> bool:
    """A module, or a name in one."""
    if importlib.util.find_spec(name.rpartition(".")[0]) is None:
        return False
    owner = importlib.import_module(name.rpartition(".")[0])
    return hasattr(owner, name.rpartition(".")[2]) or importlib.util.find_spec(name) is not None


def test_one_place_says_how_to_install_an_extra() -> None:
    """The package is on no index yet: only docs/install.md and the hint itself may spell the command out."""
    command = re.compile(r"pip install[^\n]*ddk-pipe\[")
    places = [*PAGES, *SOURCES, ROOT / "README.md", *(ROOT / "examples").iterdir()]
    named = {path.relative_to(ROOT).as_posix() for path in places if command.search(path.read_text())}
    assert named == {"docs/install.md"}


def test_every_extra_is_listed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs/install.md").read_text()
    assert not [name for name in extras if name != "dev" and f"`{name}`" not in page]


def test_every_command_is_in_the_reference() -> None:
    from ddk_pipe.stages.cli import app
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
