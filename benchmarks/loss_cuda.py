"""The loss on a GPU: bfloat16, V = 131072, d = 2048, 8k and 64k positions, against CE, dense KD and Liger.

No part of this has run on a GPU yet; without one it says so, in the JSON too.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Row, goal, report
from loss_peers import add_folder, one_line
from loss_problem import DrawnProblem

VOCAB, WIDTH = 131072, 2048
POSITIONS = (8192, 65536)
NO_DEVICE = "not run: no CUDA device"
GOALS = (("time / the 6 N V d floor at the measured matmul rate", 1.25), ("time / CE on full logits", 0.8))


def cuda_part(arguments: argparse.Namespace) -> None:
    add_folder(arguments.peers)
    shape = {"vocab": VOCAB, "width": WIDTH, "dtype": "bfloat16"}
    if not torch.cuda.is_available():
        rows: list[Row] = [{"name": f"N = {n}", "status": NO_DEVICE} for n in POSITIONS]
        goals = [
            goal(f"N = {n}: {what}", f"<= {most}", NO_DEVICE, False)
            for n in POSITIONS
            for what, most in GOALS
        ]
        report(rows, goals, arguments.json, part="cuda", shape=shape)
        return
    rows, goals = [], []
    for positions in POSITIONS:
        found = measure(torch.device("cuda"), positions, VOCAB, WIDTH, arguments.rounds)
        rows += found
        goals += cuda_goals(positions, {row["method"]: row for row in found})
    gpu = torch.cuda.get_device_name()
    report(rows, goals, arguments.json, part="cuda", shape=shape, gpu=gpu, inputs="drawn")


def measure(device: torch.device, positions: int, vocab: int, width: int, rounds: int) -> list[Row]:
    """One row a method: median seconds and peak memory beyond the inputs, or why it did not run."""
    problem = DrawnProblem(positions, vocab, width, device=str(device), dtype=torch.bfloat16)
    rows = []
    for method, call in methods(problem).items():
        row: Row = {"name": f"{method}, N = {positions}", "method": method, "positions": positions}
        try:
            rows.append({**row, **timed(call, device, rounds)})
        except Exception as reason:  # noqa: BLE001 - out of memory, a package that is missing, a kernel that fails
            rows.append({**row, "not run": one_line(reason)})
        problem.hidden.grad = problem.weight.grad = None
        vars(problem).pop("teacher", None)  # as large as the logits: no other method may have to live with it
    flop = 6 * positions * vocab * width
    return [
        {**row, "teraflops_of_the_products": flop / row["seconds_median"] / 1e12}
        if "seconds_median" in row
        else row
        for row in rows
    ]


def methods(problem: DrawnProblem) -> dict[str, Callable[[], None]]:
    """Each makes its gradients anew; the products alone are at the size that the library likes best, all
    rows."""
    return {
        "three products alone": lambda: products(problem),
        "CE on full logits": problem.ce,
        "dense KD": lambda: dense_kd(problem),
        "Liger fused linear CE": lambda: liger_ce(problem),
        "ours, chunked": lambda: problem.ours(implementation="chunked"),
        "ours, triton": lambda: problem.ours(implementation="triton"),
        "ours, never materialised": lambda: never_materialised(problem),
    }


def products(problem: DrawnProblem) -> None:
    with torch.no_grad():
        for start in range(0, len(problem.hidden), 8192):
            part = problem.hidden[start : start + 8192]
            z = part @ problem.weight.t()
            torch.mm(z, problem.weight)
            torch.mm(z.t(), part)


def dense_kd(problem: DrawnProblem) -> None:
    """The teacher's log-probabilities are drawn in the warm-up, and count in the peak memory."""
    if not hasattr(problem, "teacher"):
        shape = (len(problem.hidden), len(problem.weight))
        teacher = torch.randn(shape, device=problem.hidden.device, dtype=torch.bfloat16)
        problem.teacher = torch.log_softmax(teacher, 1)
    problem.dense_kd()


def liger_ce(problem: DrawnProblem) -> None:
    module: Any = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    problem.backward(loss(problem.weight, problem.hidden, problem.labels))


def never_materialised(problem: DrawnProblem) -> None:
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl import fused_linear_sparse_kl

    t = problem.targets
    operands = (problem.hidden.detach(), problem.weight.detach(), problem.labels)
    fused_linear_sparse_kl(*operands, t.ids, t.logprobs, t.tail, gamma=1.0)


def timed(call: Callable[[], None], device: torch.device, rounds: int) -> Row:
    """Wall-clock seconds between two synchronisations, after one warm-up that also measures memory."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    call()
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    seconds = []
    for _ in range(rounds):
        synchronise(cuda)
        began = time.perf_counter()
        call()
        synchronise(cuda)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds_median": statistics.median(seconds),
        "seconds_least": min(seconds),
        "seconds_most": max(seconds),
        "peak_megabytes": peak / 1e6,
    }


def synchronise(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def cuda_goals(positions: int, rows: dict[str, Row]) -> list[Row]:
    """Our faster way against the floor, which is the three products at the rate they were measured at, and
    CE."""
    mine = min((row.get("seconds_median", float("inf")) for name, row in rows.items() if "ours" in name))
    found = []
    for (what, most), other in zip(GOALS, ("three products alone", "CE on full logits"), strict=True):
        theirs = rows[other].get("seconds_median")
        value: float | str = round(mine / theirs, 3) if theirs else f"{other}: {rows[other].get('not run')}"
        met = isinstance(value, float) and value <= most
        found.append(goal(f"N = {positions}: {what}", f"<= {most}", value, met))
    return found
