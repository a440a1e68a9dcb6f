"""The house's floor plan in figures: its folders, what they import of each other, and its largest pieces.

    PYTHONPATH=benchmarks .venv/bin/python benchmarks/structure.py [--root ANOTHER_CHECKOUT] [--json OUT]

A row is a folder. Its parts are the folders and the files in it, a folder as one part. An arrow is a part that imports
another, however often, inside functions and for type checkers too. Floors are the parts on the longest chain of arrows,
the parts of a circle counted as one. A folder's own `__init__.py` is its door and no part of it. "All files", "all
arrows" and "all lines" are of everything below the folder, doors, blank lines, comments and docstrings included.

It reads sources only and imports none of them.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import grimp
from common import ROOT, Row, goal, provenance

PACKAGE = "ddk_pipe"
TOPS = ("pipeline", "stages", "triton_kernels")
MOST_LINES = {"file": 350, "class": 200, "function": 60}  # the house's rules
Arrow = tuple[str, str]  # who imports, what


@dataclass(frozen=True)
class Piece:
    """A file, class or function. `name` is "pipeline/errors.py", "pipeline/errors.py:DdkError.__init__"."""

    kind: str
    name: str
    lines: int


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="write the result there")
    options.add_argument("--root", type=Path, default=ROOT, help="the checkout to look at")
    given = options.parse_args()
    root = given.root.resolve()
    found = pieces(root)
    rows, large = plan(root, found), too_large(found)
    goals = goals_of(rows, large)
    for line in table(rows):
        print(line)
    for row in goals:
        print(f"{'met' if row['met'] else 'NOT MET'}: {row['name']}: {row['value']} (goal {row['goal']})")
    for piece in large:
        print(f"over {MOST_LINES[piece.kind]}: {piece.kind} {piece.name} {piece.lines}")
    if given.json:
        result = {**provenance(), "commit": commit(root), "rows": rows, "goals": goals}
        result["too_large"] = [asdict(piece) for piece in large]
        given.json.write_text(json.dumps(result, indent=2) + "\n")


# ---------------------------------------------------------------- sizes


def pieces(root: Path) -> list[Piece]:
    """Every file, class and function of the checkout with its lines, decorators included."""
    return [piece for path in _files(root) for piece in _pieces_of(path, path.relative_to(root).as_posix())]


def too_large(found: Iterable[Piece]) -> list[Piece]:
    """Those over MOST_LINES."""
    return [piece for piece in found if piece.lines > MOST_LINES[piece.kind]]


def _files(root: Path) -> list[Path]:
    return [path for top in TOPS for path in sorted((root / top).rglob("*.py"))]


def _pieces_of(path: Path, name: str) -> Iterator[Piece]:
    text = path.read_text(encoding="utf-8")
    yield Piece("file", name, len(text.splitlines()))
    yield from _definitions(ast.parse(text), f"{name}:")


def _definitions(node: ast.AST, prefix: str) -> Iterator[Piece]:
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
            kind = "class" if isinstance(part, ast.ClassDef) else "function"
            yield Piece(kind, prefix + part.name, (part.end_lineno or first) - first + 1)
            yield from _definitions(part, f"{prefix}{part.name}.")
        else:
            yield from _definitions(part, prefix)


# ---------------------------------------------------------------- arrows and floors


def plan(root: Path, found: list[Piece]) -> list[Row]:
    """A row for each folder that holds Python files, the whole before its parts."""
    graph = graph_of(root)
    folders = sorted({path.parent.relative_to(root).as_posix() for path in _files(root)})
    return [_row(folder, graph, found) for folder in folders]


def graph_of(root: Path) -> grimp.ImportGraph:
    """What imports what in that checkout. Ends the program where Python would find another one's sources, or none."""
    sys.path.insert(0, str(root / "src"))
    try:
        there = importlib.util.find_spec(PACKAGE)
        if there is None or there.origin != str(root / "src" / PACKAGE / "__init__.py"):
            raise SystemExit(f"{root} is no checkout of {PACKAGE}: found {there and there.origin}")
        return grimp.build_graph(PACKAGE, cache_dir=None)
    finally:
        sys.path.remove(str(root / "src"))


