"""Waiting for writers: a folder may be removed once zarr's own threads no longer write into it."""

from __future__ import annotations

import asyncio
import threading

SETTLING = threading.Lock()  # two that wait for all other tasks would wait for each other


def settle_writes() -> None:
    """Wait for what zarr still has under way: after an error of one file it goes on writing the others in threads of
    its own, and a folder that is removed meanwhile comes back."""
    from zarr.core.sync import sync

    with SETTLING:
        sync(_others_done())


async def _others_done() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
