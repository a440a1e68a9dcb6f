"""Work on shards one after the other in this process (the default engine)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ddk_pipe.pipeline.cache import Shard


def run(shards: list[Shard], work: Callable[[Shard], None]) -> None:
    """Call `work` for each shard. SIGTERM acts like Ctrl-C: the shard under way is dropped, the rest is kept."""
    with _sigterm_interrupts():
        for shard in shards:
            work(shard)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
