"""A whole training step of a student of 0.6 billion weights against the same student's cross-entropy step in
transformers: bfloat16 autocast, sdpa, fused AdamW, 16,384 tokens a step in two micro batches.

Ours reads a cache from the disk, decodes and copies; transformers' windows lie in memory, without targets. Steps are
timed ten at a time, between two waits for the device: that is how often `distill` reads its losses. Drawn at random:
the text, the teacher behind the cache (tiny, with the same vocabulary) and the student.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import Row, report
from step_variants import Steps

from ddk_pipe.pipeline.losses import chosen_implementation
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.cache_teacher import cache_teacher
from gpu.clock import attempt, busy, free, timed, waits
from gpu.material import Size, draw_teacher, llama, write_manifest
from gpu.verdict import Goal, about, is_missing, ratio, report_missing

FULL = Size(
    vocab=131072,
    seq_len=2048,
    windows=64,
    domains=2,
    batch_windows=8,
    micro_batch_windows=4,
    shape=llama(1, 128, 256, 2, 2),
    student_shape=llama(8, 2048, 5632, 16, 8),
)
TOY = Size(
    vocab=512,
    seq_len=32,
    windows=24,
    domains=2,
    batch_windows=4,
    micro_batch_windows=2,
    shape=llama(1, 32, 64, 2, 2),
    student_shape=llama(2, 32, 64, 2, 2),
)
STEPS = 10  # between two waits, and in the profile
THEIRS, OURS = "ce_only", "ours"  # in the order in which they are run
TIME = Goal("whole step / transformers' cross-entropy step", 1.0)
BUSY = Goal(f"share of {STEPS} steps in which the GPU is busy", 0.97, at_least=True)
WAITS = Goal(f"waits for the GPU in {STEPS} steps", 1)


def run(device: str, path: Path | None, *, rounds: int, peers: Path | None) -> None:
    if is_missing(device):
        report_missing([THEIRS, OURS], [TIME, BUSY, WAITS], path)
        return
    size = FULL if device == "cuda" else TOY
    with tempfile.TemporaryDirectory(prefix="gpu-step-") as folder:
        manifest = make_cache(Path(folder), size, device)
        rows = [
            attempt({"name": name}, partial(measure, manifest, name, device, rounds))
            for name in (THEIRS, OURS)
        ]
    theirs, ours = rows
    goals = [
        TIME.judged(ratio(ours, theirs), device),
        BUSY.judged(ours.get("gpu_busy"), device),
        WAITS.judged(ours.get("waits"), device),
    ]
    tokens = size.batch_windows * size.seq_len
    report(rows, goals, path, tokens_per_step=tokens, seq_len=size.seq_len, vocab=size.vocab, **about(device))


def make_cache(folder: Path, size: Size, device: str) -> Path:
    """The manifest of a project whose cache is there."""
    draw_teacher(folder / "teacher", size, device)
    free(device)
    manifest = write_manifest(folder, folder / "teacher", size, device)
    cache_teacher(load_project(manifest))
    return manifest


def measure(manifest: Path, variant: str, device: str, rounds: int) -> Row:
    """Seconds a step, tokens a second, peak memory with student and optimizer, busy share and waits."""
    free(device)
    steps = Steps(load_project(manifest, [f"distill.name={variant}"]), variant)
    block = ten(steps)
    found = timed(block, device, rounds=rounds, warmup=1)
    for name in ("seconds_median", "seconds_least", "seconds_most"):
        found[name] /= STEPS
    parts, tokens = steps.parts, steps.parts.tokens_per_step
    chosen = {} if variant == THEIRS else {"loss": chosen_implementation(parts.device, parts.compute_dtype())}
    return {
        "parameters": sum(p.numel() for p in parts.student.parameters()),
        **chosen,
        "micro_batches": len(next(steps.data).batches),
        **found,
        "tokens_per_second": tokens / found["seconds_median"],
        "data_wait_share": steps.waited / ((rounds + 1) * STEPS * found["seconds_median"]),
        **busy(block, device),
        **waits(block, device),
    }


def ten(steps: Steps) -> Callable[[], None]:
    """So many steps, and what they found read once."""

    def block() -> None:
        for _ in range(STEPS):
            steps.step()
        steps.settle()

    return block
