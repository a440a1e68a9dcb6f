"""Goals of the cache, from the rows of cache_codec.py and of cache_training.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from common import Row, goal

REFERENCE = "random 50"  # Random Sampling KD with N = 50, in our codec
WEIGHTED = ("variance_p25", "variance_p50", "variance")  # what stands beside the loss above dense
LEVELS, STRETCH = {1.0: 14.0, 0.4: 30.0}, 10.0  # training cost relative to RS-KD N = 50: bytes wanted


def cache_goals(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows: bytes of `pps` at equal cost, by each measure of cost; and the goals."""
    main = {row["name"]: row for row in rows if row["part"] == "main"}
    betas = sorted({row["beta2"] for row in rows if row["part"] == "training"})
    training = {beta: [row for row in rows if row.get("beta2") == beta] for beta in betas}
    pps = {float(name.split()[1]): row for name, row in main.items() if name.startswith("pps ")}
    published = float(main["RS-KD 50, 24 bit"]["parts"]["entries"])
    at = [
        {**row, "of_rs_kd_24_bit": row["bytes"] / published}
        for level in LEVELS
        for row in [
            *(_by_training(pps, beta, training[beta], level) for beta in betas),
            *(_by_variance(pps, figure, level) for figure in WEIGHTED),
        ]
    ]
    goals = []
    for row in at:
        if not row["measure"].startswith("loss"):
            continue
        what = f"{row['cost']:g} x the cost of RS-KD N=50 by {row['measure']}"
        wanted = [LEVELS[row["cost"]], *([STRETCH] if row["cost"] == 1 else [])]
        goals += [goal(f"B/position at {what}", f"<= {w:g}", row["bytes"], row["bytes"] <= w) for w in wanted]
        if row["cost"] == 1:
            goals += _speed_goals(pps[max(tau for tau in pps if tau <= row["tau"])], what)
    return at, [*goals, _threshold_goal(main)]


def _speed_goals(setting: Row, what: str) -> list[Row]:
    found = []
    for way, wanted in (("decode", 1.5e6), ("encode", 3e5)):
        speed = setting[f"{way}_per_cpu_second"]
        name = f"{way}, positions per CPU-second, at {setting['name']}, the smallest of at most {what}"
        found.append(goal(name, f">= {wanted:.0f}", speed, speed >= wanted))
    return found


def _by_training(pps: dict[float, Row], beta2: float, rows: list[Row], level: float) -> Row:
    """From a power law through the measured settings, of means over the seeds."""
    above = {row["name"]: np.array(row["by_seed"]) for row in rows if "by_seed" in row}
    reference = above.pop(REFERENCE)
    taus = np.log([float(name.split()[1]) for name in above])

    def tau_at_level(keep: list[int]) -> float:
        ratios = [values[keep].mean() / reference[keep].mean() for values in above.values()]
        slope, offset = np.polyfit(taus, np.log(ratios), 1)
        return float(np.exp((np.log(level) - offset) / slope))

    tau, _ = jackknife(tau_at_level, len(reference))
    size, error = jackknife(lambda keep: _bytes(pps, tau_at_level(keep)), len(reference))
    measure = f"loss above dense, beta2 {beta2:g}"
    return {"measure": measure, "cost": level, "tau": tau, "bytes": size, "bytes_se": error}


def jackknife(figure: Callable[[list[int]], float], runs: int) -> tuple[float, float]:
    """The figure of all runs, given their numbers, and its standard error from leaving out each in turn."""
    everything = list(range(runs))
    if runs < 2:
        return figure(everything), float("nan")
    without = [figure([i for i in everything if i != left_out]) for left_out in everything]
    return figure(everything), float(np.sqrt((runs - 1) * np.var(without)))


def _by_variance(pps: dict[float, Row], figure: str, level: float) -> Row:
    taus = sorted(pps)
    tau = _on_line([pps[tau][figure] for tau in taus], taus, level)
    return {"measure": figure, "cost": level, "tau": tau, "bytes": _bytes(pps, tau)}


def _bytes(pps: dict[float, Row], tau: float) -> float:
    return _on_line(sorted(pps), [pps[tau]["bytes"] for tau in sorted(pps)], tau)


def _on_line(x: list[float], y: list[float], where: float) -> float:
    """y at x = where, linear in the logarithms between the points and on from the last two; x rises."""
    log_x, log_y, at = np.log(x), np.log(y), float(np.log(where))
    i = int(np.clip(np.searchsorted(log_x, at), 1, len(x) - 1))
    slope = (log_y[i] - log_y[i - 1]) / (log_x[i] - log_x[i - 1])
    return float(np.exp(log_y[i - 1] + slope * (at - log_x[i - 1])))


def _threshold_goal(main: dict[str, Row]) -> Row:
    """The smallest threshold cache whose targets err no more than top-64's."""
    good: list[dict[str, Any]] = [
        row
        for name, row in main.items()
        if name.startswith("threshold")
        and row["kl"] <= 1e-3
        and row["variance"] <= main["topk 64"]["variance"]
    ]
    best = min((float(row["bytes"]) for row in good), default=float("inf"))
    return goal("threshold, KL <= 1e-3, squared error <= top-64's: B/position", "<= 52", best, best <= 52)
