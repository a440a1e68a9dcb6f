"""Other packages' losses on the benchmark's inputs: values, time and peak memory, as far as they can be imported.

    python benchmarks/loss_peers.py --rows 2048 [--peers DIR] --peak NAME      one method's peak memory, as JSON
    TRITON_INTERPRET=1 python benchmarks/loss_peers.py [--peers DIR] --interpreted    values of Liger's kernels

All of them want the teacher's full distribution; ours has 64 of its ids and a bucket, and computes CE as well.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import Row, alternate, fresh_process, peak_growth, report, spread, timing

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()

import torch
from loss_problem import DrawnProblem, RealProblem

from ddk_pipe.pipeline.losses import linear_sparse_kd
from ddk_pipe.pipeline.targets import SparseTargets

CHUNKS = 8  # torchtune's default
TRL, TORCHTUNE, LIGER = (
    "TRL generalized_jsd_loss, beta 0",
    "torchtune ForwardKLWithChunkedOutputLoss",
    "Liger LigerFusedLinearJSDLoss, beta 0, not compiled",
)
PACKAGES = {TRL: "trl", TORCHTUNE: "torchtune", LIGER: "liger_kernel"}
NOTES = {
    TRL: "KL alone, teacher's logits given",
    TORCHTUNE: "KL + the teacher's entropy, teacher's logits given",
    LIGER: "CE + KL; computes the teacher's logits, a fourth product; plain torch",
}


def trl_loss(problem: RealProblem) -> Callable[[], float]:
    gkd: Any = importlib.import_module("trl.experimental.gkd")

    def call() -> float:
        logits = problem.hidden @ problem.weight.t()
        loss = gkd.GKDTrainer.generalized_jsd_loss(
            logits[None], problem.teacher[None], beta=0.0, reduction="sum"
        )
        problem.backward(loss)
        return float(loss.detach()) / len(problem.labels)

    return call


def torchtune_loss(problem: RealProblem) -> Callable[[], float]:
    forward_kl = torchtune_losses().ForwardKLWithChunkedOutputLoss(CHUNKS)

    def call() -> float:
        logits = [part[None] @ problem.weight.t() for part in problem.hidden.chunk(CHUNKS)]
        teacher = [part[None] for part in problem.teacher.chunk(CHUNKS)]
        loss = forward_kl(logits, teacher, problem.labels[None])
        problem.backward(loss)
        entropy = float(torch.special.entr(problem.teacher.exp()).sum()) / len(problem.labels)
        return float(loss.detach()) - entropy

    return call


def torchtune_losses() -> Any:
    """The file of its KD losses, which needs torch alone: the package itself wants a torchao that is gone."""
    folders = importlib.metadata.distribution("torchtune")
    path = Path(str(folders.locate_file("torchtune/modules/loss/kd_losses.py")))
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def liger_loss(problem: RealProblem) -> Callable[[], float]:
    chunked: Any = importlib.import_module("liger_kernel.chunked_loss")
    jsd = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, compiled=False, return_soft_hard_loss=True
    )

    def call() -> float:
        teacher = (problem.teacher_hidden, problem.teacher_weight)
        total, soft, _ = jsd(problem.hidden, problem.weight, *teacher, problem.labels)
        problem.backward(total)
        return float(soft.detach())

    return call


MAKERS = {TRL: trl_loss, TORCHTUNE: torchtune_loss, LIGER: liger_loss}


def peers_part(arguments: argparse.Namespace) -> None:
    add_folder(arguments.peers)
    problem = RealProblem(arguments.rows).with_dense_teacher()
    calls: dict[str, Callable[[], Any]] = {"ours": problem.ours}
    rows: list[Row] = []
    for name, make in MAKERS.items():
        try:
            calls[name] = make(problem)
        except Exception as problem_with_it:  # noqa: BLE001 - whatever keeps a package from being imported
            rows.append({"name": name, "not installed": one_line(problem_with_it)})
    values = {name: call() for name, call in calls.items() if name != "ours"}
    dense = dense_kl(problem)
    seconds = alternate(calls, arguments.rounds)
    base = spread(seconds["ours"])["median"]
    options = ["--rows", str(arguments.rows), *folder_option(arguments.peers)]
    measured: list[Row] = []
    for name, taken in seconds.items():
        row: Row = {"name": name, **timing(taken), "ratio_to_ours": spread(taken)["median"] / base}
        row["peak_megabytes"] = fresh_process(__file__, "--peak", name, *options) / 1e6
        if name != "ours":
            row |= {"kl_nats": values[name], "dense_kl_nats": dense, "note": NOTES[name]}
            row["version"] = importlib.metadata.version(PACKAGES[name])
        measured.append(row)
    rows = [*measured, *rows, *interpreted_rows(arguments.peers)]
    report(rows, [], arguments.json, part="peers", inputs="SmolLM2-135M on Python sources")


def dense_kl(problem: RealProblem) -> float:
    """KL(teacher || student) over the whole vocabulary, float64, nats per position."""
    with torch.no_grad():
        total = 0.0
        for hidden, teacher in zip(
            *(torch.split(x, 64) for x in (problem.hidden, problem.teacher)), strict=True
        ):
            log_p = teacher.double().log_softmax(1)
            log_q = (hidden.double() @ problem.weight.double().t()).log_softmax(1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(problem.labels)


def interpreted_rows(peers: Path | None) -> list[Row]:
    """Liger's Triton losses against ours, values only: the interpreter's times mean nothing."""
    try:
        found: list[Row] = fresh_process(
            __file__, "--interpreted", *folder_option(peers), TRITON_INTERPRET="1"
        )
    except RuntimeError as problem:
        return [{"name": "Liger's Triton losses, interpreted", "not installed": one_line(problem)}]
    return found


def interpreted() -> list[Row]:
    """Relative differences of losses and gradients from ours, float32, where ours is given every token as an
    id."""
    problem = DrawnProblem(positions=7, vocab=320, width=32)
    teacher = torch.randn(7, 320, generator=torch.Generator().manual_seed(1)).mul_(2)
    ids = torch.arange(320, dtype=torch.int32).expand(7, -1).contiguous()
    no_tail = torch.full((7,), float("-inf"))
    problem.targets = SparseTargets(ids=ids, logprobs=teacher.log_softmax(1), tail=no_tail)
    # hidden states that the teacher's logits are the product of, for the loss that wants those
    teacher_weight = torch.eye(320)
    fused: Any = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    kl: Any = importlib.import_module("liger_kernel.transformers.fused_linear_kl_div")
    ce: Any = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    layer = (problem.hidden, problem.weight)
    losses: dict[str, tuple[Callable[[], Any], float]] = {
        "LigerFusedLinearCrossEntropyLoss": (
            lambda: ce.LigerFusedLinearCrossEntropyLoss(reduction="sum")(
                problem.weight, problem.hidden, problem.labels
            ),
            0.0,
        ),
        "LigerFusedLinearJSD, beta 0": (
            lambda: (
                7 * fused.LigerFusedLinearJSD(jsd_beta=0.0)(*layer, teacher, teacher_weight, problem.labels)
            ),
            1.0,
        ),
        "LigerFusedLinearKLDivLoss": (
            lambda: kl.LigerFusedLinearKLDivLoss(reduction="sum")(*layer, teacher.softmax(1)),
            1.0,
        ),
    }
    return [interpreted_row(name, call, gamma, problem) for name, (call, gamma) in losses.items()]


def interpreted_row(name: str, call: Callable[[], Any], gamma: float, problem: DrawnProblem) -> Row:
    row: Row = {"name": f"Liger {name}, interpreted", "version": importlib.metadata.version("liger_kernel")}
    try:
        loss = call()
        problem.backward(loss)
    except Exception as problem_with_it:  # noqa: BLE001 - a peer that does not run is a finding, not an end
        return {**row, "not run": one_line(problem_with_it)}
    theirs = [loss.detach(), *problem.gradients()]
    total = partial(
        linear_sparse_kd, problem.hidden, problem.weight, problem.labels, problem.targets, gamma=1.0
    )()
    alone = linear_sparse_kd(problem.hidden, problem.weight, problem.labels, None, gamma=0.0).total
    mine = total.total - alone if gamma else alone  # the KL alone, or CE alone
    problem.backward(mine)
    ours = [mine.detach(), *problem.gradients()]
    what = ("total_difference", "dhidden_difference", "dweight_difference")
    gaps = [float((a - b).norm() / b.norm()) for a, b in zip(theirs, ours, strict=True)]
    return {**row, **dict(zip(what, gaps, strict=True))}


def peak_of(positions: int, name: str) -> int:
    problem = RealProblem(positions).with_dense_teacher()
    return peak_growth(problem.ours if name == "ours" else MAKERS[name](problem))


def add_folder(peers: Path | None) -> None:
    """Searched last, so that no package there takes the place of one of ours."""
    if peers:
        sys.path.append(str(peers.resolve()))


def folder_option(peers: Path | None) -> list[str]:
    return ["--peers", str(peers)] if peers else []


def one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--peak")
    parser.add_argument("--interpreted", action="store_true")
    chosen = parser.parse_args()
    add_folder(chosen.peers)
    torch.set_num_threads(1)
    print(json.dumps(interpreted() if chosen.interpreted else peak_of(chosen.rows, chosen.peak)))
