"""Weights of the entries <-> codes.

A weight code covers [lowest, 1] in LEVELS equal steps of p^(1/4); a log code has a step of 1/2048 nat. Under `pps` every
code is rounded at random to either end of its cell, so that its mean is exact (`rounding`), and the greatest weight
of a row has no code that counts: it is what all others leave of 1, so that their errors fall where they matter least.

| greatest of a row  | how a reader knows                                 | code of the rest's mass R            |
|--------------------|----------------------------------------------------|--------------------------------------|
| the rest           | neither of the others                              | none: R is what the head leaves      |
| a coded entry      | its code is LEVELS + 1 or more                     | in that entry's place                |
| a likely label     | its row has a code behind those of the entries     | that one; NO_REST there: not greatest |

A label's own log code says its weight to 1/2048 of it. That is coarse beside a rest of 1e-4, so the rows of labels up to
SURE steps from 1 have a code of R; for a tau below SURE + 1 steps, so have those of all labels in the head. R, what is left,
and the number of draws ceil(R / tau) are computed in integers of 2^-40: every machine comes to the same number.

Error bound. A weight w lies in a cell of width at most `cell(w)` = 4 s w^(3/4) + 6 s^2 w^(1/2) + ...,
s = (1 - lowest^(1/4)) / LEVELS; R in one of `lowest` = 0. Under `pps` |delta w| <= cell(w), and the greatest errs by minus
the sum, which is at most the widest of these cells and 1/2048 of the label where its code counts. So it stays positive for
tau >= 4e-5; below, and for a rest of code 0, a floor of 2^-40 holds and the row is scaled to 1. Elsewhere a code is the
nearer end, so |delta w| <= cell / 2 before the row is scaled to 1. A label is within 1/2048 nat down to -31.99 nats, a tail
too (decoding moves it inside its step towards what the head leaves).
"""

from __future__ import annotations

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
from ddk_pipe.pipeline.targets.rounding import rounded_up, uniforms
from ddk_pipe.pipeline.targets.selection import Plan
from ddk_pipe.pipeline.targets.window import Context, Planes

SURE = 3  # log codes up to this one: a code of R is finer than what 1 - p says of it up to about 1.5e-3
NO_REST = LEVELS + 1  # in the place of a code of R: the label is not the greatest
REST, LABEL, LARGEST = 256, 257, 258  # kinds of an entry while decoding, beside the head's codes


@dataclass(frozen=True)
class Shares:
    """What the rest of each position weighs, and what is left for its greatest entry, int64 [L], in units of 1 / ONE;
    that entry is the label where `label`, a coded one where `coded`, else the rest itself (then `left` is 0).
    What nothing has a code for is what everything else leaves, so damage or rounding may make it < 0."""

    mass: NDArray[np.int64]
    left: NDArray[np.int64]
    coded: NDArray[np.bool_]
    label: NDArray[np.bool_]


