from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from ddk_pipe.pipeline.storage import prefetch


def workers() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def wait_until_gone() -> None:
    deadline = time.monotonic() + 5
    while workers() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not workers()


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("ahead", [1, 2, 5, 100])
def test_values_come_in_order(threads: int, ahead: int) -> None:
    def read(item: int) -> int:
        time.sleep(0.002 * (item % 3))  # later ones are often done first
        return item * item

    assert list(prefetch(read, range(20), ahead=ahead, threads=threads)) == [n * n for n in range(20)]
    assert list(prefetch(read, [], ahead=ahead, threads=threads)) == []
    wait_until_gone()


def test_reads_overlap_with_the_consumer_and_with_each_other() -> None:
    meeting = threading.Barrier(4, timeout=10)
    values = prefetch(lambda item: (meeting.wait(), item)[1], range(8), ahead=4, threads=4)
    assert list(values) == list(range(8))  # no barrier opens unless four reads are under way


class Value:
    """Something whose lifetime can be watched."""


def test_never_more_than_allowed_is_held() -> None:
    alive: weakref.WeakSet[Value] = weakref.WeakSet()
    most, lock = 0, threading.Lock()

    def read(item: int) -> Value:
        nonlocal most
        value = Value()
        with lock:
            alive.add(value)
            most = max(most, len(alive))
        return value

    for value in prefetch(read, range(200), ahead=3, threads=2):
        time.sleep(0.0005)
        del value
    assert most <= 3 + 2  # the one in use, and one that a thread is handing over
    gc.collect()
    assert not alive


def test_items_are_taken_only_as_values_are() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    values = prefetch(lambda item: item, items(), ahead=4, threads=2)
    assert taken == 0
    assert next(values) == 1 and taken == 4
    assert next(values) == 2 and taken == 5


def test_an_error_comes_where_its_value_would_have_come() -> None:
    def read(item: int) -> int:
        if item == 3:
            raise ValueError("window 3 is damaged")
        return item

    got: list[int] = []
    with pytest.raises(ValueError, match="window 3 is damaged"):
        got.extend(prefetch(read, range(10), ahead=8, threads=4))
    assert got == [0, 1, 2]
    wait_until_gone()


def test_closing_early_drops_what_was_not_begun() -> None:
    begun, go = [], threading.Event()

    def read(item: int) -> int:
        begun.append(item)
        if item:
            go.wait(10)
        return item

    values = prefetch(read, range(100), ahead=50, threads=2)
    assert next(values) == 0
    before = time.monotonic()
    values.close()  # type: ignore[attr-defined]
    assert time.monotonic() - before < 1  # nobody waits for reads under way
    go.set()
    wait_until_gone()
    assert len(begun) <= 3


def test_an_error_in_the_consumer_ends_the_threads() -> None:
    with pytest.raises(KeyboardInterrupt):
        for _ in prefetch(lambda item: item, range(100), ahead=5, threads=2):
            raise KeyboardInterrupt
    gc.collect()
    wait_until_gone()


def test_the_program_ends_at_once_with_reads_under_way() -> None:
    code = (
        "import time\n"
        "from ddk_pipe.pipeline.storage.read_ahead import prefetch\n"
        "values = prefetch(lambda n: time.sleep(60 * n), range(9), ahead=4, threads=2)\n"
        "next(values)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.parametrize(("ahead", "threads"), [(0, 1), (1, 0)])
def test_wrong_settings(ahead: int, threads: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        prefetch(lambda item: item, [], ahead=ahead, threads=threads)
