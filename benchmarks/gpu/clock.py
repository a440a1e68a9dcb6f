"""Seconds, memory, busy time and waits of a call on a device."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import Row

Call = Callable[[], Any]


def synchronise(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Call, device: str, *, rounds: int, warmup: int = 3) -> Row:
    """Wall-clock seconds of a call between two synchronisations, and the peak of the device's memory over all of them,
    beyond what was held before; the warm-up counts for memory alone."""
    free(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(rounds):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    row: Row = {
        "seconds_median": statistics.median(seconds),
        "seconds_least": min(seconds),
        "seconds_most": max(seconds),
    }
    if device == "cuda":
        row["peak_megabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        row["held_megabytes"] = before / 1e6
    return row


def free(device: str) -> None:
    """Give back what nobody holds any more, and begin to watch for the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """The row with what was measured, or with why it was not: the next variant may work."""
    try:
        return {**row, **measure()}
    except Exception as reason:  # noqa: BLE001 - out of memory, a package that is missing, a kernel that fails
        said = f"{type(reason).__name__}: {reason}".strip().splitlines()[0]
        return {**row, "not run": said[:300]}


def busy(call: Call, device: str, *, most: int = 12) -> Row:
    """The share of one call's wall-clock time in which the GPU did something, and its costliest kernels.

    The profiler records kernels and copies alone, not the host's operations; what it costs the host still counts
    against us.
    """
    if device == "cpu":
        return {"gpu_busy": None}
    from torch.profiler import ProfilerActivity, profile

    synchronise(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        call()
        synchronise(device)
        seconds = time.perf_counter() - began
    events = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    work = [
        event for event in events if not event.is_user_annotation
    ]  # names of whole regions, AdamW's for one
    spans = [(event.time_range.start, event.time_range.end) for event in work]
    totals: Counter[str] = Counter()
    for event in work:
        totals[event.name[:100]] += event.time_range.end - event.time_range.start
    return {
        "gpu_busy": covered(spans) / 1e6 / seconds,
        "profiled_seconds": seconds,
        "kernels_milliseconds": {name: spent / 1e3 for name, spent in totals.most_common(most)},
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what (start, end) intervals cover together: streams run side by side."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def waits(call: Call, device: str) -> Row:
    """How often one call makes the host wait for the GPU, and at which lines, as far as torch notices."""
    if device == "cpu":
        return {"waits": None}
    synchronise(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"
        for warning in caught
        if "synchron" in str(warning.message)
    )
    return {"waits": sum(lines.values()), "wait_lines": dict(lines.most_common(12))}
