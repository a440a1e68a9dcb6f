"""docs/study.md from results/*.parquet: every number on the page comes from there.

    python benchmarks/study/page.py [OUT]

page.md holds the words; a line `{{name}}` in it stands for what the function `name` of this module writes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import names
import pyarrow.parquet as pq
from estimates import Estimate, Row, figures_of_run, holm, paired

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHOWN = {  # figure: its heading
    "mean_gap": "mean gap",
    "worst_gap": "worst gap",
    "natural_ce": "natural CE",
    "kl": "KL to the teacher",
    "ece": "ECE",
    "agreement": "agreement",
}
NAMES = {  # of a table's arms
    "near": names.of_mixing,
    "baselines": names.of_mixing,
    "left_out": names.of_left_out,
    "targets": names.of_targets,
    "noise": names.of_mixing,
    "skipping": names.of_skipping,
    "real": names.of_mixing,
    "real_online": names.of_mixing,
}
BYTES, SECONDS, NOISE_SHARE = "bytes_per_position", "seconds", "noise_share"
NOISE, DENSE = "noise", names.of_targets({"distill.targets": "online"})
KD = "KD uniform"
BITS = 1 / math.log(2)  # of a nat
Runs = dict[str, dict[int, dict[str, float]]]  # arm: seed: figures


def read(table: str) -> tuple[dict[str, Runs], list[Row]]:
    """Figures of a table's runs by start, and its rows. The noise domain counts in none of the figures."""
    rows = pq.read_table(HERE / "results" / f"{table}.parquet").to_pylist()
    out: dict[str, Runs] = defaultdict(lambda: defaultdict(dict))
    for (start, arm, seed), domains in _by_run(table, rows).items():
        out[start][arm][seed] = _figures(domains)
    return out, rows


