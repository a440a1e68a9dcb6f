"""Domain weights -> a deterministic stream of (domain, window), resumable and world-size free.

The order of the data is a pure function of (seed, weight history, step): no global random state, no
generator in flight. Everything random is drawn from its own Philox stream, keyed by the seed, the
purpose, and the domain and epoch (or the interval) that it is for. So a position alone says what
was seen, and resuming is arithmetic on one interval number and one cursor per domain.

Only the raw 64-bit words of Philox are used, because numpy keeps those stable between versions and
does not promise so for `Generator.permutation` or `Generator.random` (NEP 19): an upgrade between
two halves of a run must not deal some windows twice.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.mixing.arrays import FloatArray, check_weights


class _Purpose(IntEnum):
    """First word of a stream's key. The numbers are part of the data order: never renumber."""

    COUNTS = 0
    EPOCH = 1
    SHUFFLE = 2


class DomainSampler:
    """Draws intervals of (domain, window) pairs, windows numbered 0 .. window_counts[domain] - 1.

    `window_counts` is the number of training windows of each domain, `seed` any integer >= 0.
    Raises ValueError when there is no domain, a count is negative or the seed is.

    Within a domain windows are dealt epoch by epoch: none is dealt twice before all of its domain's
    were dealt once, and an exhausted domain starts a freshly shuffled epoch. Where an interval
    spans the end of an epoch, the shuffle mixes both epochs' windows within that interval.

    With `reshuffle` False every epoch of a domain has the order of its first, as the paper's "wraps
    around" may be read.

    It keeps the current permutation of every domain it has drawn from: 8 bytes per window.
    """

    def __init__(self, window_counts: Sequence[int], *, seed: int, reshuffle: bool = True) -> None:
        self._window_counts = [int(count) for count in window_counts]
        self._seed = int(seed)
        self._reshuffle = reshuffle
        if not self._window_counts or min(self._window_counts) < 0:
            raise ValueError(f"window_counts must be at least 0 each, got {self._window_counts}")
        if self._seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self._interval = 0
        self._cursors = [0] * len(self._window_counts)
        self._epochs: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def draw_interval(self, weights: FloatArray, windows: int) -> NDArray[np.int64]:
        """The next interval's order: int64 [windows, 2] of (domain, window), and move past it.

        `weights` is float64 [domains] and sums to 1. Each domain gets floor or ceil of
        weights[domain] * windows, and on average exactly that. A domain of weight 0 gets nothing.

        Raises ValueError for weights that `mixing.check_weights` refuses, for windows < 1, and for
        a positive weight on a domain without windows (naming its index); nothing moves then.
        """
        counts = self._counts(self._checked(weights), windows)
        parts = [self._take(domain, int(count)) for domain, count in enumerate(counts)]
        order = np.stack([np.repeat(np.arange(len(counts)), counts), np.concatenate(parts)], axis=1)
        shuffled = order[_permutation(self._stream(_Purpose.SHUFFLE, self._interval), windows)]
        self._interval += 1
        return shuffled

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as plain JSON values.

        `interval` is the number of intervals drawn, `cursors` the number of windows drawn from each
        domain in all of them; `seed` and `window_counts` are there to be compared on loading.
        """
        return {
            "seed": self._seed,
            "window_counts": list(self._window_counts),
            "interval": self._interval,
            "cursors": list(self._cursors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the sampler that wrote `state` stood.

        Raises DdkError when that sampler had another seed or other window counts, so that the order
        would not be continued but silently changed, and ValueError when `state` is malformed.
        """
        _refuse_malformed(state)
        for key, ours in (("seed", self._seed), ("window_counts", self._window_counts)):
            if state[key] != ours:
                raise DdkError(
                    f"the checkpoint's data order has {key} {state[key]}, this run has {ours}",
                    hint="resume with the manifest and tokens it began with, or start a new run",
                )
        self._interval = state["interval"]
        self._cursors = list(state["cursors"])

    def _checked(self, weights: FloatArray) -> FloatArray:
        checked = check_weights(weights, domains=len(self._window_counts))
        for domain, (weight, count) in enumerate(zip(checked, self._window_counts, strict=True)):
            if weight > 0 and count == 0:
                raise ValueError(f"domain {domain} has weight {weight} but no windows")
        return checked

    def _counts(self, weights: FloatArray, windows: int) -> NDArray[np.int64]:
        """Systematic sampling: how many of the points offset, offset + 1, ... fall to each domain.

        Domain i owns the stretch from sum(weights[:i]) * windows to sum(weights[:i + 1]) * windows.
        """
        if windows < 1:
            raise ValueError(f"windows must be at least 1, got {windows}")
        offset = _unit_interval(self._stream(_Purpose.COUNTS, self._interval))
        live = np.flatnonzero(weights)
        below = np.ceil(np.cumsum(weights[live]) * windows - offset)  # points before each end
        below = np.minimum(below, windows).astype(np.int64)
        below[-1] = windows  # the sum may have been rounded short of 1, and an end on a point
        counts = np.zeros(weights.size, dtype=np.int64)
        counts[live] = np.diff(below, prepend=0)
        return counts

    def _take(self, domain: int, count: int) -> NDArray[np.int64]:
        """The next `count` windows of the domain, int64 [count], and move its cursor past them."""
        size, start = self._window_counts[domain], self._cursors[domain]
        parts = [np.empty(0, dtype=np.int64)]
        position, stop = start, start + count
        while position < stop:
            epoch, first = divmod(position, size)
            last = min(size, first + stop - position)
            parts.append(self._epoch(domain, epoch)[first:last])
            position += last - first
        self._cursors[domain] = stop
        return np.concatenate(parts)

    def _epoch(self, domain: int, epoch: int) -> NDArray[np.int64]:
        """The order of the domain's windows in that epoch, int64 [window_counts[domain]]."""
        epoch = epoch if self._reshuffle else 0
        cached = self._epochs.get(domain)
        if cached is None or cached[0] != epoch:
            stream = self._stream(_Purpose.EPOCH, domain, epoch)
            cached = epoch, _permutation(stream, self._window_counts[domain])
            self._epochs[domain] = cached
        return cached[1]

    def _stream(self, purpose: _Purpose, *key: int) -> np.random.Philox:
        # spawn_key and not a longer entropy list: numpy keeps the two apart, so no large seed can
        # run into the words of the key.
        return np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=(purpose, *key)))


