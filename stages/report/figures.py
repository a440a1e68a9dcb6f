"""The pictures of a report, drawn with matplotlib; the same figures become inline SVG, SVG files and PNG files.

Each picture is one small panel (the page lays them out beside each other), has a title, a description in words for
those who cannot see it, and its data in groups named "mark-...", by which the tests know that something was drawn.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("svg")  # no window, whatever the user's settings
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ddk_pipe.stages.common import RunRecord, perplexity
from ddk_pipe.stages.report.data import Group, Report

COLOURS = (  # after Okabe and Ito: told apart by the colour-blind, and on white as on black
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8C6BB1",
    "#999933",
    "#888888",
    "#AA4499",
)
DASHES = ("-", "--", ":", "-.")
MOST_POINTS = 300  # of a line: more cannot be seen
MOST_GROUPS = 20  # of a sweep, in its ranking
MOST_LINES = 8  # groups in one picture over the steps: the best
INK = "#010203"  # stands for the text's colour until the page puts its own
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ddk-pipe",  # the same report is the same bytes
    "text.parse_math": False,  # a name with two dollar signs is a name
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    **{f"{name}.color": INK for name in ("text", "xtick", "ytick", "grid")},
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
}


@dataclass(frozen=True)
class Picture:
    """A figure, its name for a file, and what it shows in words."""

    name: str
    title: str
    description: str
    figure: Figure

    def svg(self) -> str:
        """A whole <svg> element of its own, ids prefixed by its name; text is text."""
        with matplotlib.rc_context(STYLE):
            buffer = io.StringIO()
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        return re.sub(r'(href="#|url\(#)', rf"\g<1>{self.name}-", text)

    def file(self, kind: str) -> bytes:
        """The content of a .png (twice the usual density) or .svg file, dark on white."""
        if kind == "svg":
            ground = self.svg().replace(INK, "#222222")
            return ground.replace("<svg ", '<svg style="background: white" ', 1).encode()
        with matplotlib.rc_context(STYLE):
            buffer = io.BytesIO()
            self.figure.savefig(buffer, format="png", dpi=200, facecolor="white")
        return buffer.getvalue()


def pictures(report: Report) -> Iterator[Picture]:
    """Those of the sweep, or of the run; none for what has no data yet."""
    with matplotlib.rc_context(STYLE):
        if report.is_sweep:
            yield from _of_sweep(report)
        else:
            yield from _of_run(report.runs[0])


def _of_run(run: RunRecord) -> Iterator[Picture]:
    if run.validation:
        yield _perplexities(run)
        yield _gaps(run)
        yield _weights(run)
    for column, title, unit in (
        ("loss", "Training loss", "nats/token"),
        ("ce", "Cross-entropy to the text", "nats/token"),
        ("kl", "KL to the teacher", "nats/token"),
        ("target_ce", "Cross-entropy to the teacher's targets", "nats/token"),
        ("learning_rate", "Learning rate", ""),
        ("tokens_per_second", "Speed", "tokens/s"),
    ):
        points = [(row["step"], row[column]) for row in run.steps if row.get(column) is not None]
        if points:
            yield _training(points, column, title, unit)


def _of_sweep(report: Report) -> Iterator[Picture]:
    groups = report.groups[:MOST_GROUPS]
    if groups:
        yield _ranking(groups, len(report.groups))
        for index, domain in enumerate(report.domains):
            yield _domain_of_groups(groups[:MOST_LINES], domain, index)
    begun = [run for run in report.runs if run.validation]
    if begun:
        yield _gaps_of_runs(begun)


def _panel(height: float = 3.1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.0, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes, count: int) -> None:
    """Below the panel, in two columns where the names are short."""
    handles, labels = axes.get_legend_handles_labels()
    if count > 1:
        columns = 2 if max(map(len, labels)) <= 16 else 1
        figure.set_figheight(figure.get_figheight() + 0.19 * max(0, -(-count // columns) - 2))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def short(name: str, most: int = 34) -> str:
    """A long name's beginning and end."""
    return name if len(name) <= most else f"{name[: most - 11]}…{name[-10:]}"


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "gid": f"mark-{index}",
    }


def thinned(points: list[tuple[float, float]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """x and y of a line; of a long one, means over runs of points."""
    x, y = np.array(points, dtype=np.float64).T
    if len(x) <= MOST_POINTS:
        return x, y
    cuts = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)
    return tuple(np.array([part[a:b].mean() for a, b in itertools.pairwise(cuts)]) for part in (x, y))  # type: ignore[return-value]


def _perplexities(run: RunRecord) -> Picture:
    first = {row["domain"]: row for row in reversed(run.validation)}
    last = {row["domain"]: row for row in run.last}
    series: dict[str, Callable[[str], float]] = {
        "teacher": lambda name: perplexity(last[name]["teacher_ce"]),
        "student, first": lambda name: perplexity(first[name]["student_ce"]),
        "student, last": lambda name: perplexity(last[name]["student_ce"]),
    }
    figure, axes = _panel(max(3.1, 1.4 + 0.42 * len(last)))
    rows = np.arange(len(last))
    for index, (label, value) in enumerate(series.items()):
        places = rows + (index - 1) * 0.26
        bars = axes.barh(places, [value(name) for name in last], 0.24, label=label, color=COLOURS[index])
        for number, bar in enumerate(bars):
            bar.set_gid(f"mark-{index}-{number}")
    axes.set(xscale="log", xlabel="perplexity (log scale)")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 30 * low else (1, 2, 5), numticks=6))
    axes.xaxis.set_major_formatter("{x:g}")  # the usual one writes mathematics
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(rows, [short(name, 18) for name in last])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    _legend(figure, axes, 3)
    words = "; ".join(
        f"{name}: teacher {perplexity(last[name]['teacher_ce']):.2f},"
        f" student {perplexity(first[name]['student_ce']):.2f} at first and"
        f" {perplexity(last[name]['student_ce']):.2f} at last"
        for name in last
    )
    return Picture("perplexity", "Perplexity by domain", words, figure)


