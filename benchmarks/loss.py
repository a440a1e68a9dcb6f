"""The distillation loss against plain cross-entropy, dense KD and a naive sparse loss: time and memory.

    python benchmarks/loss.py [--json OUT] [--rows 2048] [--rounds 5] [--threads 1]

Forward and backward to hidden states and output weight, one process, variants in turn, process-CPU seconds. Peak
memory is measured in a fresh process per variant (growth of the resident set over what the inputs take).
Shapes of SmolLM2-135M (d = 576, V = 49,152), float32. Hidden states and targets are drawn, not a model's: random hidden
states give logits of the right spread (see `problem`), and `pps` selects from a teacher that is the student plus noise.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import alternate, goal, report, spread

from ddk_pipe.stages.runtime import prepare_cpu

prepare_cpu()

import torch
import torch.nn.functional as F
from torch import Tensor

from ddk_pipe.pipeline.losses import linear_sparse_kd
from ddk_pipe.pipeline.selection import top_with_tail
from ddk_pipe.pipeline.targets import SparseTargets, stack

K = 64
CHUNK = 128


class Problem:
    """hidden [N, d], weight [V, d], labels [N], topk targets with K = 64 and, for dense KD, teacher logits."""

    def __init__(self, rows: int, vocab: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(rows, width, generator=generator).requires_grad_()
        # logits with a standard deviation of 3: entropy of about 6 nats, mass outside the top 64 about 0.5
        self.weight = (torch.randn(vocab, width, generator=generator) * 3 / width**0.5).requires_grad_()
        self.labels = torch.randint(0, vocab, (rows,), generator=generator)
        self.teacher_hidden = self.hidden.detach() + 0.15 * torch.randn(rows, width, generator=generator)
        self.targets = stack([self._targets(start) for start in range(0, rows, CHUNK)])

    def _targets(self, start: int) -> SparseTargets:
        logits = self.teacher_hidden[start : start + CHUNK] @ self.weight.detach().t()
        return top_with_tail(torch.log_softmax(logits, 1), K, floor=0.0)

    def backward(self, loss: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        loss.backward()  # type: ignore[no-untyped-call]

    def ce(self) -> None:
        """Cross-entropy on full logits: what ordinary training does."""
        self.backward(F.cross_entropy(self.hidden @ self.weight.t(), self.labels, reduction="sum"))

    def dense_kd(self) -> None:
        """CE + KL against the teacher's full logits (their computation not counted)."""
        logits = self.hidden @ self.weight.t()
        kl = F.kl_div(F.log_softmax(logits, 1), self.teacher, log_target=True, reduction="sum")
        self.backward(F.cross_entropy(logits, self.labels, reduction="sum") + kl)

    def naive_sparse(self) -> None:
        """CE + KL that gathers the kept ids from a full log-softmax, tail by 1 - sum."""
        log_q = F.log_softmax(self.hidden @ self.weight.t(), 1)
        kept = log_q.gather(1, self.targets.ids.long())
        w, tail = self.targets.logprobs.exp(), self.targets.tail.exp()
        rest = torch.log1p(-kept.exp().sum(1).clamp_max(1 - 1e-6))
        kl = (w * (self.targets.logprobs - kept)).sum() + (tail * (self.targets.tail - rest)).sum()
        self.backward(-log_q.gather(1, self.labels[:, None]).sum() + kl)

    def ours(self, temperature: float = 1.0) -> None:
        loss = linear_sparse_kd(
            self.hidden, self.weight, self.labels, self.targets, gamma=1.0, temperature=temperature
        )
        self.backward(loss.total)

    def products(self) -> None:
        """The three matrix products alone, in chunks: the floor of any exact method."""
        d_weight = torch.zeros_like(self.weight)
        with torch.no_grad():
            for start in range(0, len(self.hidden), CHUNK):
                part = self.hidden[start : start + CHUNK]
                z = part @ self.weight.t()
                _ = z @ self.weight
                d_weight.addmm_(z.t(), part)

    def prepare(self, name: str) -> None:
        if name == "dense KD":
            with torch.no_grad():
                self.teacher = F.log_softmax(self.teacher_hidden @ self.weight.t(), 1)

    def variants(self) -> dict[str, Callable[[], None]]:
        return {
            "CE on full logits": self.ce,
            "dense KD": self.dense_kd,
            "naive sparse": self.naive_sparse,
            "ours": self.ours,
            "ours, T = 2": lambda: self.ours(2.0),
            "three products alone": self.products,
        }


def peak_bytes(arguments: argparse.Namespace, name: str) -> int:
    """Growth of the resident set while one variant runs once, in a process of its own."""
    command = [
        sys.executable,
        "-P",
        __file__,
        "--peak",
        name,
        "--rows",
        str(arguments.rows),
        "--vocab",
        str(arguments.vocab),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments.rows, arguments.vocab, arguments.width)
    if arguments.peak:
        problem.prepare(arguments.peak)
        before = resident()
        problem.variants()[arguments.peak]()
        print(resident() - before)
        return
    problem.prepare("dense KD")
    seconds = alternate(problem.variants(), arguments.rounds)
    base = spread(seconds["CE on full logits"])["median"]
    peaks = {name: peak_bytes(arguments, name) for name in seconds}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "cpu_seconds_median": spread(values)["median"],
            "cpu_seconds_least": min(values),
            "cpu_seconds_most": max(values),
            "ratio_to_ce": spread(values)["median"] / base,
            "peak_megabytes": peaks[name] / 1e6,
        }
        for name, values in seconds.items()
    ]
    by_name = {row["name"]: row for row in rows}
    ours = by_name["ours"]

    def times(name: str) -> float:
        return round(float(ours["cpu_seconds_median"]) / float(by_name[name]["cpu_seconds_median"]), 3)

    memory = round(float(ours["peak_megabytes"]) / float(by_name["CE on full logits"]["peak_megabytes"]), 3)
    goals = [
        goal(
            "time / CE on full logits",
            "<= 0.85",
            times("CE on full logits"),
            times("CE on full logits") <= 0.85,
        ),
        goal("peak memory / CE on full logits", "<= 1/7", memory, memory <= 1 / 7),
        goal("time / dense KD", "<= 0.6", times("dense KD"), times("dense KD") <= 0.6),
        goal("time / naive sparse", "<= 0.65", times("naive sparse"), times("naive sparse") <= 0.65),
    ]
    shape = {
        "rows": arguments.rows,
        "vocab": arguments.vocab,
        "width": arguments.width,
        "k": K,
        "dtype": "float32",
    }
    report(rows, goals, arguments.json, shape=shape, gpu="not run", inputs="drawn, not a model's")


if __name__ == "__main__":
    main()