def _by_run(table: str, rows: list[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """The rows of each (start, arm, seed), one a domain."""
    out: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        settings = json.loads(row["settings"])
        start = names.start_of(settings)
        out[start, NAMES[table](settings), row["seed"]].append(row)
    return out


def _figures(domains: list[Row]) -> dict[str, float]:
    noise = next((row for row in domains if row["domain"] == NOISE), None)
    return {
        **figures_of_run([row for row in domains if row is not noise]),
        SECONDS: domains[0]["seconds"],
        **({BYTES: domains[0][BYTES]} if domains[0].get(BYTES) else {}),
        **(
            {NOISE_SHARE: noise["share_drawn"], "noise_gap": noise["student_ce"] - noise["teacher_ce"]}
            if noise
            else {}
        ),
    }


# --- the tables -------------------------------------------------------------------------------------


def near() -> str:
    return _by_start("near", "KD uniform", "DDK")


def baselines() -> str:
    return _by_start("baselines", "KD uniform", "DDK")


def left_out() -> str:
    return _by_start("left_out", names.of_left_out({}))


def targets() -> str:
    (runs,) = read("targets")[0].values()
    return "\n".join([_by_start("targets", DENSE, more={BYTES: "bytes/position"}), "", _beyond(runs, DENSE)])


def draw_targets(path: Path) -> None:
    """The picture beside the table of targets."""
    from picture import draw

    (runs,) = read("targets")[0].values()
    dense = _of(runs, DENSE, "mean_ce")
    draw(
        [
            (arm, next(iter(seeds.values()))[BYTES], paired(_of(runs, arm, "mean_ce"), dense))
            for arm, seeds in runs.items()
            if arm != DENSE
        ],
        path,
    )


def noise() -> str:
    more = {NOISE_SHARE: "windows spent on noise", "noise_gap": "gap on noise"}
    return _by_start("noise", "KD uniform", "DDK", more=more)


def skipping() -> str:
    return _by_start("skipping", "exact", more={SECONDS: "seconds a run"})


def real() -> str:
    return "\n".join([_by_start("real", KD), "", _bits_per_byte(read("real")[1])])


def _bits_per_byte(rows: list[Row]) -> str:
    """Of each start, arm and domain, mean over the seeds; the teacher's beside them."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (start, arm, _), domains in _by_run("real", rows).items():
        for row in domains:
            bits = BITS * row["positions"] / row["label_bytes"]
            found[start, arm][row["domain"]].append(bits * row["student_ce"])
            found["", "teacher"][row["domain"]].append(bits * row["teacher_ce"])
    columns = list(found["", "teacher"])
    lines = ["Bits/byte of each domain:", "", _row(["student", "arm", *columns])]
    lines.append(_row(["---"] * (2 + len(columns))))
    for (start, arm), by_domain in sorted(found.items(), key=lambda item: item[0][0] or "~"):
        lines.append(_row([start, arm, *(_plain(by_domain[column], 3) for column in columns)]))
    return "\n".join([*lines, ""])


def real_online() -> str:
    """Seconds of training a student from the cache and beside the teacher, and their CE; what the cache cost once."""
    head = [
        "student",
        "parameters",
        "s from the cache",
        "s beside the teacher",
        "ratio",
        "CE of `pps` above online",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    rows = read("real")[1]
    cached = _by_run("real", rows)
    for (start, _, seed), online in _by_run("real_online", read("real_online")[1]).items():
        own = cached[start, KD, seed]
        seconds = own[0][SECONDS], online[0][SECONDS]
        ce = figures_of_run(own)["mean_ce"] / figures_of_run(online)["mean_ce"] - 1
        cells = [f"{own[0]['parameters']:,}", *(f"{each:.0f}" for each in seconds)]
        lines.append(_row([start, *cells, f"{seconds[1] / seconds[0]:.2f}", f"{ce:+.2%}"]))
    cache = rows[0]
    once = (
        f"The cache, once: {cache['cache_positions']:,} positions, {cache['cache_seconds']:,.0f} s,"
        f" {cache[BYTES]:.1f} bytes/position. A run takes {cache['tokens']:,} tokens of it."
    )
    return "\n".join(["KD uniform, one seed; two students at once, one thread each:", "", *lines, "", once])


def _beyond(runs: Runs, reference: str) -> str:
    """Mean CE above the reference's in percent of it, paired."""
    base = _of(runs, reference, "mean_ce")
    found = []
    for arm in runs:
        if arm != reference:
            own = _of(runs, arm, "mean_ce")
            off = Estimate.of(
                [100 * (own[seed] / base[seed] - 1) for seed in sorted(own.keys() & base.keys())]
            )
            found.append(f"{arm} {off.mean:+.2f} ± {off.error:.2f}%")
    return f"Mean CE above that of {reference}: {'; '.join(found)}."


def _by_start(table: str, *references: str, more: dict[str, str] | None = None) -> str:
    """All arms of each start, then their paired differences to each reference."""
    by_start, rows = read(table)
    parts = []
    for start, runs in by_start.items():
        parts += [f"### {start}", ""] if len(by_start) > 1 else []
        parts += [_arms(runs, {**(more or {}), **SHOWN})]
        parts += [_differences(runs, reference) for reference in references]
    return "\n".join([*parts, _footer(rows)])


def _arms(runs: Runs, shown: dict[str, str]) -> str:
    head = ["arm", *shown.values()]
    lines = [_row(head), _row(["---"] * len(head))]
    for arm, seeds in runs.items():
        lines.append(
            _row([arm, *(_plain([figures.get(key) for figures in seeds.values()]) for key in shown)])
        )
    return "\n".join([*lines, ""])


def _differences(runs: Runs, reference: str) -> str:
    head = ["arm", *SHOWN.values()]
    lines = [
        f"Paired differences to {reference}; in brackets p of the mean gap and of the worst gap, each Holm over the arms:",
        "",
        _row(head),
        _row(["---"] * len(head)),
    ]
    others = [arm for arm in runs if arm != reference]
    found = {
        name: [paired(_of(runs, arm, name), _of(runs, reference, name)) for arm in others] for name in SHOWN
    }
    tested = {name: holm([each.p for each in found[name]]) for name in ("mean_gap", "worst_gap")}
    for place, arm in enumerate(others):
        cells = [
            _signed(found[name][place]) + (f" ({tested[name][place]:.2g})" if name in tested else "")
            for name in SHOWN
        ]
        lines.append(_row([arm, *cells]))
    return "\n".join([*lines, ""])


def _of(runs: Runs, arm: str, name: str) -> dict[int, float]:
    return {seed: figures[name] for seed, figures in runs[arm].items()}


def _plain(values: Sequence[float | None], digits: int = 4) -> str:
    """Mean and standard error; only the mean where all runs have the same."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    estimate = Estimate.of(there)
    if len(set(there)) == 1:
        return f"{estimate.mean:.4g}"
    digits = 1 if estimate.mean >= 10 else digits
    return f"{estimate.mean:.{digits}f} ± {estimate.error:.{digits}f}"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.4f} ± {estimate.error:.4f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _footer(rows: list[Row]) -> str:
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    versions = ", ".join(f"{name} {value}" for name, value in json.loads(first["versions"]).items())
    made_by = ", ".join(sorted({row["commit"][:12] for row in rows}))
    return (
        f"{seeds} seeds, {first['steps']} steps, {first['tokens']:,} tokens; nats/token, ± standard error over the seeds;"
        f" {first['machine']}, commit {made_by}, {versions}."
    )


def hours() -> str:
    """What all runs of all tables took."""
    tables = [pq.read_table(path).to_pylist() for path in sorted((HERE / "results").glob("*.parquet"))]
    seconds = {row["run"]: row[SECONDS] for rows in tables for row in rows}
    cached = {row["cache_fingerprint"]: row.get("cache_seconds") or 0 for rows in tables for row in rows}
    return (
        f"{len(seconds)} students in {len(tables)} tables, {sum(seconds.values()) / 3600:.1f} hours of training on one"
        f" thread each, two at once; {sum(cached.values()) / 60:.0f} minutes of teachers on two cores, where it was noted."
    )


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (near, baselines, left_out, targets, noise, skipping, real, real_online, hours)
}


def page() -> str:
    """The whole page; a table without results says so."""

    def fill(match: re.Match[str]) -> str:
        there = match[1] not in NAMES or (HERE / "results" / f"{match[1]}.parquet").exists()
        return PARTS[match[1]]() if there else "*Not run yet.*"

    words = (HERE / "page.md").read_text(encoding="utf-8")
    return re.sub(r"^\{\{(\w+)\}\}$", fill, words, flags=re.MULTILINE)


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "study.md"
    out.write_text(page(), encoding="utf-8")
    if (HERE / "results" / "targets.parquet").exists():
        draw_targets(out.with_name("study-targets.svg"))
