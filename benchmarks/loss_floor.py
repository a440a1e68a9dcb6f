"""The loss with its KL against what no exact method undercuts, and against torch's own chunked cross-entropy.

The floor is the three matrix products alone, `F.linear_cross_entropy` (torch 2.13 and newer) is CE alone; both are
tried in several chunkings, and the best counts. The chunks that the latter chooses by itself, of N d / V rows, are not
among them: at N = 456 they take five times as long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import Row, alternate, goal, report, spread, timing
from loss_problem import K, Problem, RealProblem

CHUNKS = (114, 228, 512)  # rows; the loss takes 228 at V = 49152, N = 2048
OURS, FLOOR, TORCH = "ours, CE + KL", "three products alone", "F.linear_cross_entropy"
MOST_RATIO = {FLOOR: 1.05, TORCH: 1.0}
MISSING = f"not run: torch {torch.__version__} has no F.linear_cross_entropy with options"


def floor_part(arguments: argparse.Namespace) -> None:
    problem = RealProblem(arguments.rows)
    seconds = alternate(variants(problem), arguments.rounds)
    rows: list[Row] = [{"name": name, **timing(values)} for name, values in seconds.items()]
    vocab, width = problem.weight.shape
    shape = {"rows": arguments.rows, "vocab": vocab, "width": width, "k": K, "dtype": "float32"}
    report(rows, floor_goals(seconds), arguments.json, part="floor", shape=shape)


def variants(problem: Problem) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {OURS: problem.ours}
    found |= {f"{FLOOR}, {rows} rows": partial(problem.products, rows) for rows in CHUNKS}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found |= {f"{TORCH}, {rows} rows": partial(torch_ce, problem, rows) for rows in CHUNKS}
    return found


def torch_ce(problem: Problem, rows: int) -> None:
    """With `compact` sums: of its policies the fastest here."""
    options: Any = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=rows, chunking_method=None, acc_policy="compact"
    )
    loss = F.linear_cross_entropy(
        problem.hidden, problem.weight, problem.labels, reduction="sum", options=options
    )
    problem.backward(loss)


def floor_goals(seconds: dict[str, list[float]]) -> list[Row]:
    """Our median against the best median of each rival's chunkings."""
    mine = spread(seconds[OURS])["median"]
    goals = []
    for rival, most in MOST_RATIO.items():
        theirs = [spread(values)["median"] for name, values in seconds.items() if name.startswith(rival)]
        value: float | str = round(mine / min(theirs), 3) if theirs else MISSING
        met = isinstance(value, float) and value <= most
        goals.append(goal(f"time / {rival} in its best chunking", f"<= {most}", value, met))
    return goals
