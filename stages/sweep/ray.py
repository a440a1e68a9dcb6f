"""Runs of a sweep on a Ray cluster: one task each. Manifest, cache and output must be reachable from every node
under the same paths (a shared file system; for the cache also an object store)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.common import connect, say
from ddk_pipe.stages.sweep.run import Job, Outcome, run_one


def run(jobs: Iterator[Job], report: Callable[[Outcome], None], *, workers: int | None, threads: int) -> None:
    """Hand out the jobs, `workers` at once (none: as many as Ray has room for); `report` hears of each as it ends.

    Each takes `threads` CPUs and a GPU, where the cluster has any. A run whose node is lost is started again by Ray
    and continues from its checkpoint; one whose process dies again and again is reported as failed.
    """
    ray = connect("sweep")
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    say(f"sweep: Ray tasks of {threads} CPUs{' and a GPU' if gpus else ''} each")
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=3, scheduling_strategy="SPREAD")(run_one)
    flights: dict[Any, Job] = {}
    try:
        while True:
            while (workers is None or len(flights) < workers) and (job := next(jobs, None)):
                flights[task.remote(job)] = job
            if not flights:
                return
            for call in ray.wait(list(flights), num_returns=1)[0]:
                report(_outcome(ray, call, flights.pop(call)))
    finally:
        for call in flights:
            ray.cancel(call)  # raises KeyboardInterrupt there: the run writes its checkpoint


def _outcome(ray: Any, call: Any, job: Job) -> Outcome:
    try:
        outcome: Outcome = ray.get(call)
        return outcome
    except Exception as problem:
        if isinstance(problem, DdkError):
            raise
        line = " ".join(str(problem).split())[:300]
        return Outcome(job.run.name, "failed", f"{type(problem).__name__}: {line}")
