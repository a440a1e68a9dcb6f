"""Reads ahead in threads of its own, in order, and never more than it was allowed to hold."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")
_Jobs = SimpleQueue[tuple[Future[Any], Any] | None]  # None: leave


def prefetch(
    read: Callable[[Item], Value], items: Iterable[Item], *, ahead: int, threads: int
) -> Iterator[Value]:
    """read(item) of every item, in order, read by `threads` threads at once.

    At most `ahead` values are under way or waiting while one is in use. What read() raises comes up where its value
    would have come, and ends the iteration. Closing the iterator drops what was not begun; nobody waits for reads under
    way, nor does the end of the program.
    """
    if ahead < 1 or threads < 1:
        raise ValueError(f"ahead {ahead}, threads {threads}: both must be at least 1")
    return _prefetch(read, items, ahead, threads)


def _prefetch(
    read: Callable[[Item], Value], items: Iterable[Item], ahead: int, threads: int
) -> Iterator[Value]:
    jobs: _Jobs = SimpleQueue()
    pending: deque[Future[Value]] = deque()
    for _ in range(min(threads, ahead)):
        threading.Thread(target=_work, args=(read, jobs), name="prefetch", daemon=True).start()
    try:
        for item in items:
            pending.append(Future())
            jobs.put((pending[-1], item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for _ in range(min(threads, ahead)):
            jobs.put(None)


def _work(read: Callable[[Any], Any], jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        future, item = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(item))
            except BaseException as problem:  # noqa: BLE001 (raised again where the value is taken)
                future.set_exception(problem)
        del job, future, item  # while waiting for the next job, hold nothing of this one
