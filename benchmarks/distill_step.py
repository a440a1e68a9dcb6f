"""A whole distillation step against the same student's cross-entropy step and against online distillation.

Five variants of one student (SmolLM2-135M from `ddk-pipe demo`'s material is the teacher), on the same windows, in
turn, each a whole step: read or make targets, forward, backward, clip, AdamW.

    ours          ddk-pipe's loop from a cache (pps, tau 0.02), the exact loss: the goals are on this one
    ours_skip     the same with the option distill.gradient_skip: unbiased, no longer exact
    ce_only       transformers' own step: model(input_ids, labels).loss, the same AdamW and clipping, windows in memory
    online_dense  ddk-pipe's loop with the teacher in memory and its whole distribution (distill.targets: online)
    online_hf     the usual way: both models' logits whole, torch's kl_div beside transformers' loss

Two students: `half` keeps 15 of the teacher's 30 layers, `seventh` has a seventh of its parameters, which is about the
pairs of the DDK paper. What is saved beside a dense teacher grows with teacher / student.

The threshold of ours_skip is the largest of a few whose gradient of all weights errs by at most 2% of its norm (one
draw, on the first step's windows); a single step's gradient is noisy, its expectation is the exact one.

Goals: ours <= 0.95 x ce_only; the cheaper of the two online steps >= 2.6 x ours; waiting for data < 2% of ours.

    PYTHONPATH=benchmarks python benchmarks/distill_step.py --teacher FOLDER [--rounds 7] [--tokens 2048]
        [--student half seventh] [--json OUT]

Peak memory is taken in a process of its own per variant.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import SEVENTH, Row, fresh_process, goal, peak_growth, report, spread, teacher_option

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.pipeline.text import TRAIN, open_split
from ddk_pipe.stages.common import prepare_cpu
from ddk_pipe.stages.distill import Batch
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.sources import _bare
from ddk_pipe.stages.distill.windows import steps_of_windows

VARIANTS = ("ours", "ours_skip", "ce_only", "online_dense", "online_hf")
SKIPS, LARGEST_ERROR = (
    (2e-3, 1e-3, 5e-4, 2e-4, 1e-4),
    0.02,
)  # thresholds tried, and what the gradient may err by
STUDENTS: dict[str, Row] = {
    "half": {"keep_layers": [round(index * 29 / 14) for index in range(15)]},  # of 30
    "seventh": SEVENTH,
}
SEQ_LEN = 512
GAMMA = 1.0


def make_project(folder: Path, teacher: Path, tokens: int) -> Path:
    """A manifest over the demo's text, and its cache; whoever trains from it says which student."""
    from ddk_pipe.stages.cache_teacher import cache_teacher
    from ddk_pipe.stages.demo.material import write_texts

    write_texts(folder / "text")
    manifest = {
        "output": "out",
        "domains": {
            name: {"train": f"text/{name}.jsonl"} for name in ("python_code", "documentation", "plays")
        },
        "teacher": {"model": str(teacher), "backend": "hf"},
        "seq_len": SEQ_LEN,
        "prepare": {"max_train_windows": 12, "max_validation_windows": 1, "validation_fraction": 0.2},
        "cache": {"shard_windows": 8},
        "distill": {
            "steps": 1000,
            "interval_steps": 1000,
            "batch_tokens": tokens,
            "micro_batch_windows": max(1, tokens // SEQ_LEN),
            "validation_windows": 1,
            "gamma": GAMMA,
        },
    }
    path = folder / "manifest.yaml"
    path.write_text(json.dumps(manifest))
    cache_teacher(load_project(path))
    return path


class Steps:
    """One variant's steps; each call of `step` trains on the next windows of the same order."""

    def __init__(self, manifest: Path, student: str, variant: str, skip: float | None = None) -> None:
        targets = "online" if variant == "online_dense" else "cache"
        sets = [f"distill.targets={targets}", f"distill.name={student}-{variant}"]
        sets.append(f"student={json.dumps(STUDENTS[student])}")
        if variant == "ours_skip":
            sets.append(f"distill.gradient_skip={skip}")
        self.project: Project = load_project(manifest, sets)
        self.parts, self.variant = Parts(self.project), variant
        if variant in ("ce_only", "online_hf"):
            self.parts.source.read = _in_memory(self.project)  # type: ignore[method-assign, assignment]
        shares = [1 / len(self.parts.domains)] * len(self.parts.domains)
        self.position = Position(0, 0.0, shares, shares, self.parts.sampler.state_dict(), "")
        self.data = steps_of_windows(self.parts, self.position)
        self.teacher = _hf_teacher(self.project) if variant == "online_hf" else None
        self.waited = 0.0

    def step(self) -> None:
        """One step, its data included."""
        data = next(self.data)
        self.waited += data.waited_seconds
        if self.variant in ("ours", "ours_skip", "online_dense"):
            self.parts.stepper.step(self.position.step, data)
            list(self.parts.stepper.settle())
        else:
            self._transformers_step(data.batches)

    def _transformers_step(self, batches: list[Batch]) -> None:
        device = self.parts.device
        tokens = torch.cat([batch.tokens for batch in batches]).to(device)
        labels = torch.cat([batch.labels for batch in batches]).to(device)
        # transformers shifts by itself: the label of position t is token t + 1
        shifted = torch.full_like(labels, NO_LABEL)
        shifted[:, 1:] = labels[:, :-1]
        lm, optimizer = self.parts.student.lm.train(), self.parts.optimizer
        found = lm(input_ids=tokens, labels=shifted, use_cache=False)
        loss = found.loss
        if self.teacher is not None:
            loss = loss + GAMMA * self._kl(found.logits, tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _kl(self, logits: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            wanted = self.teacher(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        live = labels != NO_LABEL
        q = logits.log_softmax(-1)[live]
        kl = torch.nn.functional.kl_div(q, wanted[live], reduction="sum", log_target=True)
        return kl / live.sum()


def choose_skip(manifest: Path, student: str) -> tuple[float, float]:
    """(threshold of gradient_skip, its gradient's error relative to the exact gradient's norm)."""
    steps = Steps(manifest, student, "ours")
    batches, stepper = next(steps.data).batches, steps.parts.stepper
    labels = float(sum(len(batch.rows.live) for batch in batches))
    exact_options = stepper.options

    def gradient(threshold: float | None) -> list[torch.Tensor]:
        steps.parts.optimizer.zero_grad(set_to_none=True)
        stepper.options = exact_options.model_copy(update={"gradient_skip": threshold})
        stepper._backward(0, batches, labels, GAMMA)
        return [p.grad.clone() for p in steps.parts.student.parameters() if p.grad is not None]

    def norm(tensors: list[torch.Tensor]) -> float:
        return float(torch.stack([tensor.norm() for tensor in tensors]).norm())

    exact, error = gradient(None), float("inf")
    for threshold in SKIPS:
        error = norm([mine - true for mine, true in zip(gradient(threshold), exact, strict=True)]) / norm(
            exact
        )
        print(f"gradient_skip {threshold}: the gradient errs by {error:.2%}", flush=True)
        if error <= LARGEST_ERROR:
            break
    return threshold, error


def _in_memory(project: Project) -> Callable[[int, int], CachedWindow]:
    """Training windows without targets, read before: the peers must not pay for decoding what they do not use."""
    names = list(project.manifest.domains)
    splits = [open_split(project.tokens / name / TRAIN) for name in names]
    windows = [[_bare(split, window) for window in range(split.facts.windows)] for split in splits]
    return lambda domain, window: windows[domain][window]


def _hf_teacher(project: Project) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(project.teacher_model, dtype=torch.float32).eval()


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Wall and process-CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(manifest: Path, student: str, rounds: int) -> tuple[list[Row], list[Row]]:
    """Alternating steps of all variants; rows and goals."""
    skip, error = choose_skip(manifest, student)
    variants = {name: Steps(manifest, student, name, skip) for name in VARIANTS}
    for steps in variants.values():
        steps.step()  # warm-up
        steps.waited = 0.0
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, steps in variants.items():
            taken[name].append(timed(steps.step))
    median = {name: statistics.median(wall for wall, _ in pairs) for name, pairs in taken.items()}
    rows: list[Row] = []
    for name, pairs in taken.items():
        wall, cpu = zip(*pairs, strict=True)
        own = ("--memory-of", name, "--manifest", str(manifest), "--skip", str(skip), "--student", student)
        memory = fresh_process(__file__, *own)
        option = {"gradient_skip": skip, "gradient_error": error} if name == "ours_skip" else {}
        rows.append(
            {
                "student": student,
                "student_parameters": sum(p.numel() for p in variants[name].parts.student.parameters()),
                "variant": name,
                **option,
                **{f"wall_seconds_{key}": value for key, value in spread(list(wall)).items()},
                **{f"cpu_seconds_{key}": value for key, value in spread(list(cpu)).items()},
                "relative_to_ce_only": median[name] / median["ce_only"],
                "data_wait_share": variants[name].waited / sum(wall),
                "peak_growth_bytes_of_a_step": memory,
            }
        )
    ours = rows[0]
    online = min(median["online_dense"], median["online_hf"]) / median["ours"]
    goals = [
        goal(
            f"{student}: whole step / cross-entropy step",
            "<= 0.95",
            ours["relative_to_ce_only"],
            ours["relative_to_ce_only"] <= 0.95,
        ),
        goal(f"{student}: online step (the cheaper form) / our step", ">= 2.6", online, online >= 2.6),
        goal(
            f"{student}: waiting for data / our step",
            "< 0.02",
            ours["data_wait_share"],
            ours["data_wait_share"] < 0.02,
        ),
    ]
    return rows, goals


def memory_of(manifest: Path, student: str, variant: str, skip: float | None) -> int:
    """Bytes by which one step, its optimizer state there already, exceeds what the loaded models take."""
    steps = Steps(manifest, student, variant, skip)
    steps.step()
    return peak_growth(steps.step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    teacher_option(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048, help="of one step")
    parser.add_argument("--student", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS, help="used by the program itself")
    parser.add_argument("--manifest", type=Path, help="used by the program itself")
    parser.add_argument("--skip", type=float, help="used by the program itself")
    args = parser.parse_args()
    prepare_cpu()
    if args.memory_of:
        print(memory_of(args.manifest, args.student[0], args.memory_of, args.skip))
        return
    folder = Path(tempfile.mkdtemp(prefix="distill-step-"))
    try:
        from ddk_pipe.stages.demo.material import write_teacher

        write_teacher(args.teacher)
        manifest = make_project(folder, args.teacher.resolve(), args.tokens)
        for student in args.student:
            report(
                *measure(manifest, student, args.rounds),
                args.json,
                part=student,
                tokens_per_step=args.tokens,
                seq_len=SEQ_LEN,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
