"""Tables of results in a page of the documentation, replaced in place."""

from __future__ import annotations

from pathlib import Path

from common import Row

BEGIN, END = "<!-- tables made by benchmarks/scale.py -->", "<!-- end of the tables -->"


def table(rows: list[Row], columns: dict[str, str]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [value if isinstance(value := row[key], str) else _number(value) for key in columns.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def into_docs(path: Path, tables: str) -> None:
    """Replace what stands between the two marks."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{path}: no place for the tables ({BEGIN} ... {END})")
    path.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
