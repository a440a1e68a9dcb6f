"""Being told to stop: SIGTERM (a spot instance that goes, a queue's time limit) and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 25.0  # to finish or drop what is under way; whoever sends SIGTERM usually waits 30 s
TERMINATED, INTERRUPTED = 143, 130  # exit statuses: 128 + the signal


class Terminated(KeyboardInterrupt):
    """SIGTERM came: unwinds like Ctrl-C, and ends in exit status 143."""


@contextmanager
def stops_in_time(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Inside, SIGTERM raises Terminated in the main thread. After it or Ctrl-C the process is gone in time, also
    if something (a long forward pass) does not come to an end: what is not committed then is made again."""

    def stop(number: int, frame: FrameType | None) -> None:
        terminated = number == signal.SIGTERM
        _leave_after(grace_seconds, TERMINATED if terminated else INTERRUPTED)
        raise Terminated if terminated else KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_after(seconds: float, status: int) -> None:
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()
