"""docs/study.md from results/*.parquet: every number on the page comes from there.

    python benchmarks/study/page.py [OUT]

page.md holds the words; a line `{{name}}` in it stands for what the function `name` of this module writes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from estimates import Estimate, Row, figures_of_run, holm, paired

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STARTS = {"material/student-skewed": "skewed start", "material/student-even": "even start"}
SHOWN = {  # figure: its heading, and its unit
    "mean_gap": "mean gap",
    "worst_gap": "worst gap",
    "natural_ce": "natural CE",
    "kl": "KL to the teacher",
    "ece": "ECE",
    "agreement": "agreement",
}
Runs = dict[str, dict[int, dict[str, float]]]  # arm: seed: figures


def read(table: str) -> tuple[dict[str, Runs], list[Row]]:
    """Figures of a table's runs by start, and its rows."""
    rows = pq.read_table(HERE / "results" / f"{table}.parquet").to_pylist()
    by_run: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_run[row["run"]].append(row)
    out: dict[str, Runs] = defaultdict(lambda: defaultdict(dict))
    for domains in by_run.values():
        settings = json.loads(domains[0]["settings"])
        start = STARTS[settings.pop("student.model", "material/student-skewed")]
        out[start][arm_name(settings)][domains[0]["seed"]] = figures_of_run(domains)
    return out, rows


def arm_name(settings: Row) -> str:
    """What the field calls it, and what else it changes."""
    settings = dict(settings)
    mixing, gamma = str(settings.pop("distill.mixing", "ddk")), settings.pop("distill.gamma", 0.2)
    name = {"ddk": "DDK", "ddk_unsmoothed": "DDK unsmoothed"}.get(mixing, mixing)
    if mixing in ("natural", "uniform"):
        name = f"{'KD' if gamma else 'CPT'} {mixing}"
    options = settings.pop("distill.mixing_options", {})
    rest = {**options, **{field.split(".")[-1]: value for field, value in settings.items()}}
    return ", ".join([name, *(f"{field} {value}" for field, value in rest.items())])


def baselines() -> str:
    """All arms, then differences to KD uniform."""
    by_start, rows = read("baselines")
    return "\n".join([*(_arms(start, runs) for start, runs in by_start.items()), _footer(rows)])


def _arms(start: str, runs: Runs, reference: str = "KD uniform") -> str:
    head = ["arm", *SHOWN.values()]
    lines = [f"### {start}", "", _row(head), _row(["---"] * len(head))]
    for arm, seeds in runs.items():
        estimates = [Estimate.of([figures[name] for figures in seeds.values()]) for name in SHOWN]
        lines.append(_row([arm, *map(_plain, estimates)]))
    lines += [
        "",
        f"Paired differences to {reference}; in brackets p of the mean gap, Holm over the arms:",
        "",
    ]
    lines += [_row(head), _row(["---"] * len(head))]
    others = [arm for arm in runs if arm != reference]
    differences = {
        arm: {name: paired(_of(runs, arm, name), _of(runs, reference, name)) for name in SHOWN}
        for arm in others
    }
    adjusted = holm([differences[arm]["mean_gap"].p for arm in others])
    for arm, p in zip(others, adjusted, strict=True):
        cells = [_signed(differences[arm][name]) for name in SHOWN]
        lines.append(_row([arm, f"{cells[0]} ({p:.2g})", *cells[1:]]))
    return "\n".join([*lines, ""])


def _of(runs: Runs, arm: str, name: str) -> dict[int, float]:
    return {seed: figures[name] for seed, figures in runs[arm].items()}


def _plain(estimate: Estimate) -> str:
    return f"{estimate.mean:.4f} ± {estimate.error:.4f}"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.4f} ± {estimate.error:.4f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _footer(rows: list[Row]) -> str:
    seeds, first = len({row["seed"] for row in rows}), rows[0]
    tokens = f"{first['tokens']:,} tokens"
    versions = ", ".join(f"{name} {value}" for name, value in json.loads(first["versions"]).items())
    return (
        f"{seeds} seeds, {first['steps']} steps, {tokens}; nats/token, ± standard error over the seeds;"
        f" {first['machine']}, commit {first['commit']}, {versions}."
    )


def page() -> str:
    """The whole page; a table without results says so."""
    parts: dict[str, Callable[[], str]] = {"baselines": baselines}

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        there = (HERE / "results" / f"{name}.parquet").exists()
        return parts[name]() if there else "*Not run yet.*"

    return re.sub(
        r"^\{\{(\w+)\}\}$", fill, (HERE / "page.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "study.md"
    out.write_text(page(), encoding="utf-8")
