"""Teachers for one selection; vLLM in a process of its own, for it reads its environment once, and gives memory back
only at the end."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.targets import Plan, Selected
from ddk_pipe.stages.common import prepare_cpu
from ddk_pipe.stages.teachers import Window, open_teacher
from ddk_pipe.stages.teachers.vllm import engine
from ddk_pipe.stages.teachers.vllm.worker import Packed, pack, unpack

EXTENSION = engine.EXTENSION


def select_here(
    folder: Path,
    options: manifest.Teacher,
    windows: list[Window],
    plans: list[Plan],
    *,
    vocab_size: int | None = None,
) -> list[list[Selected]]:
    """What a teacher in this process selects, for each plan."""
    opened = open_teacher(
        folder, options, backend=options.backend, seq_len=len(windows[0].tokens), vocab_size=vocab_size
    )
    step = options.batch_windows
    try:
        return [
            [
                selected
                for start in range(0, len(windows), step)
                for selected in opened.select(windows[start : start + step], plan)
            ]
            for plan in plans
        ]
    finally:
        opened.close()


def select_elsewhere(
    folder: Path,
    options: manifest.Teacher,
    windows: list[Window],
    plans: list[Plan],
    *,
    vocab_size: int | None = None,
    environment: dict[str, str] | None = None,
    extension: str = EXTENSION,
) -> list[list[Selected]]:
    """As `select_here`, by a new process. `extension`: of vLLM's worker, in place of ours."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        job = pool.submit(_select, folder, options, windows, plans, vocab_size, environment or {}, extension)
        return [[unpack(packed) for packed in column] for column in job.result()]


def _select(
    folder: Path,
    options: manifest.Teacher,
    windows: list[Window],
    plans: list[Plan],
    vocab_size: int | None,
    environment: dict[str, str],
    extension: str,
) -> list[list[Packed]]:
    os.environ.update(environment)
    engine.EXTENSION = extension
    prepare_cpu()
    found = select_here(folder, options, windows, plans, vocab_size=vocab_size)
    return [[pack(selected) for selected in column] for column in found]
