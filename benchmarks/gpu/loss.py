"""The loss: bfloat16, V = 131072, d = 2048, 8k and 64k positions, against its floor and other packages' cross-entropy.

`ours` is what `distill` calls on that device, CE + KL with 64 ids a row; the floor is the three products alone, and of
the others all but dense KD compute the cross-entropy alone. Goals are on 8k positions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, report
from loss_floor import MISSING, torch_ce
from loss_peers import add_folder
from loss_problem import DrawnProblem, K

from ddk_pipe.pipeline.losses import chosen_implementation, labelled_rows, rows_sparse_kd
from gpu.clock import attempt, timed
from gpu.verdict import Goal, about, is_missing, ratio, report_missing

VOCAB, WIDTH, POSITIONS = 131072, 2048, (8192, 65536)
TOY_VOCAB, TOY_WIDTH, TOY_POSITIONS = 512, 32, (64, 128)
DTYPE = torch.bfloat16
PRODUCT_ROWS = 8192  # of one product: larger ones are no faster, and their logits would not fit
OURS, FLOOR, CE, QUACK = "ours", "three products alone", "CE on full logits", "QuACK linear CE"
TIME = {
    FLOOR: Goal(f"time / {FLOOR}", 1.15),
    CE: Goal(f"time / {CE}", 0.9),
    QUACK: Goal(f"time / {QUACK}", 1.1, optional=True),
}
MEMORY = Goal(f"peak memory / {CE}", 1 / 6)
Methods = dict[str, Callable[[], None]]


def run(device: str, path: Path | None, *, rounds: int, peers: Path | None, part: str | None = None) -> None:
    add_folder(peers)
    positions = POSITIONS if device == "cuda" else TOY_POSITIONS
    vocab, width = (VOCAB, WIDTH) if device == "cuda" else (TOY_VOCAB, TOY_WIDTH)
    shape = {"vocab": vocab, "width": width, "k": K, "dtype": str(DTYPE).removeprefix("torch.")}
    if is_missing(device):
        names = [f"N = {n}" for n in positions]
        report_missing(names, [*TIME.values(), MEMORY], path, part=part, shape=shape)
        return
    found = {n: measure(device, n, vocab, width, rounds) for n in positions}
    rows = [row for of_size in found.values() for row in of_size]
    chosen = chosen_implementation(torch.device(device), DTYPE, kept=K)
    extra = {"shape": shape, "inputs": "drawn", "implementation": chosen, **about(device)}
    report(rows, goals_of(found[positions[0]], device), path, part=part, **extra)


def measure(device: str, positions: int, vocab: int, width: int, rounds: int) -> list[Row]:
    """One row a method: median seconds and peak memory beyond the inputs, or why it did not run."""
    problem = DrawnProblem(positions, vocab, width, device=device, dtype=DTYPE)
    flop, rows = 6 * positions * vocab * width, []
    for method, call in methods(problem).items():
        about_it: Row = {"name": f"{method}, N = {positions}", "method": method, "positions": positions}
        row = attempt(about_it, partial(timed, call, device, rounds=rounds))
        if "seconds_median" in row:
            row["teraflops_of_the_products"] = flop / row["seconds_median"] / 1e12
        rows.append(row)
        problem.hidden.grad = problem.weight.grad = None
        vars(problem).pop("teacher", None)  # as large as the logits: no other method may have to live with it
    return rows


def goals_of(rows: list[Row], device: str) -> list[Row]:
    """Ours against the floor, CE on full logits, and QuACK where it is installed."""
    of = {row["method"]: row for row in rows}
    goals = [one.judged(ratio(of[OURS], of[other]), device) for other, one in TIME.items()]
    return [*goals, MEMORY.judged(ratio(of[OURS], of[CE], "peak_megabytes"), device)]


def methods(problem: DrawnProblem) -> Methods:
    """Each makes its gradients anew."""
    return {
        FLOOR: lambda: products(problem),
        CE: problem.ce,
        "dense KD": lambda: dense_kd(problem),
        OURS: ours(problem, "auto"),
        "ours, chunked": ours(problem, "chunked"),
        "ours, triton": ours(problem, "triton"),
        "ours, never materialised": lambda: never_materialised(problem),
        "F.linear_cross_entropy": lambda: torch_linear_ce(problem, None),
        "F.linear_cross_entropy, 4096 rows": lambda: torch_linear_ce(problem, 4096),
        QUACK: lambda: quack_ce(problem),
        "Liger fused linear CE": lambda: liger_ce(problem),
    }


def products(problem: DrawnProblem) -> None:
    """The least that any exact method multiplies; the sums of dweight over parts are left out."""
    with torch.no_grad():
        for start in range(0, len(problem.hidden), PRODUCT_ROWS):
            part = problem.hidden[start : start + PRODUCT_ROWS]
            z = part @ problem.weight.t()
            torch.mm(z, problem.weight)
            torch.mm(z.t(), part)


def ours(problem: DrawnProblem, implementation: Any) -> Callable[[], None]:
    """As the training step calls it: labels and ids were checked where the batch was made, on the host."""
    labels, targets = problem.labels.cpu(), problem.targets.to("cpu")
    rows = labelled_rows(labels, targets, vocab=len(problem.weight), gamma=1.0).to(problem.hidden.device)

    def call() -> None:
        loss = rows_sparse_kd(problem.hidden, problem.weight, rows, gamma=1.0, implementation=implementation)
        problem.backward(loss.total)

    return call


def never_materialised(problem: DrawnProblem) -> None:
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl import fused_linear_sparse_kl

    t = problem.targets
    operands = (problem.hidden.detach(), problem.weight.detach(), problem.labels)
    fused_linear_sparse_kl(*operands, t.ids, t.logprobs, t.tail, gamma=1.0)


def dense_kd(problem: DrawnProblem) -> None:
    """The teacher's log-probabilities are drawn in the warm-up, and count in the peak memory."""
    if not hasattr(problem, "teacher"):
        shape = (len(problem.hidden), len(problem.weight))
        teacher = torch.randn(shape, device=problem.hidden.device, dtype=DTYPE)
        problem.teacher = torch.log_softmax(teacher, 1)
    problem.dense_kd()


def torch_linear_ce(problem: DrawnProblem, rows: int | None) -> None:
    """In the chunks that it chooses itself, or of so many rows; torch 2.13 and newer."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise RuntimeError(MISSING)
    if rows is not None:
        torch_ce(problem, rows)
        return
    layer = (problem.hidden, problem.weight, problem.labels)
    options = torch.nn.LinearCrossEntropyOptions()
    loss = torch.nn.functional.linear_cross_entropy(*layer, reduction="sum", options=options)
    problem.backward(loss)


def quack_ce(problem: DrawnProblem) -> None:
    """With the chunks of 4,096 rows that it has by default; Hopper and newer."""
    module: Any = importlib.import_module("quack.linear_cross_entropy")
    layer = (problem.hidden, problem.weight, problem.labels)
    problem.backward(module.chunked_linear_cross_entropy(*layer, reduction="sum"))


def liger_ce(problem: DrawnProblem) -> None:
    module: Any = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    problem.backward(loss(problem.weight, problem.hidden, problem.labels))
