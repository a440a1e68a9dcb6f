"""Shards on a Ray cluster: plain actors, each with a teacher, over the shards that are not committed.

Tokens and cache must be reachable from every node under the same path or address (a shared file system; for the
cache also an object store). RAY_ADDRESS names the cluster; without it Ray starts on this machine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ddk_pipe.pipeline.cache import Shard
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.cache_teacher.maker import DEPTH, Job, ShardMaker, ShardReport, portable
from ddk_pipe.stages.common import MAX_RESTARTS, connect, grace_seconds, prepare_cpu, say

LEAVE_SHARE = 0.8  # of the grace, for actors to write what they have


class Actor:
    """A teacher somewhere on the cluster; Ray calls `make` from up to DEPTH threads."""

    def __init__(self, job: Job) -> None:
        prepare_cpu()
        self.maker: ShardMaker | None = None
        self.problem: Exception | None = None
        try:
            self.maker = ShardMaker(job)
        except Exception as problem:  # noqa: BLE001 - raised by `make`: an actor that cannot start has no last words
            self.problem = portable(problem)

    def make(self, shard: Shard) -> ShardReport:
        if self.maker is None:
            raise self.problem or RuntimeError("no teacher")
        return self.maker.make(shard)

    def stop(self) -> None:
        if self.maker is not None:
            self.maker.stop()


@dataclass
class _Worker:
    handle: Any  # of the actor
    flights: dict[Any, Shard] = field(default_factory=dict)  # calls that have not returned, oldest first


def run(job: Job, shards: list[Shard], report: Callable[[ShardReport], None], *, workers: int | None) -> None:
    """Make the shards on `workers` actors (none: as many as the cluster has room for now).

    Ray restarts an actor that dies and repeats its calls. Actors that find nothing more to do repeat what others
    still have: a node that went away delays nobody, and of two that make a shard one commits it.
    Raises DdkError if all actors are gone for good, and whatever a shard fails with.
    """
    ray = connect("cache-teacher")
    resources = ray.cluster_resources()
    gpus = job.manifest.teacher.vllm.tensor_parallel_size if resources.get("GPU") else 0
    room = int(resources["GPU"]) // gpus if gpus else len([node for node in ray.nodes() if node["Alive"]])
    count = min(workers or max(1, room), len(shards))
    say(f"cache-teacher: {count} Ray actors{f' of {gpus} GPUs' if gpus else ''}; lost ones are replaced")
    kind = ray.remote(
        num_cpus=1,
        num_gpus=gpus,
        max_restarts=MAX_RESTARTS,
        max_task_retries=-1,
        max_concurrency=DEPTH + 1,  # stop() comes through while all of them are busy
        scheduling_strategy="SPREAD",
    )(Actor)
    crew = [_Worker(kind.remote(job)) for _ in range(count)]
    try:
        _hand_out(ray, crew, shards, report)
    finally:
        _dismiss(ray, crew)


def _hand_out(
    ray: Any, crew: list[_Worker], shards: list[Shard], report: Callable[[ShardReport], None]
) -> None:
    queue, left = deque(shards), set(shards)
    while left:
        for worker in crew:
            _fill(worker, queue, left)
        owners = {call: worker for worker in crew for call in worker.flights}
        if not owners:
            raise DdkError(
                "all Ray actors died", hint="see Ray's logs; run the same command again to continue"
            )
        for call in ray.wait(list(owners), num_returns=1)[0]:
            worker = owners[call]
            shard = worker.flights.pop(call)
            try:
                answer = ray.get(call)
            except ray.exceptions.RayActorError:  # restarted too often, or its node went and none came
                crew.remove(worker)
                queue.extend(lost for lost in (shard, *worker.flights.values()) if lost in left)
                break
            except ray.exceptions.RayTaskError as problem:
                raise problem.cause if isinstance(problem.cause, DdkError) else problem from None
            if shard in left:
                left.remove(shard)
                report(answer)


def _fill(worker: _Worker, queue: deque[Shard], left: set[Shard]) -> None:
    """Up to DEPTH shards; where none is queued and the worker is idle, one that another still has."""
    while queue and len(worker.flights) < DEPTH:
        _call(worker, queue.popleft())
    if left and not worker.flights:
        _call(worker, min(left, key=lambda shard: (shard.domain, shard.split, shard.number)))


def _call(worker: _Worker, shard: Shard) -> None:
    worker.flights[worker.handle.make.remote(shard)] = shard


def _dismiss(ray: Any, crew: list[_Worker]) -> None:
    """Let actors write what their teachers are done with, then end them."""
    calls = [call for worker in crew for call in worker.flights]
    for worker in crew:
        worker.handle.stop.options(max_task_retries=0).remote()
    deadline = time.monotonic() + (LEAVE_SHARE * grace_seconds() if calls else 0.0)
    with suppress(Exception):
        ray.wait(calls, num_returns=len(calls), timeout=max(0.0, deadline - time.monotonic()))
    for worker in crew:
        with suppress(Exception):
            ray.kill(worker.handle)
