"""Quality against bytes: what a student loses by what its cache keeps, as an SVG of text and marks."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ddk-pipe", "font.size": 9})

import matplotlib.pyplot as plt
from estimates import Estimate

Point = tuple[str, float, Estimate]  # arm, bytes/position, what is lost


def draw(points: list[Point], path: Path) -> None:
    """Bytes/position to the right, loss beyond the dense teacher's up (nats, ± standard error), both logarithmic."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for arm, at, lost in points:
        axes.errorbar(at, lost.mean, yerr=lost.error, fmt="o", color="#1f5fa8", capsize=2)
        axes.annotate(arm, (at, lost.mean), xytext=(6, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xlabel("bytes/position of the cache")
    axes.set_ylabel("CE beyond training on the\ndense teacher, nats/token")
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