class WeightCodec:
    """Codes of head weights, and the log weights of all entries from them, at one temperature.

    `lowest` is the least weight that a code stands for. `label_rests` False: as caches of schema version 2 were
    written, without codes of R in the rows of labels.
    """

    def __init__(self, plan: Plan, temperature: float = 1.0, *, label_rests: bool = True) -> None:
        self.plan = plan
        self.lowest = plan.tau if plan.scheme in ("pps", "threshold") else 0.0
        never_cut = plan.scheme == "pps" or (plan.scheme == "threshold" and plan.tau * plan.cap >= 1)
        # label codes up to this one are surely in the head: one code of margin for the rounding, one for float32
        margin = 2 if label_rests else 1
        surely = int(-np.log(plan.tau) * LOG_STEPS) - margin
        self._implied_up_to = surely if never_cut and temperature == 1 else -1
        coarse = plan.tau < (SURE + 1) / LOG_STEPS
        rests_up_to = self._implied_up_to if coarse else min(SURE, self._implied_up_to)
        self._rests_up_to = rests_up_to if plan.scheme == "pps" and label_rests else -1
        self._least = 1 if label_rests else ONE >> 23  # weight of an entry where rounding left none
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

    def has_rest(self, context: Context) -> NDArray[np.bool_]:
        """True where the row has a code of R (or NO_REST) behind the codes of the entries: some of the implied."""
        return context.label_codes.astype(np.int64) <= self._rests_up_to

    def codes(self, weights: NDArray[np.float64]) -> NDArray[np.int64]:
        """Codes of weights, to the nearest or exact; for the schemes but `pps`."""
        if self.plan.scheme == "random":
            return np.rint(weights * self.plan.draws).astype(np.int64)
        low, share = cell_of(self._weights, weights)
        # topk's code 0 would be no weight at all
        return np.maximum(low + (share > 0.5), int(self.plan.scheme == "topk"))

    def pps_codes(
        self,
        weights: NDArray[np.float64],
        rows: NDArray[np.int64],
        label: NDArray[np.float64],
        mass: NDArray[np.float64],
        context: Context,
    ) -> NDArray[np.int64]:
        """Codes of the coded head weights, which stand in rising order of `rows`, then those of `has_rest`.

        label, mass float64 [L]: what the implied label (0 without one) and the rest of each position weigh.
        """
        has_rest, largest = self.has_rest(context), _largest(weights, rows)
        most = mass.copy()
        most[rows[largest]] = np.maximum(weights[largest], mass[rows[largest]])
        # a label beyond the last such step may be rounded to it: then its code must count, or its mean would be off
        by_label = has_rest & (label >= most) & (label >= np.exp(-self._rests_up_to / LOG_STEPS))
        by_entry = (weights[largest] > mass[rows[largest]]) & ~by_label[rows[largest]]
        largest = largest[by_entry]
        with_code = np.sort(np.concatenate([by_label.nonzero()[0], rows[largest]]))
        low, share = cell_of(self._weights, weights)
        mass_low, mass_share = cell_of(self._masses, mass[with_code])
        share[largest] = 0.0  # has no code of its own
        widths = np.concatenate([np.diff(self._weights)[low], np.diff(self._masses)[mass_low]])
        up = rounded_up(
            np.concatenate([rows, with_code]),
            np.clip(np.concatenate([share, mass_share]), 0.0, 1.0),
            widths,
            uniforms(self.plan.seed, context.key, "rounding", len(mass)),
        )
        codes = low + up[: len(low)]
        mass_codes = np.full(len(mass), NO_REST)
        mass_codes[with_code] = mass_low + up[len(low) :]
        codes[largest] = LEVELS + 1 + mass_codes[rows[largest]]
        return np.concatenate([codes, np.where(by_label, mass_codes, NO_REST)[has_rest]])

    def split(self, codes: NDArray[np.int64], rows: NDArray[np.int64], context: Context) -> Shares:
        """Under `pps`, from codes as `pps_codes` gives them: what rest and greatest entry of each position weigh."""
        length, has_rest = len(context.labels), self.has_rest(context).nonzero()[0]
        codes, rests = codes[: len(rows)], codes[len(rows) :]
        if codes.max(initial=0) > 2 * LEVELS + 1 or rests.max(initial=0) > NO_REST:
            raise ValueError("a weight code is too large")
        marked, by_label = codes > LEVELS, np.zeros(length, bool)
        by_label[has_rest[rests != NO_REST]] = True
        greatest = np.bincount(rows[marked], minlength=length) + by_label
        if greatest.max(initial=0) > 1:
            raise ValueError("a position has two largest entries")
        others = np.bincount(rows, self._units.take(codes), length)
        counts = self.implied(context) & ~by_label
        left = ONE - np.where(counts, self._label_units[context.label_codes], 0)
        left -= others.astype(np.int64)  # exact: the sums stay below 2^53
        mass = left.copy()
        mass[rows[marked]] = self._mass_units[codes[marked] - LEVELS - 1]
        mass[by_label] = self._mass_units[rests[rests != NO_REST]]
        return Shares(mass, left - mass, (greatest > 0) & ~by_label, by_label)

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
        least = float(self._least)
        share = np.maximum(shares.mass / np.maximum(rests, 1), least)
        left = np.maximum(shares.left, least)
        greatest = np.log(left / ONE)
        label = np.where(shares.label, greatest, context.label_codes * (-1.0 / LOG_STEPS))
        by_row = np.concatenate([np.log(share / ONE), label, greatest])
        logs = self._code_logs.take(kinds, mode="clip")
        without_code = (kinds >= REST).nonzero()[0]
        at = (kinds.take(without_code) - REST) * len(rests) + rows.take(without_code)
        logs[without_code] = by_row.take(at)
        # 1 but for the two floors above, and where a rest without entries was given some mass
        raised = np.where(shares.coded | shares.label, left - shares.left, 0.0)
        total = ONE - shares.mass + share * rests + raised
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
