"""What every process of a run would tell the user is told once, and never by nobody."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch

from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common import StopFlag, stop_flag

ASK_SECONDS = (
    5.0  # for each answer of torchrun's store, and for the one that is to say a line to have said it
)
POLL_SECONDS = 0.05

_meeting: list[str] = []


def meet(token: str) -> None:
    """Name this run, the same on all its processes and like no other run's.

    torchrun's store outlives a run: it is there for the next one in the same processes, and for those that an elastic
    torchrun starts anew. What an earlier run has said must not silence this one.
    """
    _meeting[:] = [token]


def say_once(line: str, say: Callable[[str], None]) -> None:
    """Call say(line), unless another process of this run has said the very same; returns once it is said.

    They ask torchrun's store, which outlives them all; the first process's own would be gone with it. Who asks first
    says the line and then notes there that it has. The others wait for that note: whoever was to write it may have
    been killed before its first word. Where no answer or no note comes in time they say it themselves: a line
    said twice is better than one that nobody says. SIGTERM ends the wait, not the saying, since torchrun sends it
    to all as soon as one is gone.
    """
    key = f"ddk_pipe/said/{_this_run()}/{durable.digest(line.encode())}"
    note = f"{key}/done"
    with stop_flag() as stop:
        store = _in_time(_open_store)
        asked = 0 if store is None else _in_time(lambda: store.add(key, 1)) or 0
        if asked > 1 and _noted(store, note, stop):
            return
        say(line)
        if asked:
            _in_time(lambda: store.set(note, ""))


def _this_run() -> str:
    return _meeting[0] if _meeting else f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _open_store() -> Any:
    """torchrun's; None where it has none or something else started the processes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=ASK_SECONDS),
    )


def _noted(store: Any, note: str, stop: StopFlag) -> bool:
    """True once the note is there; False if it does not come in time, or if this process is to stop."""
    end = time.monotonic() + ASK_SECONDS
    while not stop.asked and time.monotonic() < end:
        if _in_time(lambda: store.check([note])):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _in_time(ask: Callable[[], Any]) -> Any:
    """What ask() returns; None if it raises or takes too long.

    In a thread, because torch's client waits for ever, deaf to signals, for a store that takes calls and never answers.
    """
    answers: SimpleQueue[Any] = SimpleQueue()

    def answer() -> None:
        try:
            answers.put(ask())
        except (RuntimeError, KeyError, ValueError):  # torch's of a store; an environment that names none
            answers.put(None)

    threading.Thread(target=answer, daemon=True).start()
    try:
        return answers.get(timeout=ASK_SECONDS)
    except Empty:
        return None
