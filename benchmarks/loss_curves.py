"""The loss over vocabulary sizes and numbers of positions: time, and peak memory beyond the gradients.

python benchmarks/loss_curves.py ours 2048 49152 1     one point, as JSON: [cpu seconds of each round, bytes]
"""

from __future__ import annotations

import argparse
import json
import sys

from common import Row, alternate, fresh_process, goal, peak_growth, report, timing
from loss_problem import DrawnProblem

WIDTH = 576
BASE = (2048, 49152)  # positions, vocabulary
POINTS = {
    "vocab": [(BASE[0], vocab) for vocab in (32768, 49152, 131072, 262144)],
    "positions": [(positions, BASE[1]) for positions in (512, 2048, 8192, 16384)],
}
ROUNDS = 2
CE_BYTES = 8e9  # cross-entropy on full logits is left out where it needs more


def measure(name: str, positions: int, vocab: int) -> tuple[list[float], int]:
    """Seconds of each round and peak memory in bytes; to be called in a process that has done nothing
    else."""
    problem = DrawnProblem(positions, vocab, WIDTH)
    call = {"ours": problem.ours, "CE on full logits": problem.ce}[name]
    peak = peak_growth(call)
    return alternate({name: call}, ROUNDS)[name], peak


def point(name: str, axis: str, positions: int, vocab: int, threads: int) -> Row:
    """One row; `beyond_gradients_megabytes` is the peak less dhidden and dweight, which every method
    returns."""
    row: Row = {"name": name, "curve": axis, "positions": positions, "vocab": vocab}
    gradients = 4 * WIDTH * (positions + vocab)
    needed = 3 * 4 * positions * vocab + gradients  # logits, log-softmax, their gradient
    if name != "ours" and needed > CE_BYTES:
        return {**row, "skipped": f"would need {needed / 1e9:.1f} GB"}
    seconds, peak = fresh_process(__file__, name, str(positions), str(vocab), str(threads))
    memory = {"peak_megabytes": peak / 1e6, "beyond_gradients_megabytes": (peak - gradients) / 1e6}
    return {**row, **timing(seconds), **memory}


def curves_part(arguments: argparse.Namespace) -> None:
    rows = [
        point(name, axis, positions, vocab, arguments.threads)
        for axis, sizes in POINTS.items()
        for positions, vocab in sizes
        for name in ("ours", "CE on full logits")
    ]
    shape = {"width": WIDTH, "dtype": "float32"}
    report(rows, curve_goals(rows), arguments.json, part="curves", shape=shape, inputs="drawn")


def curve_goals(rows: list[Row]) -> list[Row]:
    """Peak memory against what grows with N elsewhere: one [N, V] in float32."""
    ours = [row for row in rows if row["name"] == "ours" and row["curve"] == "positions"]
    fewest, most = ours[0], ours[-1]
    grown = most["beyond_gradients_megabytes"] - fewest["beyond_gradients_megabytes"]
    logits = 4e-6 * BASE[1] * (most["positions"] - fewest["positions"])
    share = round(grown / logits, 4)
    name = (
        f"peak memory beyond gradients, growth from {fewest['positions']} to {most['positions']} positions /"
        " that of one [N, V]"
    )
    return [goal(name, "<= 0.02", share, share <= 0.02)]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