def rank_slice(step: NDArray[np.int64], *, rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's part of one step's global batch: step[rank::world_size].

    `step` is int64 [global batch, 2], a run of rows of what `draw_interval` returned. Every rank
    draws the same interval and slices it here, so the windows of a step do not depend on the world
    size. Raises ValueError for a rank outside the world and for a batch that does not divide
    evenly: ranks with different numbers of windows would weigh their gradients differently.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and {world_size - 1}, got {rank}")
    if len(step) % world_size:
        raise ValueError(f"{len(step)} windows a step do not divide among {world_size} ranks")
    return step[rank::world_size]


def _permutation(stream: np.random.Philox, size: int) -> NDArray[np.int64]:
    """A uniform order of range(size), int64 [size]: sorted by one random 64-bit word each."""
    return np.argsort(stream.random_raw(size), kind="stable").astype(np.int64, copy=False)


def _unit_interval(stream: np.random.Philox) -> float:
    """Uniform on [0, 1): the upper 53 bits of one word, as many as a float64 holds."""
    return float(int(stream.random_raw()) >> 11) * 2.0**-53


def _refuse_malformed(state: Mapping[str, Any]) -> None:
    for key in ("seed", "window_counts", "interval", "cursors"):
        if key not in state:
            raise ValueError(f"the sampler's state has no {key!r}, only {sorted(state)}")
    if len(state["cursors"]) != len(state["window_counts"]):
        raise ValueError(
            f"the sampler's state has {len(state['cursors'])} cursors"
            f" for {len(state['window_counts'])} domains"
        )
    if min([state["interval"], *state["cursors"]]) < 0:
        raise ValueError(f"the sampler's state counts below 0: {dict(state)}")
