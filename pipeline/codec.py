"""SparseTargets of one window <-> small integer planes that stock compressors shrink well.

Ids become ranks in a per-cache frequency table, sorted and stored as gaps. Entries are of two kinds: *explicit*,
with a weight code, and *implied*, which share the remaining mass equally and cost no weight at all. Under `pps`
everything below tau is implied (a draw that hit one token twice weighs at least tau, so it is explicit).

| scheme          | explicit entries                     | implied | tail              |
|-----------------|--------------------------------------|---------|-------------------|
| pps             | weight >= tau, u8 in p^(1/4)         | the rest| none              |
| threshold, topk | all, u8 in p^(1/4)                   | none    | u16 log code      |
| random          | all, u8 count of draws (exact)       | none    | none              |

Error bound. A u8 code covers [lowest, 1] in 255 equal steps of p^(1/4), so before normalisation
|delta w| <= 2 s w^(3/4) + 6 s^2 w^(1/2) + ... <= (w^(1/4) + s/2)^4 - w, with s = (1 - lowest^(1/4)) / 255; after it
(explicit weights are scaled to 1 - tail, implied ones take what is left) at most `error_bound` below.
Log codes: step 1/2048 nat, so a label is within 1/4096 nat down to -31.99 nats, a tail within 1/2048 (decoding
moves it inside its step towards what the explicit weights leave).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.selection import Plan
from ddk_pipe.pipeline.targets import PADDING_ID, SparseTargets

CODES = 255
LOG_STEPS = 2048  # codes per nat
NO_LOG = 65535  # the log code of "none": -inf for a tail, NaN for a label
MOST_PADDED = (
    1 << 26
)  # positions times entries of the widest one: a stranger's window may not fill the memory
LEAST_SHARE = 1e-7  # weight of an implied entry where rounding left none


@dataclass(frozen=True)
class Ranks:
    """Token ids in falling order of frequency: id_of int32 [V], and its inverse rank_of."""

    id_of: NDArray[np.int32]
    rank_of: NDArray[np.int32]

    @classmethod
    def fit(cls, counts: NDArray[np.int64]) -> Ranks:
        """From how often each id occurs, int64 [V]; ties go by id, so equal counts give equal tables."""
        return cls.of(np.argsort(-counts, kind="stable").astype(np.int32))

    @classmethod
    def of(cls, id_of: NDArray[np.int32]) -> Ranks:
        """From the table itself; raises ValueError if it is no permutation."""
        rank_of = np.full(len(id_of), -1, np.int32)
        if len(id_of) and (id_of.min() < 0 or id_of.max() >= len(id_of)):
            raise ValueError("the rank table names ids outside the vocabulary")
        rank_of[id_of] = np.arange(len(id_of), dtype=np.int32)
        if (rank_of < 0).any():
            raise ValueError("the rank table is not a permutation")
        return cls(id_of, rank_of)


Planes = dict[str, NDArray[Any]]  # of one window of L positions, by name, each one-dimensional


class Codec:
    """Encodes and decodes windows of one cache: a pure function of the plan and the rank table.

    Planes of a window of L positions: `explicit`, `implied` u16 [L] (entries of each kind by position), `gaps` u16 or
    u32 [entries] (all explicit ones by position, then all implied ones), `codes` u8 [explicit entries], and under
    schemes with a tail `tails` u16 [L] (log codes).
    """

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.plan, self.ranks = plan, ranks
        self.lowest = plan.tau if plan.scheme in ("pps", "threshold") else 0.0
        self.gap_dtype = np.dtype("u2") if len(ranks.id_of) <= 1 << 16 else np.dtype("u4")
        floor = self.lowest**0.25
        self._floor, self._step = floor, (1 - floor) / CODES
        self._table = (floor + self._step * np.arange(CODES + 1)) ** 4

    @property
    def planes(self) -> dict[str, np.dtype[Any]]:
        """Names and dtypes of the planes of one temperature."""
        dtypes = {"explicit": np.dtype("u2"), "implied": np.dtype("u2"), "gaps": self.gap_dtype}
        tails = {"tails": np.dtype("u2")} if self.plan.has_tail else {}
        return {**dtypes, "codes": np.dtype("u1"), **tails}

    def error_bound(self, weight: float) -> float:
        """Largest |delta w| of an explicit weight before normalisation (module docstring)."""
        if self.plan.scheme == "random":
            return 0.0
        return float((weight**0.25 + self._step / 2) ** 4 - weight)

    def encode(self, targets: SparseTargets) -> Planes:
        """Raises ValueError for targets that break the invariants of SparseTargets."""
        targets.validate(len(self.ranks.id_of))
        ids = targets.ids.cpu().numpy()
        weights = np.exp(targets.logprobs.cpu().numpy().astype(np.float64))
        kept = ids >= 0
        explicit = kept & (weights >= self.lowest * (1 - 1e-6)) if self.plan.scheme == "pps" else kept
        explicit_gaps, order = self._gaps(ids, explicit)
        implied_gaps, _ = self._gaps(ids, kept & ~explicit)
        planes: Planes = {
            "explicit": explicit.sum(1).astype(np.uint16),
            "implied": (kept & ~explicit).sum(1).astype(np.uint16),
            "gaps": np.concatenate([explicit_gaps, implied_gaps]).astype(self.gap_dtype),
            "codes": self._codes(
                np.take_along_axis(weights, order, 1)[np.take_along_axis(explicit, order, 1)]
            ),
        }
        if self.plan.has_tail:
            planes["tails"] = encode_log(targets.tail.cpu().numpy())
        return planes

    def decode(self, planes: Planes) -> SparseTargets:
        """Raises ValueError if the planes contradict each other. `gaps` and `codes` may end in zeros too many."""
        explicit, implied = (planes[name].astype(np.int64) for name in ("explicit", "implied"))
        cut, end = int(explicit.sum()), int(explicit.sum() + implied.sum())
        gaps, codes = planes["gaps"][:end], planes["codes"][:cut]
        if len(explicit) != len(implied) or len(codes) != cut or len(gaps) != end:
            raise ValueError("counts, gaps and codes do not fit together")
        if planes["gaps"][end:].any() or planes["codes"][cut:].any():
            raise ValueError("something follows the last entry")
        if int((explicit + implied).max(initial=0)) * len(explicit) > MOST_PADDED:
            raise ValueError("rows too wide for the length of the window")
        positions = np.concatenate([_rows(explicit), _rows(implied)])
        ids = np.concatenate([self._ids(gaps[:cut], explicit), self._ids(gaps[cut:], implied)])
        weights, log_tail = self._weights(codes, planes.get("tails"), explicit, implied, positions)
        return _padded(ids, weights, positions, log_tail)

    def _gaps(
        self, ids: NDArray[np.int32], chosen: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rank gaps minus 1 of the chosen entries, row by row, and the order of columns that sorts them."""
        far = np.iinfo(np.int32).max
        rank = np.where(chosen, self.ranks.rank_of[np.where(chosen, ids, 0)], far).astype(np.int64)
        order = np.argsort(rank, axis=1, kind="stable")
        rank = np.take_along_axis(rank, order, 1)
        gaps = np.diff(rank, axis=1, prepend=-1) - 1
        return gaps[rank < far], order

    def _ids(self, gaps: NDArray[np.unsignedinteger], counts: NDArray[np.int64]) -> NDArray[np.int32]:
        total = np.cumsum(gaps.astype(np.int64) + 1)
        before = np.concatenate([[0], total])[np.cumsum(counts) - counts]
        rank = total - 1 - np.repeat(before, counts)
        if len(rank) and rank.max() >= len(self.ranks.id_of):
            raise ValueError("a gap leads outside the vocabulary")
        ids: NDArray[np.int32] = self.ranks.id_of[rank]
        return ids

    def _codes(self, weights: NDArray[np.float64]) -> NDArray[np.uint8]:
        if self.plan.scheme == "random":
            return np.rint(weights * self.plan.draws).astype(np.uint8)
        code = np.rint((np.minimum(weights, 1.0) ** 0.25 - self._floor) / self._step)
        codes: NDArray[np.uint8] = np.clip(code, 0, CODES).astype(np.uint8)
        return codes

    def _weights(
        self,
        codes: NDArray[np.uint8],
        tails: NDArray[np.uint16] | None,
        explicit: NDArray[np.int64],
        implied: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights of all entries and log tails, every row summing to 1."""
        length, cut = len(explicit), len(codes)
        coded = codes.astype(np.float64) if self.plan.scheme == "random" else self._table[codes]
        coded_sum = np.bincount(positions[:cut], coded, length).astype(np.float64)
        if tails is None:
            total = np.where(implied > 0, np.maximum(1.0, coded_sum + LEAST_SHARE * implied), coded_sum)
            share = (total - coded_sum) / np.maximum(implied, 1)
            weights = np.concatenate([coded, share[positions[cut:]]]) / total[positions]
            return weights, np.full(length, -np.inf)
        tail = _tail(tails, coded_sum)
        scale = (1.0 - tail) / np.maximum(coded_sum, 1e-300)
        with np.errstate(divide="ignore"):  # no tail: log 0 = -inf is what we mean
            return coded * scale[positions], np.log(tail)


def _tail(codes: NDArray[np.uint16], coded_sum: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tail weights: what the explicit weights leave, held inside the half step around the log code.

    Near 1 the code alone would be too coarse (its half step is as large as the kept mass), near 0 the sum.
    """
    steps = codes.astype(np.float64)
    least, most = np.exp(-(steps + 0.5) / LOG_STEPS), np.exp(-np.maximum(steps - 0.5, 0.0) / LOG_STEPS)
    return np.where(codes == NO_LOG, 0.0, np.clip(1.0 - coded_sum, least, most))


def _rows(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)


def _padded(
    ids: NDArray[np.int32],
    weights: NDArray[np.float64],
    positions: NDArray[np.int64],
    log_tail: NDArray[np.float64],
) -> SparseTargets:
    """Flat entries -> SparseTargets with ascending ids; entries without weight are left out."""
    weighty = weights > 0
    ids, weights, positions = ids[weighty], weights[weighty], positions[weighty]
    order = np.lexsort((ids, positions))
    ids, weights, positions = ids[order], weights[order], positions[order]
    counts = np.bincount(positions, minlength=len(log_tail))
    slots = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(log_tail), int(counts.max(initial=0)))
    padded_ids = np.full(shape, PADDING_ID, np.int32)
    logprobs = np.full(shape, -np.inf, np.float32)
    padded_ids[positions, slots] = ids
    logprobs[positions, slots] = np.log(weights)
    return SparseTargets(
        ids=torch.from_numpy(padded_ids),
        logprobs=torch.from_numpy(logprobs),
        tail=torch.from_numpy(log_tail.astype(np.float32)),
    )


def encode_log(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Natural log of a probability -> u16, step 1/2048 nat; -inf and NaN -> 65535, below -31.99 nats -> 65534."""
    finite = np.isfinite(values)
    codes = np.rint(np.where(finite, values, 0.0).astype(np.float64) * -LOG_STEPS)
    return np.where(finite, np.clip(codes, 0, NO_LOG - 1), NO_LOG).astype(np.uint16)


def decode_log(codes: NDArray[np.uint16], *, none: float) -> NDArray[np.float32]:
    """Inverse of encode_log; 65535 becomes `none`."""
    values = codes.astype(np.float32) / -LOG_STEPS
    return np.where(codes == NO_LOG, np.float32(none), values)
