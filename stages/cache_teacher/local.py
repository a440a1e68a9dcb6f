"""Shards on this machine: in this process (the default), or in several, each with a teacher of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from ddk_pipe.pipeline.cache import Shard
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.cache_teacher.maker import DEPTH, Job, ShardMaker, ShardReport, Stopped, portable
from ddk_pipe.stages.common import gone_in_time, grace_seconds, prepare_cpu

Report = Callable[[ShardReport], None]
STARTS_PER_WORKER = 4  # the first and three more: a worker that dies again and again is no accident
LEAVE_SHARE = 0.8  # of the grace, for a worker to write what it has


def run(job: Job, shards: list[Shard], report: Report, advance: Callable[[int, str], None]) -> None:
    """Make the shards here; `report` hears of each as it is committed.

    On an error, Ctrl-C or SIGTERM the shard with the teacher is dropped, those it is done with are committed.
    """
    maker = ShardMaker(job, advance)
    pool = ThreadPoolExecutor(DEPTH, thread_name_prefix="shard")
    futures = [pool.submit(maker.make, shard) for shard in shards]
    reported: set[Future[ShardReport]] = set()
    try:
        for future in as_completed(futures):
            reported.add(future)
            report(future.result())
    finally:
        maker.stop()
        pool.shutdown(cancel_futures=True)
        for future in futures:
            if future not in reported and not future.cancelled() and not future.exception():
                report(future.result())
        maker.close()


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    shards: list[Shard] = field(default_factory=list)  # that it has and has not reported


def run_processes(job: Job, shards: list[Shard], report: Report, *, workers: int) -> None:
    """The same in `workers` processes. The shards of one that dies go to others, and it is started again.

    Raises DdkError if workers keep dying, and whatever a worker's shard fails with.
    """
    places = _places(workers, job.manifest.teacher.vllm.tensor_parallel_size)
    starts = STARTS_PER_WORKER * workers - workers
    queue = deque(shards)
    crew = {index: _start(job, places[index]) for index in range(min(workers, len(shards)))}
    try:
        while queue or any(worker.shards for worker in crew.values()):
            for worker in crew.values():
                _fill(worker, queue)
            index = _heard_from(crew)
            answer = _receive(crew[index])
            if isinstance(answer, ShardReport):
                crew[index].shards.remove(answer.shard)
                report(answer)
            elif answer is not None:
                raise answer
            elif starts == 0:
                raise DdkError(
                    f"worker processes died {STARTS_PER_WORKER * workers - workers + 1} times",
                    hint="see above why (memory?); try fewer --workers or a smaller teacher.batch_windows",
                )
            else:
                starts -= 1
                queue.extendleft(reversed(crew[index].shards))
                crew[index] = _start(job, places[index])
    finally:
        _dismiss(list(crew.values()))


def _places(workers: int, gpus_each: int) -> list[dict[str, str]]:
    """Environment of each worker: its own GPUs where there are any, else its share of the CPU's threads."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    if not torch.cuda.device_count():
        threads = max(1, (os.cpu_count() or 1) // workers)
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * workers
    if workers * gpus_each > len(gpus):
        raise DdkError(
            f"--workers {workers} with {gpus_each} GPUs each, and there are {len(gpus)}",
            hint=f"use at most {len(gpus) // gpus_each} workers",
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * gpus_each : (index + 1) * gpus_each])}
        for index in range(workers)
    ]


def _start(job: Job, place: dict[str, str]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(job, theirs))
    with _environment(place):  # read while torch is imported there
        process.start()
    theirs.close()
    return _Worker(process, ours)


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _fill(worker: _Worker, queue: deque[Shard]) -> None:
    while queue and len(worker.shards) < DEPTH:
        with suppress(OSError):  # it has died: that is heard when it is its turn to answer
            worker.connection.send(queue[0])
        worker.shards.append(queue.popleft())


def _heard_from(crew: dict[int, _Worker]) -> int:
    """A worker that has answered or died."""
    ready = wait([worker.connection for worker in crew.values()])
    return next(index for index, worker in crew.items() if worker.connection in ready)


def _receive(worker: _Worker) -> ShardReport | BaseException | None:
    """A report, the error a shard failed with, or nothing: the worker has died."""
    try:
        answer: ShardReport | BaseException = worker.connection.recv()
        return answer
    except (EOFError, OSError):
        worker.connection.close()
        worker.process.join()
        return None


def _dismiss(crew: list[_Worker]) -> None:
    """Without a connection a worker drops the teacher's shard, writes the others and leaves."""
    for worker in crew:
        worker.connection.close()
    gone_in_time((worker.process for worker in crew), LEAVE_SHARE * grace_seconds())


def _serve(job: Job, connection: Connection) -> None:
    """A worker process: makes the shards it is sent, DEPTH at once, until the connection closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the driver says when to stop
        signal.signal(number, signal.SIG_IGN)
    prepare_cpu()
    lock = threading.Lock()
    try:
        maker = ShardMaker(job)
    except Exception as problem:  # noqa: BLE001 - whatever it is, the driver raises it
        connection.send(portable(problem))
        return

    def answer(shard: Shard) -> None:
        try:
            said: ShardReport | Exception = maker.make(shard)
        except Stopped:
            return
        except Exception as problem:  # noqa: BLE001 - the same
            said = portable(problem)
        with lock, suppress(OSError):
            connection.send(said)

    pool = ThreadPoolExecutor(DEPTH)
    with suppress(EOFError, OSError):
        while True:
            pool.submit(answer, connection.recv())
    maker.stop()
    pool.shutdown(cancel_futures=True)
    maker.close()
