"""Weights of the entries <-> codes.

Under `pps` the rest's mass R is what the head leaves of 1, unless the largest coded entry weighs more: then that entry is
what all others leave, and its slot carries the code of R (LEVELS + 1 more). So the errors of the others always fall on
the greater of the two, and a rest of 1e-9 stays one however the head is rounded. Both, and the number of draws
ceil(R / tau), are computed in integers of 2^-40, so that every machine comes to the same number.

Error bound. A code covers [lowest, 1] in LEVELS equal steps of p^(1/4); a weight w lies in a cell of width at most
`cell(w)` = 4 s w^(3/4) + 6 s^2 w^(1/2) + ..., s = (1 - lowest^(1/4)) / LEVELS. Under `pps` a code is either end of the
cell, at random, so that its mean is w (and what is left to the greater of R and the largest entry errs by minus the
sum); elsewhere it is the nearer end, so |delta w| <= cell / 2 before the row is scaled to 1. Log codes have a step of
1/2048 nat: a label is within 1/4096 nat down to -31.99 nats, a tail within 1/2048 (decoding moves it inside its step
towards what the head leaves).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.targets.quantisers import (
    LEVELS,
    LOG_STEPS,
    NO_LOG,
    ONE,
    cell_of,
    cells,
    label_units,
)
from ddk_pipe.pipeline.targets.selection import Plan
from ddk_pipe.pipeline.targets.window import Context, Planes

LEAST_SHARE = ONE >> 23  # weight of a rest entry where rounding left none, about 1e-7
REST, LABEL, LARGEST = 256, 257, 258  # kinds of an entry while decoding, beside the head's codes


@dataclass(frozen=True)
class Shares:
    """What the rest of each position weighs, and its largest coded entry where that is `marked`, int64 [L], in
    units of 1 / ONE; the greater of the two is what everything else leaves, so damage or rounding may make it < 0."""

    mass: NDArray[np.int64]
    largest: NDArray[np.int64]
    marked: NDArray[np.bool_]


class WeightCodec:
    """Codes of head weights, and the log weights of all entries from them, at one temperature.

    `lowest` is the least weight that a code stands for.
    """

    def __init__(self, plan: Plan, temperature: float = 1.0) -> None:
        self.plan = plan
        self.lowest = plan.tau if plan.scheme in ("pps", "threshold") else 0.0
        never_cut = plan.scheme == "pps" or (plan.scheme == "threshold" and plan.tau * plan.cap >= 1)
        # label codes up to this one are surely in the head: one code of margin for the rounding
        self._implied_up_to = int(-np.log(plan.tau) * LOG_STEPS) - 1 if never_cut and temperature == 1 else -1
        self._tau_units = round(plan.tau * ONE)
        self._weights, self._masses = cells(self.lowest), cells(0.0)  # of head entries, of the rest
        with np.errstate(divide="ignore"):  # code 0 of topk: no weight
            self._code_logs = np.log(self._weights)
        self._units = np.zeros(2 * (LEVELS + 1))  # whole numbers; 0 for the codes of a rest's mass
        self._units[: LEVELS + 1] = np.rint(self._weights * ONE)
        self._mass_units = np.rint(self._masses * ONE).astype(np.int64)
        self._label_units = label_units()

    def cell(self, weight: float) -> float:
        """Width of the quantiser's cell around a head weight: the bound on |delta w| before the row is made to sum
        to 1 (half of it where codes are rounded to the nearest)."""
        if self.plan.scheme == "random":
            return 0.0
        low = int(cell_of(self._weights, np.array([weight]))[0][0])
        return float(self._weights[low + 1] - self._weights[low])

    def implied(self, context: Context) -> NDArray[np.bool_]:
        """True where the label is in the head and its log code says its weight."""
        return context.label_codes.astype(np.int64) <= self._implied_up_to

    def in_head(self, weights: NDArray[np.float64]) -> NDArray[np.bool_]:
        """True for the weights that get a code; under `pps` the others share the rest's mass."""
        if self.plan.scheme != "pps":
            return np.ones(len(weights), bool)
        return weights >= self.lowest * (1 - 1e-6)

    def codes(
        self,
        weights: NDArray[np.float64],
        rows: NDArray[np.int64],
        mass: NDArray[np.float64],
        context: Context,
    ) -> NDArray[np.int64]:
        """Codes of the head weights, which stand in rising order of `rows`; mass float64 [L] is the rest's."""
        if self.plan.scheme == "random":
            return np.rint(weights * self.plan.draws).astype(np.int64)
        low, share = cell_of(self._weights, weights)
        if self.plan.scheme != "pps":
            # topk's code 0 would be no weight at all
            return np.maximum(low + (share > 0.5), int(self.plan.scheme == "topk"))
        uniform = self._uniforms(context.key, len(weights) + len(mass))
        codes = low + (share > uniform[: len(weights)])
        mass_low, mass_share = cell_of(self._masses, mass)
        mass_codes = mass_low + (mass_share > uniform[len(weights) :])
        largest = _largest(weights, rows)
        largest = largest[weights[largest] > mass[rows[largest]]]
        codes[largest] = LEVELS + 1 + mass_codes[rows[largest]]
        # Rounding up in several places may leave too little. Such rows are rounded down throughout.
        shares = self.split(codes, rows, context)
        squeezed = np.where(shares.marked, shares.largest, shares.mass) < 0
        codes = np.where(squeezed[rows], low, codes)
        codes[largest] = np.where(squeezed[rows], LEVELS + 1 + mass_low[rows], codes)[largest]
        return codes

    def _uniforms(self, key: str, count: int) -> NDArray[np.float64]:
        """Uniform numbers in [0, 1) for the rounding of one window."""
        digest = hashlib.blake2b(f"{self.plan.seed}/{key}/rounding".encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)

    def split(self, codes: NDArray[np.int64], rows: NDArray[np.int64], context: Context) -> Shares:
        """Under `pps`: what rest and largest head entry of each position weigh."""
        length = len(context.labels)
        marked = codes > LEVELS
        if codes.max(initial=0) > 2 * LEVELS + 1:
            raise ValueError("a weight code is too large")
        if np.bincount(rows[marked], minlength=length).max(initial=0) > 1:
            raise ValueError("a position has two largest entries")
        others = np.bincount(rows, self._units.take(codes), length)
        left = ONE - np.where(self.implied(context), self._label_units[context.label_codes], 0)
        left -= others.astype(np.int64)  # exact: the sums stay below 2^53
        mass = left.copy()
        mass[rows[marked]] = self._mass_units[codes[marked] - LEVELS - 1]
        has_marked = np.zeros(length, bool)
        has_marked[rows[marked]] = True
        return Shares(mass, left - mass, has_marked)

    def draws(self, mass: NDArray[np.int64], context: Context) -> NDArray[np.int64]:
        """How many draws `pps` makes of a rest of `mass`; 0 without a label."""
        draws = np.maximum(-(-mass // self._tau_units), 1)
        return np.where(context.label_codes == NO_LOG, 0, draws)

    def pps_logs(
        self,
        kinds: NDArray[np.int64],
        rows: NDArray[np.int64],
        shares: Shares,
        rests: NDArray[np.int64],
        context: Context,
    ) -> NDArray[np.float32]:
        """Log weights of the entries, every row summing to 1."""
        least = float(LEAST_SHARE)
        share, largest = (
            np.maximum(shares.mass / np.maximum(rests, 1), least),
            np.maximum(shares.largest, least),
        )
        label = context.label_codes * (-1.0 / LOG_STEPS)
        by_row = np.concatenate([np.log(share / ONE), label, np.log(largest / ONE)])
        logs = self._code_logs.take(kinds, mode="clip")
        without_code = (kinds >= REST).nonzero()[0]
        at = (kinds.take(without_code) - REST) * len(rests) + rows.take(without_code)
        logs[without_code] = by_row.take(at)
        # 1 but for the two floors above, and where a rest without entries was given some mass
        total = ONE - shares.mass + share * rests + np.where(shares.marked, largest - shares.largest, 0.0)
        scaled: NDArray[np.float32] = (logs - np.log(np.maximum(total, 1.0) / ONE).take(rows)).astype(
            np.float32
        )
        return scaled

    def logs(
        self, planes: Planes, kinds: NDArray[np.int64], rows: NDArray[np.int64], length: int, context: Context
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Log weights of the entries and log tails of the positions, every row summing to 1."""
        if self.plan.scheme == "random":
            weights = kinds.astype(np.float64)
        else:
            if kinds[kinds < REST].max(initial=0) > LEVELS:
                raise ValueError("a weight code is too large")
            label = np.exp(context.label_codes[rows] * (-1.0 / LOG_STEPS))
            weights = np.where(kinds == LABEL, label, self._weights[np.minimum(kinds, LEVELS)])
        if weights.min(initial=1.0) <= 0:
            raise ValueError("a weight code means no weight")
        kept = np.bincount(rows, weights, length).astype(np.float64)
        tail = _tail(planes["tails"], kept) if self.plan.has_tail else np.zeros(length)
        scale = (1.0 - tail) / np.maximum(kept, 1e-30)
        with np.errstate(divide="ignore"):  # no tail: log 0 = -inf is what we mean
            return np.log(weights * scale[rows]).astype(np.float32), np.log(tail).astype(np.float32)


def _largest(weights: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the first largest weight of each row that has any; `rows` rise."""
    starts = np.diff(rows, prepend=-1).nonzero()[0]
    if not len(starts):
        return starts
    most = np.maximum.reduceat(weights, starts)
    candidates = (weights == np.repeat(most, np.diff(starts, append=len(rows)))).nonzero()[0]
    firsts: NDArray[np.int64] = candidates[np.diff(rows[candidates], prepend=-1) != 0]
    return firsts


def _tail(codes: NDArray[np.unsignedinteger], kept: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tail weights: what the kept weights leave, held inside the half step around the log code.

    Near 1 the code alone would be too coarse (its half step is as large as the kept mass), near 0 the sum.
    """
    steps = codes.astype(np.float64)
    least, most = np.exp(-(steps + 0.5) / LOG_STEPS), np.exp(-np.maximum(steps - 0.5, 0.0) / LOG_STEPS)
    return np.where(codes == NO_LOG, 0.0, np.clip(1.0 - kept, least, np.minimum(most, 1 - 1e-9)))
