"""The teacher through transformers: `cache-teacher` against the model's bare bfloat16 forward pass over the same tokens.

A Llama of 8 billion weights (3 on a card of less than 40 GB), drawn at random, V = 131072, windows of 2,048; TMPDIR
needs 17 GB for it. `bare forward` is what anybody's forward
pass costs, logits included; `decoder` and `output layer` are its two parts; `select` is all that the teacher's thread
does; `cache-teacher` is the command, counted from its first committed shard to its last, so without loading the
model, which its row tells apart. That way round its rate holds for a cache of any size.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, report

from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, head_rows
from ddk_pipe.pipeline.text import TRAIN, labels_of, open_split
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.cache_teacher.stage import Request
from ddk_pipe.stages.teachers import Window
from ddk_pipe.stages.teachers.hf import HfTeacher
from gpu.clock import attempt, busy, free, timed, waits
from gpu.material import Size, draw_teacher, llama, write_manifest
from gpu.verdict import Goal, about, is_missing, ratio, report_missing

FULL = Size(
    vocab=131072,
    seq_len=2048,
    windows=192,
    domains=1,
    batch_windows=8,
    micro_batch_windows=8,
    shape=llama(32, 4096, 14336, 32, 8, tied=False),
)
SMALLER, ROOM = llama(28, 3072, 8192, 24, 8), 40e9  # where memory is less than that, bytes
TOY = Size(
    vocab=512,
    seq_len=32,
    windows=64,
    domains=1,
    batch_windows=4,
    micro_batch_windows=4,
    shape=llama(2, 32, 64, 2, 2, tied=False),
)
BARE, SELECT, COMMAND = "bare forward", "select", "cache-teacher"
RATE = Goal(f"{COMMAND} / {BARE}, positions a second", 0.95, at_least=True)


def run(device: str, path: Path | None, *, rounds: int, peers: Path | None) -> None:
    if is_missing(device):
        report_missing([BARE, SELECT, COMMAND], [RATE], path)
        return
    size = FULL if device == "cuda" else TOY
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < ROOM:
        size = replace(FULL, shape=SMALLER)
    with tempfile.TemporaryDirectory(prefix="gpu-teacher-") as folder:
        rows = measure(Path(folder), size, device, rounds)
    of = {row["name"]: row for row in rows}
    goals = [RATE.judged(ratio(of[COMMAND], of[BARE], "positions_per_second"), device)]
    report(
        rows, goals, path, seq_len=size.seq_len, vocab=size.vocab, batch=size.batch_windows, **about(device)
    )


def measure(folder: Path, size: Size, device: str, rounds: int) -> list[Row]:
    """Model by model: the bare one is gone before the teacher is loaded, and that before the command loads its own."""
    model = draw_teacher(folder / "teacher", size, device)
    weights = model.num_parameters()
    project = load_project(write_manifest(folder, folder / "teacher", size, device))
    rows = bare_rows(model, size, device, rounds)
    del model
    free(device)
    rows.append(attempt({"name": COMMAND}, partial(command, project, folder / "status.jsonl")))
    free(device)
    rows.append(attempt({"name": SELECT}, partial(select, project, size, device, rounds)))
    return [{"parameters": weights, **row} for row in rows]


def bare_rows(model: Any, size: Size, device: str, rounds: int) -> list[Row]:
    """The whole forward pass of one batch, and its two parts."""
    shape = (size.batch_windows, size.seq_len)
    tokens = torch.randint(1, size.vocab, shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)

    def whole() -> None:
        model(input_ids=tokens, use_cache=False)

    def decoder() -> None:
        model.model(input_ids=tokens, use_cache=False)

    def layer() -> None:
        for block in states.split(head_rows(size.vocab)):
            model.lm_head(block)

    calls = ((BARE, whole), ("decoder", decoder), ("output layer", layer))
    return [
        attempt({"name": name}, partial(rated, call, tokens.numel(), device, rounds)) for name, call in calls
    ]


def rated(call: Callable[[], Any], positions: int, device: str, rounds: int) -> Row:
    """Seconds of a call without gradients, and its positions a second."""
    found = timed(torch.inference_mode()(call), device, rounds=rounds, warmup=2)
    return {**found, "positions_per_second": positions / found["seconds_median"]}


def select(project: Project, size: Size, device: str, rounds: int) -> Row:
    """HfTeacher.select of one batch; where its time goes and where it waits."""
    teacher = HfTeacher(Path(project.teacher_model), project.manifest.teacher)
    plan, batch = Plan.of(project.manifest.cache), windows_of(project, size.batch_windows)

    def call() -> Any:
        return teacher.select(batch, plan)

    kept = torch.cat([(one.targets[0].ids >= 0).sum(1) for one in call()])
    found = rated(call, sum(len(window.tokens) for window in batch), device, rounds)
    about_it = {"ids_a_position": float(kept.double().mean())}
    return {**found, **about_it, **busy(call, device), **waits(call, device)}


def windows_of(project: Project, most: int) -> list[Window]:
    """The first training windows of the first domain."""
    name = next(iter(project.manifest.domains))
    split = open_split(project.tokens / name / TRAIN)
    found = []
    for index in range(most):
        tokens, mask = split.window(index)
        found.append(Window(f"{name}/{TRAIN}/0/{index}", tokens, labels_of(tokens, mask, no_label=NO_LABEL)))
    return found


def command(project: Project, status: Path) -> Row:
    """`cache-teacher` from beginning to end; its rate between the first and the last commit of a full shard."""
    outcome = cache_teacher(project, Request(status=status))
    shards = [
        event for event in map(json.loads, status.read_text().splitlines()) if event["event"] == "shard"
    ]
    full = [event for event in shards if f"/{TRAIN}/" in event["shard"]]
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in full]
    size = project.manifest.cache.shard_windows * project.manifest.seq_len
    return {
        "positions": outcome.positions,
        "whole_seconds": outcome.seconds,
        "positions_per_second": (len(full) - 1) * size / (times[-1] - times[0]),
        "teacher_waited_seconds": sum(event["teacher_waited_seconds"] for event in shards),
        "bytes_per_position": outcome.bytes_per_position,
    }
