"""A whole distillation step against the same student's cross-entropy step and against online distillation.

Five variants of one student (SmolLM2-135M from `ddk-pipe demo`'s material is the teacher), on the same windows, in
turn, each a whole step: read or make targets, forward, backward, clip, AdamW.

    ours          ddk-pipe's loop from a cache (pps, tau 0.02), the exact loss: the goals are on this one
    ours_skip     the same with the option distill.gradient_skip: unbiased, no longer exact
    ce_only       transformers' own step (step_variants.py)
    online_dense  ddk-pipe's loop with the teacher in memory and its whole distribution (distill.targets: online)
    online_hf     the usual way: both models' logits whole, torch's kl_div beside transformers' loss

Two students: `half` keeps 15 of the teacher's 30 layers, `seventh` has a seventh of its parameters, which is about the
pairs of the DDK paper. What is saved beside a dense teacher grows with teacher / student.

The threshold of ours_skip is the largest of a few whose gradient of all weights errs by at most 2% of its norm (one
draw, on the first step's windows); a single step's gradient is noisy, its expectation is the exact one.

Goals: ours <= 0.95 x ce_only (1.0 on a GPU); the cheaper of the two online steps >= 2.6 x ours; waiting for data < 2% of ours.

    PYTHONPATH=benchmarks python benchmarks/distill_step.py --teacher FOLDER [--rounds 7] [--tokens 2048]
        [--student half seventh] [--device cpu|cuda] [--json OUT]

Peak memory is taken in a process of its own per variant: resident, or the device's. On a GPU there is no ours_skip, and
all compute in bfloat16 under autocast.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import SEVENTH, Row, fresh_process, goal, peak_growth, report, spread, teacher_option
from step_variants import GAMMA, Steps

from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.common import prepare_cpu

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
MOST_OF_CE = {"cpu": 0.95, "cuda": 1.0}


def make_project(folder: Path, teacher: Path, tokens: int, device: str) -> Path:
    """A manifest over the demo's text, and its cache; whoever trains from it says which student."""
    from ddk_pipe.stages.cache_teacher import cache_teacher
    from ddk_pipe.stages.demo.material import write_texts

    write_texts(folder / "text")
    manifest = {
        "output": "out",
        "domains": {
            name: {"train": f"text/{name}.jsonl"} for name in ("python_code", "documentation", "plays")
        },
        "teacher": {"model": str(teacher), "backend": "hf", "device": device},
        "seq_len": SEQ_LEN,
        "attention": "window",  # as what it is measured against
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


def steps_of(manifest: Path, student: str, variant: str, device: str, skip: float | None = None) -> Steps:
    """That variant's steps; `skip` is the threshold of ours_skip."""
    targets = "online" if variant == "online_dense" else "cache"
    sets = [f"distill.targets={targets}", f"distill.name={student}-{variant}", f"distill.device={device}"]
    sets.append(f"student={json.dumps(STUDENTS[student])}")
    if variant == "ours_skip":
        sets.append(f"distill.gradient_skip={skip}")
    return Steps(load_project(manifest, sets), variant)


def choose_skip(manifest: Path, student: str) -> tuple[float, float]:
    """(threshold of gradient_skip, its gradient's error relative to the exact gradient's norm)."""
    steps = steps_of(manifest, student, "ours", "cpu")
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


def timed(steps: Steps) -> tuple[float, float]:
    """Wall and process-CPU seconds of one step, what it found read."""
    wall, cpu = time.perf_counter(), time.process_time()
    steps.step()
    steps.settle()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(manifest: Path, student: str, device: str, rounds: int) -> tuple[list[Row], list[Row]]:
    """Alternating steps of all variants; rows and goals."""
    names = variants_on(device)
    skip, error = choose_skip(manifest, student) if "ours_skip" in names else (None, None)
    variants = {name: steps_of(manifest, student, name, device, skip) for name in names}
    for steps in variants.values():
        timed(steps)  # warm-up
        steps.waited = 0.0
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, steps in variants.items():
            taken[name].append(timed(steps))
    median = {name: statistics.median(wall for wall, _ in pairs) for name, pairs in taken.items()}
    rows: list[Row] = []
    for name, pairs in taken.items():
        wall, cpu = zip(*pairs, strict=True)
        own = ["--memory-of", name, "--manifest", str(manifest), "--student", student, "--device", device]
        memory = fresh_process(__file__, *own, *(["--skip", str(skip)] if skip is not None else []))
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
    return rows, goals_of(student, device, rows[0], median)


def variants_on(device: str) -> list[str]:
    """gradient_skip works on a CPU only."""
    return [name for name in VARIANTS if device == "cpu" or name != "ours_skip"]


def goals_of(student: str, device: str, ours: Row, median: dict[str, float]) -> list[Row]:
    """Of one student; `ours` is the row of the exact loss."""
    online = min(median["online_dense"], median["online_hf"]) / median["ours"]
    step, wait, most = ours["relative_to_ce_only"], ours["data_wait_share"], MOST_OF_CE[device]
    return [
        goal(f"{student}: whole step / cross-entropy step", f"<= {most}", step, step <= most),
        goal(f"{student}: online step (the cheaper form) / our step", ">= 2.6", online, online >= 2.6),
        goal(f"{student}: waiting for data / our step", "< 0.02", wait, wait < 0.02),
    ]


def memory_of(manifest: Path, student: str, variant: str, device: str, skip: float | None) -> int:
    """Bytes by which one step, its optimizer state there already, exceeds what the loaded models take."""
    steps = steps_of(manifest, student, variant, device, skip)
    timed(steps)
    if device == "cpu":
        return peak_growth(lambda: timed(steps))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed(steps)
    return int(torch.cuda.max_memory_allocated() - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    teacher_option(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048, help="of one step")
    parser.add_argument("--student", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of student and teacher")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS, help="used by the program itself")
    parser.add_argument("--manifest", type=Path, help="used by the program itself")
    parser.add_argument("--skip", type=float, help="used by the program itself")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    prepare_cpu()
    if args.memory_of:
        print(memory_of(args.manifest, args.student[0], args.memory_of, args.device, args.skip))
        return
    folder = Path(tempfile.mkdtemp(prefix="distill-step-"))
    try:
        from ddk_pipe.stages.demo.material import write_teacher

        write_teacher(args.teacher)
        manifest = make_project(folder, args.teacher.resolve(), args.tokens, args.device)
        for student in args.student:
            report(
                *measure(manifest, student, args.device, args.rounds),
                args.json,
                part=student,
                step_device=args.device,
                tokens_per_step=args.tokens,
                seq_len=SEQ_LEN,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
