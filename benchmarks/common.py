"""What every benchmark needs: alternating runs, medians with spread, and one JSON object of rows and goals."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def alternate(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Process-CPU seconds of every variant, in turn, `rounds` times after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def goal(name: str, wanted: str, value: float | str, met: bool) -> dict[str, Any]:
    """One line of `goals`."""
    return {"name": name, "goal": wanted, "value": value, "met": met}


def report(rows: list[dict[str, Any]], goals: list[dict[str, Any]], path: Path | None, **extra: Any) -> None:
    """Print the rows and goals; write them as JSON where a path is given."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        **extra,
        "rows": rows,
        "goals": goals,
    }
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
        )
    for line in goals:
        print(f"{'met' if line['met'] else 'NOT MET'}: {line['name']}: {line['value']} (goal {line['goal']})")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