def _by_domain(run: RunRecord, column: str) -> dict[str, list[tuple[float, float]]]:
    out: dict[str, list[tuple[float, float]]] = {}
    for row in run.validation:
        out.setdefault(row["domain"], []).append((row["step"], row[column]))
    return out


def _gaps(run: RunRecord) -> Picture:
    figure, axes = _panel()
    lines = _by_domain(run, "gap")
    for index, (domain, points) in enumerate(lines.items()):
        axes.plot(*thinned(points), label=short(domain), marker=_dots(points), **_style(index))
    axes.set(xlabel="step", ylabel="gap, nats/token")
    _legend(figure, axes, len(lines))
    words = "; ".join(f"{name}: {points[0][1]:.3f} to {points[-1][1]:.3f}" for name, points in lines.items())
    return Picture("gaps", "Validation gap to the teacher", f"Nats per token, first to last. {words}", figure)


def _weights(run: RunRecord) -> Picture:
    figure, axes = _panel()
    lines = _by_domain(run, "weight")
    length = min(len(points) for points in lines.values())
    steps = [step for step, _ in next(iter(lines.values()))][:length]
    heights = [[value for _, value in points[:length]] for points in lines.values()]
    if length == 1:  # an area needs two ends
        steps, heights = [steps[0], steps[0] + 1], [row * 2 for row in heights]
    areas = axes.stackplot(
        steps, heights, labels=[short(name) for name in lines], colors=COLOURS, alpha=0.85, step="post"
    )
    for index, area in enumerate(areas):
        area.set_gid(f"mark-{index}")
    axes.set(xlabel="step", ylabel="share of the next windows", ylim=(0, 1), xlim=(steps[0], steps[-1]))
    _legend(figure, axes, len(lines))
    words = "; ".join(f"{name}: {points[0][1]:.3f} to {points[-1][1]:.3f}" for name, points in lines.items())
    return Picture("weights", "Domain weights", f"Shares of the data, first to last. {words}", figure)


def _training(points: list[tuple[float, float]], column: str, title: str, unit: str) -> Picture:
    figure, axes = _panel(2.6)
    axes.plot(*thinned(points), marker=_dots(points), **_style(0))
    axes.set(xlabel="step", ylabel=unit)
    words = f"{points[0][1]:.4g} at step {points[0][0]:,}, {points[-1][1]:.4g} at step {points[-1][0]:,}"
    return Picture(f"train-{column.replace('_', '-')}", title, f"{words} {unit}".strip(), figure)


def _dots(points: list[tuple[float, float]]) -> str:
    return "." if len(points) <= 12 else ""


def _ranking(groups: list[Group], all_groups: int) -> Picture:
    figure, axes = _panel(max(2.2, 1.1 + 0.36 * len(groups)))
    for place, group in enumerate(groups):
        colour = COLOURS[place % len(COLOURS)]
        seeds = list(group.by_seed.values())
        axes.plot(seeds, [place] * len(seeds), "o", color=colour, alpha=0.35, gid=f"mark-seeds-{place}")
        axes.errorbar(group.gap, place, xerr=group.gap_error, fmt="D", color=colour, capsize=4)
    axes.set_yticks(range(len(groups)), [short(group.name, 22) for group in groups])
    axes.set(xlabel="mean gap, nats/token", ylim=(len(groups) - 0.5, -0.5))
    more = f" The best {len(groups)} of {all_groups} are shown." if all_groups > len(groups) else ""
    words = "; ".join(f"{group.name}: {group.gap:.4f}" for group in groups)
    return Picture(
        "ranking", "Ranking", f"Less is better. Diamonds are means, dots are seeds.{more} {words}", figure
    )


def _domain_of_groups(groups: list[Group], domain: str, number: int) -> Picture:
    figure, axes = _panel(2.8 if len(groups) <= 4 else 3.4)
    for index, group in enumerate(groups):
        lines = [_by_domain(run, "gap").get(domain, []) for run in group.runs]
        steps = sorted(set.intersection(*({step for step, _ in line} for line in lines)))
        means = [(step, float(np.mean([dict(line)[step] for line in lines]))) for step in steps]
        if means:
            axes.plot(*thinned(means), label=short(group.name), marker=_dots(means), **_style(index))
    axes.set(xlabel="step", ylabel="gap, nats/token")
    _legend(figure, axes, len(groups))
    return Picture(
        f"domain-{number}",
        f"Gap on {short(domain, 40)}",
        f"Mean over seeds of the validation gap on {domain} over the steps, of the best {len(groups)} groups",
        figure,
    )


def _gaps_of_runs(runs: list[RunRecord]) -> Picture:
    figure, axes = _panel()
    names = list(dict.fromkeys(run.group for run in runs))
    for number, run in enumerate(runs):
        means: dict[float, list[float]] = {}
        for row in run.validation:
            means.setdefault(row["step"], []).append(row["gap"])
        points = [(step, float(np.mean(values))) for step, values in means.items()]
        style = _style(names.index(run.group)) | {"gid": f"mark-{number}"}
        axes.plot(*thinned(points), marker=_dots(points), linewidth=1, **style)
    axes.set(xlabel="step", ylabel="mean gap, nats/token")
    return Picture(
        "all-runs", "Every run", f"Mean validation gap of each of {len(runs)} runs, coloured by group", figure
    )
