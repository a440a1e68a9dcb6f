"""From figures of single runs to tables: means with standard errors, paired differences, Holm's correction.

Runs with the same seed see the same order of the data as far as their mixing allows, so arms are compared within a
seed: a paired difference has the spread of what differs and not of what is common. Standard errors cover the order of
the data alone: one teacher, one checkpoint to start from, one set of report windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
# of one run, over its domains
FIGURES = ("mean_gap", "worst_gap", "mean_ce", "natural_ce", "kl", "ece", "agreement")


def figures_of_run(domains: Sequence[Row]) -> dict[str, float]:
    """One run's rows, one a domain, as Measure gives them -> its figures."""
    gaps = {row["domain"]: row["student_ce"] - row["teacher_ce"] for row in domains}

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in domains]))

    return {
        "mean_gap": float(np.mean(list(gaps.values()))),
        "worst_gap": max(gaps.values()),
        "mean_ce": mean("student_ce"),
        "natural_ce": sum(row["natural_share"] * row["student_ce"] for row in domains),
        "kl": mean("kl"),
        "ece": mean("ece"),
        "agreement": mean("agreement"),
    }


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its standard error (nan for one seed), and how many seeds."""

    mean: float
    error: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        n = len(values)
        error = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        return cls(float(np.mean(values)), error, n)

    @property
    def p(self) -> float:
        """Two-sided probability of so large a mean if the true one is 0 (Student's t)."""
        from scipy import stats

        if self.error == 0:
            return 0.0 if self.mean else 1.0
        return float(2 * stats.t.sf(abs(self.mean / self.error), self.seeds - 1))


def paired(one: dict[int, float], other: dict[int, float]) -> Estimate:
    """Differences one - other over the seeds that both have."""
    seeds = sorted(one.keys() & other.keys())
    return Estimate.of([one[seed] - other[seed] for seed in seeds])


def holm(probabilities: Sequence[float]) -> list[float]:
    """Adjusted probabilities (Holm 1979): the family's chance of one false finding stays below the level."""
    order = np.argsort(probabilities, kind="stable")
    adjusted, least = [0.0] * len(probabilities), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(probabilities) - place) * probabilities[index]))
        adjusted[index] = least
    return adjusted
