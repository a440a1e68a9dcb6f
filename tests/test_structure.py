"""No file, class or function grows over the house's limits, but for those that are named here with their reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from structure import MOST_LINES, Piece, floors, pieces, plan, table, too_large

ROOT = Path(__file__).resolve().parents[1]
ONE_KERNEL = "one Triton kernel: its loop and a line for each argument, with state that lives in registers"
EXCEPTIONS = {
    "triton_kernels/sparse_kl.py:sparse_kl_rows": ONE_KERNEL,
}


def test_nothing_is_too_large_but_what_is_named() -> None:
    large = {piece.name: piece for piece in too_large(pieces(ROOT)) if piece.name not in EXCEPTIONS}
    assert not large, "split these, or name them in EXCEPTIONS with the reason:\n" + "\n".join(
        f"{name}: {piece.lines} lines, {MOST_LINES[piece.kind]} allowed" for name, piece in large.items()
    )


def test_no_exception_outlives_its_need() -> None:
    outlived = sorted(set(EXCEPTIONS) - {piece.name for piece in too_large(pieces(ROOT))})
    assert not outlived, f"within the limits, or gone; take them out of EXCEPTIONS: {', '.join(outlived)}"
    assert all(len(reason.split()) > 3 for reason in EXCEPTIONS.values())


def test_pieces_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pipeline" / "room" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "class A:\n    @property\n    def b(self):\n        def c(): ...\n\n        return c\n\nx = 1\n"
    )
    assert pieces(tmp_path) == [
        Piece("file", "pipeline/room/x.py", 8),
        Piece("class", "pipeline/room/x.py:A", 6),
        Piece("function", "pipeline/room/x.py:A.b", 5),
        Piece("function", "pipeline/room/x.py:A.b.c", 1),
    ]


@pytest.mark.parametrize("kind", list(MOST_LINES))
def test_a_limit_is_the_most_that_is_allowed(kind: str) -> None:
    allowed, not_allowed = Piece(kind, "a", MOST_LINES[kind]), Piece(kind, "b", MOST_LINES[kind] + 1)
    assert too_large([allowed, not_allowed]) == [not_allowed]


def test_floors_are_the_longest_chain_with_circles_as_one_part() -> None:
    def of(parts: str, *arrows: str) -> tuple[int, int]:
        return floors(parts, [(arrow[0], arrow[1]) for arrow in arrows])

    assert of("") == (0, 0)
    assert of("abc") == (1, 0)
    assert of("abcd", "ab", "bc", "ac", "dc") == (3, 0)
    assert of("abcde", "ab", "bc", "cb", "cd", "ee") == (3, 1)  # a, then b and c, then d; e imports itself


def test_the_plan_of_a_checkout(tmp_path: Path) -> None:
    """Read by the command, as anyone would, from sources that would fail to be imported."""
    sources = {
        "src/ddk_pipe/__init__.py": "",
        "pipeline/__init__.py": "",
        "pipeline/errors.py": "import no_such_package\n",
        "pipeline/cache/__init__.py": "from ddk_pipe.pipeline.cache.reader import read\n",
        "pipeline/cache/reader.py": "def read():\n    from ddk_pipe.pipeline.cache import spec\n",
        "pipeline/cache/spec.py": "from ddk_pipe.pipeline import errors\nfrom ddk_pipe.pipeline.errors import x\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "src" / "ddk_pipe" / "pipeline").symlink_to(tmp_path / "pipeline")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "structure.py", "--root", tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")},  # also where PYTHONSAFEPATH is set
    )
    heading, *lines = (line.split() for line in done.stdout.splitlines())
    assert heading[:6] == ["folder", "folders", "files", "floors", "arrows", "circles"]
    assert lines[0][:10] == ["pipeline", "1", "1", "2", "1", "0", "5", "3", "6", "2"]
    assert lines[1][:10] == ["pipeline/cache", "0", "2", "2", "1", "0", "3", "1", "5", "2"]


def test_our_own_plan_has_no_circles() -> None:
    rows = plan(ROOT, pieces(ROOT))
    assert {row["folder"] for row in rows} > {"pipeline", "stages", "triton_kernels", "pipeline/cache"}
    assert not [row["folder"] for row in rows if row["circles"]]
    assert len({len(line) for line in table([{"name": "a", "n": 1}, {"name": "bc", "n": 10}])}) == 1
