"""What each step trains on: the windows of an interval in an order that is the same on every process, read ahead and
made into batches beside the steps before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.mixing import rank_slice
from ddk_pipe.pipeline.storage import durable, prefetch
from ddk_pipe.stages.distill.batches import StepData
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position


def steps_of_windows(parts: Parts, position: Position) -> Iterator[StepData]:
    """What is left of the current interval, step by step; a step's worth of windows is read ahead."""
    options, world = parts.options, parts.world
    into = position.step % options.interval_steps
    steps = min(options.interval_steps, options.steps - position.step + into)
    order = _interval(parts, position)[into * parts.windows_per_step : steps * parts.windows_per_step]
    every = np.split(order, steps - into)
    own = [rank_slice(step, rank=world.rank, world_size=world.size) for step in every]
    each = parts.windows_per_step // world.size

    def read(row: NDArray[np.int64]) -> CachedWindow:
        return parts.source.read(int(row[0]), int(row[1]))

    windows = prefetch(read, np.concatenate(own), ahead=each, threads=parts.source.readers)
    sizes = _micro_batches(each, options.micro_batch_windows)
    grouped = (list(islice(windows, size)) for _ in own for size in sizes)
    batches = prefetch(parts.make_batch, grouped, ahead=len(sizes), threads=1)
    for step, mine in zip(every, own, strict=True):
        began = time.monotonic()
        ready = list(islice(batches, len(sizes)))
        yield StepData(ready, mine, durable.digest(step.tobytes())[:16], time.monotonic() - began)


def _micro_batches(windows: int, most: int) -> list[int]:
    """How many windows each forward pass of a step takes."""
    return [min(most, windows - start) for start in range(0, windows, most)]


def _interval(parts: Parts, position: Position) -> NDArray[np.int64]:
    """(domain, window) of every window of the current interval, in order, the same on every process."""
    parts.sampler.load_state_dict(position.sampler)
    windows = parts.options.interval_steps * parts.windows_per_step
    return parts.sampler.draw_interval(np.array(position.shares), windows)
