"""How the engines scale from one worker to two, with a teacher that only sleeps: what the engines themselves cost.

    PYTHONPATH=benchmarks python benchmarks/teacher_scaling.py --json benchmarks/results/teacher.json [--engine ray]

The rate counts from the moment every worker has made a shard: starting a worker is not in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Row, goal, report

from ddk_pipe.stages.common import prepare_cpu

prepare_cpu()

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache import CacheSpec, CacheWriter, Shard, SplitSize, all_shards
from ddk_pipe.pipeline.manifest import Manifest, Project
from ddk_pipe.pipeline.targets import Plan, Ranks, Selected, select_logits
from ddk_pipe.pipeline.text import TRAIN
from ddk_pipe.stages.cache_teacher import local
from ddk_pipe.stages.cache_teacher import maker as maker_module
from ddk_pipe.stages.cache_teacher.maker import Job, ShardReport
from ddk_pipe.stages.teachers import Teacher, Window

VOCAB, SEQ_LEN, WINDOWS = 512, 64, 4
PLAN = Plan("pps", 0.05, 64, 256, 50, (1.0,), 0)


@dataclass(frozen=True)
class Sleeper:
    """A teacher that takes its time: random predictions after `seconds` for each batch."""

    seconds: float
    vocab_size: int = VOCAB

    def describe(self) -> dict[str, Any]:
        return {"engine": "sleep"}

    def select(self, windows: list[Window], plan: Plan) -> list[Selected]:
        time.sleep(self.seconds)
        return [self._window(window, plan) for window in windows]

    def _window(self, window: Window, plan: Plan) -> Selected:
        logits = torch.zeros(len(window.tokens), VOCAB)
        logits[:, :4] = 8.0
        uniforms = torch.from_numpy(plan.uniforms(window.key, len(window.tokens)))
        return select_logits(logits, torch.from_numpy(window.labels), plan, uniforms)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Opener:
    """Opens a Sleeper, and the text it needs none of."""

    seconds: float

    def __call__(self, *_: Any, **__: Any) -> Teacher:
        setattr(maker_module, "open_split", lambda _: Text())  # noqa: B010 - in whatever process this is
        return Sleeper(self.seconds)


class Text:
    """Windows of zeros."""

    def window(self, which: slice) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        shape = (which.stop - which.start, SEQ_LEN)
        return np.zeros(shape, np.int64), np.ones(shape, np.uint8)

    def starts(self, which: slice) -> None:
        """Each window is seen whole."""


def job_in(folder: Path, shards: int, seconds: float) -> Job:
    """A cache of so many shards of one batch each."""
    manifest = Manifest.model_validate(
        {
            "output": "out",
            "domains": {"text": {"train": "none"}},
            "teacher": {"model": "none", "batch_windows": WINDOWS},
            "seq_len": SEQ_LEN,
        }
    )
    sizes = {"text": {TRAIN: SplitSize(shards * WINDOWS, WINDOWS, "benchmark")}}
    spec = CacheSpec({}, "benchmark", VOCAB, SEQ_LEN, PLAN, sizes)
    CacheWriter(Project(manifest, folder).cache, spec).add_ranks("text", Ranks.fit(np.ones(VOCAB)))
    return Job(manifest, folder, spec, folder, "sleep", Opener(seconds))


def shards_per_second(engine: str, workers: int, shards: int, seconds: float) -> float:
    """Of one run, from the moment every worker has made its first."""
    times: list[float] = []

    def note(_: ShardReport) -> None:
        times.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        job = job_in(Path(folder).resolve(), shards, seconds)
        work: list[Shard] = all_shards(job.spec)
        if engine == "ray":
            from ddk_pipe.stages.cache_teacher import ray

            ray.run(job, work, note, workers=workers)
        else:
            local.run_processes(job, work, note, workers=workers)
    skip = shards // 2 - 1  # by then all are at work; shards // 2 intervals, whole rounds of two workers
    return (len(times) - skip - 1) / (times[-1] - times[skip])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=1.0, help="that the teacher sleeps for each shard")
    options = parser.parse_args()
    rates = {
        workers: shards_per_second(options.engine, workers, options.shards, options.seconds)
        for workers in (1, 2)
    }
    rows: list[Row] = [
        {"name": f"{options.engine}, {workers} workers", "shards_per_second": rate}
        for workers, rate in rates.items()
    ]
    ratio = rates[2] / rates[1]
    goals = [
        goal(f"{options.engine}: 1 to 2 workers on a teacher that sleeps", ">= 1.9", ratio, ratio >= 1.9)
    ]
    report(rows, goals, options.json, part=f"scaling {options.engine}", seconds=options.seconds)


if __name__ == "__main__":
    main()