def _row(folder: str, graph: grimp.ImportGraph, found: list[Piece]) -> Row:
    package = f"{PACKAGE}.{folder.replace('/', '.')}"
    inside = [piece for piece in found if piece.name.startswith(f"{folder}/")]
    parts = graph.find_children(package)
    all_arrows = arrows(graph, package)
    between = {(_part(package, a), _part(package, b)) for a, b in all_arrows}
    steps, circles = floors(parts, between)
    return {
        "folder": folder,
        "folders": sum(1 for part in parts if graph.find_children(part)),
        "files": sum(1 for part in parts if not graph.find_children(part)),
        "floors": steps,
        "arrows": sum(1 for a, b in between if a != b),
        "circles": circles,
        "all_files": sum(1 for piece in inside if piece.kind == "file"),
        "all_arrows": len(all_arrows),
        "all_lines": sum(piece.lines for piece in inside if piece.kind == "file"),
        **{f"largest_{kind}": _largest(kind, folder, inside) for kind in MOST_LINES},
    }


def arrows(graph: grimp.ImportGraph, package: str) -> set[Arrow]:
    """All imports between files below the package."""
    inside = graph.find_descendants(package)
    return {(a, b) for a in inside for b in graph.find_modules_directly_imported_by(a) & inside}


def floors(parts: Iterable[str], between: Iterable[Arrow]) -> tuple[int, int]:
    """(parts on the longest chain of arrows, number of circles); the parts of a circle count as one."""
    below: dict[str, set[str]] = {part: set() for part in parts}
    for importer, imported in between:
        below[importer].add(imported)
    reached = {part: _reached(part, below) for part in below}
    circle = {part: frozenset({part, *(x for x in reached[part] if part in reached[x])}) for part in below}

    @functools.cache
    def height(of: frozenset[str]) -> int:
        return 1 + max((height(circle[x]) for part in of for x in below[part] - of), default=0)

    distinct = set(circle.values())
    return max(map(height, distinct), default=0), sum(1 for parts in distinct if len(parts) > 1)


def _reached(part: str, below: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [part]
    while waiting:
        new = below[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def _part(package: str, module: str) -> str:
    """The part of the package that the module is or lies in."""
    return ".".join(module.split(".")[: package.count(".") + 2])


# ---------------------------------------------------------------- what is shown


def table(rows: list[Row]) -> Iterator[str]:
    """Aligned lines under a heading, numbers to the right."""
    columns = [_aligned([key.replace("_", " "), *(row[key] for row in rows)]) for key in rows[0]]
    return ("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _aligned(column: list[str | int]) -> list[str]:
    width, numbers = max(len(str(cell)) for cell in column), isinstance(column[1], int)
    return [str(cell).rjust(width) if numbers else str(cell).ljust(width) for cell in column]


def goals_of(rows: list[Row], large: list[Piece]) -> list[Row]:
    """The rules on sizes, and that nothing imports in a circle."""
    counts = {
        f"{kind} over {most} lines": sum(1 for piece in large if piece.kind == kind)
        for kind, most in MOST_LINES.items()
    }
    counts["circles of imports"] = sum(row["circles"] for row in rows)
    return [goal(name, "0", count, count == 0) for name, count in counts.items()]


def _largest(kind: str, folder: str, inside: list[Piece]) -> str:
    """As in "533 storage/folders.py" and "191 ObjectFolder"; empty where there is none."""
    of_kind = [piece for piece in inside if piece.kind == kind]
    if not of_kind:
        return ""
    piece = max(of_kind, key=lambda piece: piece.lines)
    return f"{piece.lines} {piece.name.removeprefix(f'{folder}/').split(':')[-1]}"


def commit(root: Path) -> str:
    """The commit of that checkout; empty outside of one."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
