"""Being told to stop: SIGTERM (a spot instance that goes, a queue's time limit), Ctrl-C, and a sweep's verdict."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.common.progress import console

GRACE = "DDK_PIPE_GRACE_SECONDS"  # of the environment: who sends SIGTERM says how long they wait, not the manifest
GRACE_SECONDS = 25.0  # to finish or drop what is under way; whoever sends SIGTERM usually waits 30 s
MOST_GRACE_SECONDS = 7 * 24 * 3600.0
DROPPED = "what was not finished by then is made again"
TERMINATED, INTERRUPTED = 143, 130  # exit statuses: 128 + the signal


class Terminated(KeyboardInterrupt):
    """SIGTERM came: unwinds like Ctrl-C, and ends in exit status 143."""


class StoppedEarly(Exception):
    """A run was found not worth its other steps; its checkpoint is of the step `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped early at step {step}")
        self.step = step


def grace_seconds() -> float:
    """How long a command may take to stop, in seconds: DDK_PIPE_GRACE_SECONDS of the environment, else GRACE_SECONDS.

    Raises DdkError for a value that is no such number.
    """
    text = os.environ.get(GRACE, "").strip()
    try:
        seconds = float(text) if text else GRACE_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MOST_GRACE_SECONDS:
        raise DdkError(
            f"{GRACE}={text[:40]}: not a number of seconds above 0",
            hint=f"set it to somewhat less than what is waited after SIGTERM, or leave it out ({GRACE_SECONDS:g})",
        )
    return seconds


@contextmanager
def stops_in_time(seconds: float | None = None) -> Iterator[None]:
    """Inside, SIGTERM raises Terminated in the main thread. After it or Ctrl-C the process is gone in time (`seconds`;
    None: `grace_seconds()`), also if something (a long forward pass) does not come to an end: what is not committed
    then is made again."""
    grace = grace_seconds() if seconds is None else seconds

    def stop(number: int, frame: FrameType | None) -> None:
        terminated = number == signal.SIGTERM
        _leave_after(grace, TERMINATED if terminated else INTERRUPTED)
        raise Terminated if terminated else KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopFlag:
    """Set by the first SIGTERM or Ctrl-C; work looks at it where it can stop with nothing half done."""

    def __init__(self) -> None:
        self.asked = False
        self.terminated = False
        self.agreed = False  # what every process knows: never act on `asked` where others wait for this one
        self.grace = grace_seconds()
        self.last_words: Callable[[], str] = lambda: (
            DROPPED
        )  # of a process that has not come to an end by then

    def set(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler. The second Ctrl-C stops at once."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.terminated = True, number == signal.SIGTERM
        if self.terminated:
            _leave_after(self.grace, TERMINATED, lambda: self.last_words())

    def anywhere(self, add_up: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> bool:
        """True, on every process at the same call, if one of them was asked to stop; `add_up` sums over them."""
        asked = add_up(np.array([float(self.asked), float(self.terminated)]))
        self.agreed, self.terminated = bool(asked[0] > 0), bool(asked[1] > 0)
        return self.agreed

    def leave(self) -> NoReturn:
        """Raise what the signal stands for."""
        raise Terminated if self.terminated else KeyboardInterrupt


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Inside, SIGTERM and Ctrl-C set a flag. Outside the main thread, where Python allows no handler, nothing does."""
    flag = StopFlag()
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, flag.set) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def gone_in_time(processes: Iterable[BaseProcess], seconds: float) -> None:
    """Wait for processes that were told to leave, all together so long; those that stay are killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _leave_after(seconds: float, status: int, last_words: Callable[[], str] = lambda: DROPPED) -> None:
    """End the process then, whatever it does: its last line says so, and what is left."""

    def leave() -> None:
        with suppress(Exception):  # it ends, whatever there is to say
            if not console.quiet:
                line = f"ddk-pipe: not stopped within {seconds:g} s ({GRACE}), so ended; {last_words()}"
                os.write(2, f"{' '.join(line.split())}\n".encode())  # no lock that a busy thread may hold
        os._exit(status)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
