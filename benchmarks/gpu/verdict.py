"""Goals that only a GPU may be judged by, and what a machine without one writes in their place."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Row, goal, report

NO_DEVICE = "not run: no CUDA device"


@dataclass(frozen=True)
class Goal:
    """`name` is to be at most `limit` (or at least, where `at_least`); `optional`: where the other is installed."""

    name: str
    limit: float
    at_least: bool = False
    optional: bool = False

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:.4g}"

    def judged(self, value: float | str | None, device: str) -> Row:
        """A line of `goals`. A reason in place of a value is a goal not met; on a CPU nothing is met or not."""
        if device == "cpu":
            said = "not measured" if value is None else value if isinstance(value, str) else f"{value:.4g}"
            return goal(self.name, self.wanted, f"not judged: on a CPU, at toy sizes ({said})", None)
        if value is None or isinstance(value, str):
            return goal(self.name, self.wanted, value or "not measured", None if self.optional else False)
        return goal(
            self.name, self.wanted, value, value >= self.limit if self.at_least else value <= self.limit
        )


def is_missing(device: str) -> bool:
    """True for a CUDA device on a machine that has none."""
    return device == "cuda" and not torch.cuda.is_available()


def report_missing(names: list[str], goals: list[Goal], path: Path | None, **extra: Any) -> None:
    """Say of each measurement and goal that there was no device for it."""
    rows: list[Row] = [{"name": name, "status": NO_DEVICE} for name in names]
    report(rows, [goal(one.name, one.wanted, NO_DEVICE, None) for one in goals], path, **extra)


def about(device: str) -> Row:
    """What `report` does not know by itself: the card, and that toy sizes were run."""
    if device == "cpu":
        return {"toy": "CPU, toy sizes: the figures mean nothing"}
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory,
        "cuda": torch.version.cuda,
        "machine": platform.machine(),
    }


def ratio(mine: Row | None, other: Row | None, key: str = "seconds_median") -> float | str:
    """mine / other by `key`; why there is none where one of them did not run."""
    for row in (mine, other):
        if row is None or not row.get(key):
            return f"{row['name']}: {row.get('not run', f'no {key}')}" if row else "not run"
    assert mine is not None and other is not None
    return float(mine[key]) / float(other[key])
