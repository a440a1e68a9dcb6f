"""SparseTargets of one window <-> small integer planes that stock compressors shrink well.

Ids become ranks in the domain's frequency table and are stored as sorted gaps, the head apart from the rest. A gap
g >= 1 is cut into its octave floor(log2 g), one byte that compresses, and the bits below, packed raw. Three kinds of
entries, by what their weight costs:

| kind  | which                                              | weight                                            |
|-------|----------------------------------------------------|---------------------------------------------------|
| label | the true next token where its p >= tau, at T = 1   | known: the cache holds its log-probability anyway |
| head  | p >= tau; without a rest rule, every entry         | u8 code, uniform in p^(1/4)                       |
| rest  | draws from below tau (`pps` only)                  | equal shares of the rest's mass                   |

| scheme    | label entry        | codes of the head                         | tail         |
|-----------|--------------------|-------------------------------------------|--------------|
| pps       | implied            | rounded at random: E[decoded] = p         | none         |
| threshold | implied, if tau * cap >= 1 (the cap never cuts) | to the nearest | u16 log code |
| topk      | in the head        | to the nearest                            | u16 log code |
| random    | in the head        | the count of draws, exact                 | none         |

Under `pps` the rest's mass R is what the head leaves of 1, unless the largest coded entry weighs more: then that entry is
what all others leave, and its slot carries the code of R (LEVELS + 1 more). So the errors of the others always fall on
the greater of the two, and a rest of 1e-9 stays one however the head is rounded. The number of rest entries is stored as its difference from ceil(R / tau), the number of draws, which is
computed in integers of 2^-40, so that every machine comes to the same number.

Error bound. A code covers [lowest, 1] in LEVELS equal steps of p^(1/4); a weight w lies in a cell of width at most
`cell(w)` = 4 s w^(3/4) + 6 s^2 w^(1/2) + ..., s = (1 - lowest^(1/4)) / LEVELS. Under `pps` a code is either end of the
cell, at random, so that its mean is w (and what is left to the greater of R and the largest entry errs by minus the sum); elsewhere it is the
nearer end, so |delta w| <= cell / 2 before the row is scaled to 1. Log codes have a step of 1/2048 nat: a label is within
1/4096 nat down to -31.99 nats, a tail within 1/2048 (decoding moves it inside its step towards what the head leaves).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.targets.selection import Plan
from ddk_pipe.pipeline.targets.sparse import NO_LABEL, PADDING_ID, SparseTargets

LEVELS = 63  # steps of a weight code: finer ones cost bytes and win nothing beside the noise of the draws
LOG_STEPS = 2048  # codes per nat
NO_LOG = 65535  # the log code of "none": -inf for a tail, NaN for a label
ONE = 1 << 40  # a weight of 1 in the integers that counts are predicted with
LEAST_SHARE = ONE >> 23  # weight of a rest entry where rounding left none, about 1e-7
STEP_RATIO = 0.9995118379398893512  # exp(-1 / LOG_STEPS), a literal: libraries may differ in the last bit
ID_BITS = 24  # ids and ranks are below 2^24
KIND_BITS = 10  # kind of an entry while decoding: a head code, or one of the three below
REST, LABEL, LARGEST = 256, 257, 258
MOST_ENTRIES = 1 << 23  # of a window: decoding takes some 85 bytes for each
MOST_PADDED = 1 << 24  # positions times the most entries of one: one long row makes all others as wide

Planes = dict[str, NDArray[np.unsignedinteger]]


@dataclass(frozen=True)
class Ranks:
    """Token ids in falling order of frequency: id_of int32 [V], and its inverse rank_of."""

    id_of: NDArray[np.int32]
    rank_of: NDArray[np.int32]

    @classmethod
    def fit(cls, counts: NDArray[np.floating | np.integer]) -> Ranks:
        """From how often each id occurs, [V]; ties go by id, so equal counts give equal tables."""
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


@dataclass(frozen=True)
class Context:
    """What writer and reader both know of a window of L positions beside its targets.

    labels int64 [L]: the true next token, NO_LABEL where there is none; label_codes u16 [L]: log codes of its
    probability at T = 1 (`encode_log`, NO_LOG without a label); key: the window's name, seeds the rounding.
    """

    labels: NDArray[np.int64]
    label_codes: NDArray[np.uint16]
    key: str = ""

    @classmethod
    def none(cls, positions: int) -> Context:
        """A window without labels."""
        return cls(np.full(positions, NO_LABEL, np.int64), np.full(positions, NO_LOG, np.uint16))


@dataclass(frozen=True)
class Shares:
    """What the rest of each position weighs, and its largest coded entry where that is `marked`, int64 [L], in
    units of 1 / ONE; the greater of the two is what everything else leaves, so damage or rounding may make it < 0."""

    mass: NDArray[np.int64]
    largest: NDArray[np.int64]
    marked: NDArray[np.bool_]


class Codec:
    """Encodes and decodes windows at one temperature: a pure function of plan, temperature and rank table.

    `planes` names the arrays of a window with their types: heads [L], draws [L] (pps), tails [L] (threshold, topk),
    octaves [entries], bits [bytes], codes [head entries]; entries run over the heads by position, then the rests.
    """

    def __init__(self, plan: Plan, ranks: Ranks, temperature: float = 1.0) -> None:
        if len(ranks.id_of) > 1 << ID_BITS:
            raise ValueError(f"a vocabulary of {len(ranks.id_of):,} is too large")
        self.plan, self.ranks = plan, ranks
        self.lowest = plan.tau if plan.scheme in ("pps", "threshold") else 0.0
        never_cut = plan.scheme == "pps" or (plan.scheme == "threshold" and plan.tau * plan.cap >= 1)
        # label codes up to this one are surely in the head: one code of margin for the rounding
        self._implied_up_to = int(-np.log(plan.tau) * LOG_STEPS) - 1 if never_cut and temperature == 1 else -1
        self._tau_units = round(plan.tau * ONE)
        self._weights, self._masses = _cells(self.lowest), _cells(0.0)  # of head entries, of the rest
        with np.errstate(divide="ignore"):  # code 0 of topk: no weight
            self._code_logs = np.log(self._weights)
        self._units = np.zeros(2 * (LEVELS + 1))  # whole numbers; 0 for the codes of a rest's mass
        self._units[: LEVELS + 1] = np.rint(self._weights * ONE)
        self._mass_units = np.rint(self._masses * ONE).astype(np.int64)
        self._label_units = _label_units()
        many = np.dtype("u4") if plan.scheme == "pps" and plan.tau < 1 / 30_000 else np.dtype("u2")
        extra = {"draws": many} if plan.scheme == "pps" else {}
        extra |= {"tails": np.dtype("u2")} if plan.has_tail else {}
        one_byte = {name: np.dtype("u1") for name in ("octaves", "bits", "codes")}
        self.planes: dict[str, np.dtype[np.unsignedinteger]] = {"heads": many, **extra, **one_byte}

    def cell(self, weight: float) -> float:
        """Width of the quantiser's cell around a head weight: the bound on |delta w| before the row is made to sum
        to 1 (half of it where codes are rounded to the nearest)."""
        if self.plan.scheme == "random":
            return 0.0
        low = int(_cell_of(self._weights, np.array([weight]))[0][0])
        return float(self._weights[low + 1] - self._weights[low])

    def encode(self, targets: SparseTargets, context: Context) -> Planes:
        """Raises ValueError for targets that break the invariants of SparseTargets or contradict the context."""
        targets.validate(len(self.ranks.id_of))
        length = len(targets.tail)
        all_ids = targets.ids.cpu().numpy()
        rows, columns = np.nonzero(all_ids >= 0)
        ids = all_ids[rows, columns]
        weights = np.exp(targets.logprobs.cpu().numpy()[rows, columns].astype(np.float64))
        implied = self._implied(context)
        coded = ~(implied[rows] & (ids == context.labels[rows]))
        if len(ids) - coded.sum() != implied.sum():
            raise ValueError("a label likely enough for the head is not among the targets")
        rows, ids, weights = rows[coded], ids[coded], weights[coded]
        head = weights >= self.lowest * (1 - 1e-6) if self.plan.scheme == "pps" else np.ones(len(ids), bool)
        order, gaps = self._gaps(rows, ids, head)
        cut = int(head.sum())
        head_rows, rests = rows[order[:cut]], np.bincount(rows[order[cut:]], minlength=length)
        mass = np.bincount(rows[order[cut:]], weights[order[cut:]], length).astype(np.float64)
        codes = self._codes(weights[order[:cut]], head_rows, mass, context)
        octaves = np.frexp(gaps.astype(np.float64))[1] - 1
        planes = {
            "heads": np.bincount(head_rows, minlength=length),
            "octaves": octaves,
            "bits": _pack(gaps - (1 << octaves.astype(np.int64)), octaves),
            "codes": codes,
        }
        if self.plan.scheme == "pps":
            difference = rests - self._draws(self._split(codes, head_rows, context).mass, context)
            planes["draws"] = (difference << 1) ^ (difference >> 63)  # zigzag: 0, -1, 1, -2, ...
        if self.plan.has_tail:
            planes["tails"] = encode_log(targets.tail.cpu().numpy())
        return {name: planes[name].astype(dtype) for name, dtype in self.planes.items()}

    def decode(self, planes: Planes, context: Context) -> SparseTargets:
        """Inverse of encode; planes may be longer than they need to be. Raises ValueError if they contradict each other."""
        heads = planes["heads"].astype(np.int64)
        length, cut = len(heads), int(heads.sum())
        codes = _first(planes["codes"], cut).astype(np.int64)
        head_rows = np.repeat(np.arange(length), heads)
        implied = self._implied(context)
        rests, kinds = np.zeros(length, np.int64), codes
        if self.plan.scheme == "pps":
            shares = self._split(codes, head_rows, context)
            kinds = np.where(codes > LEVELS, LARGEST, codes)
            zigzag = planes["draws"].astype(np.int64)
            rests = self._draws(shares.mass, context) + ((zigzag >> 1) ^ -(zigzag & 1))
            if (rests < 0).any() or rests.max(initial=0) > len(self.ranks.id_of):
                raise ValueError("heads and draws do not fit together")
        most = int((heads + rests).max(initial=0)) + 1
        if length * most > MOST_PADDED:
            raise ValueError(f"{length:,} positions of up to {most:,} entries are too many")
        counts = np.concatenate([heads, rests])
        ids = self._ids(planes, counts)
        labelled = implied.nonzero()[0]
        rows = np.concatenate([head_rows, np.repeat(np.arange(length), rests), labelled])
        ids = np.concatenate([ids, context.labels[labelled]])
        kinds = np.concatenate([kinds, np.full(len(ids) - cut, REST)])
        kinds[len(kinds) - len(labelled) :] = LABEL
        # sorted by row and id; runs are nearly in order, which the stable sort uses
        key = np.sort((rows << (ID_BITS + KIND_BITS)) | (ids << KIND_BITS) | kinds, kind="stable")
        rows, kinds = key >> (ID_BITS + KIND_BITS), key & ((1 << KIND_BITS) - 1)
        ids = (key >> KIND_BITS) & ((1 << ID_BITS) - 1)
        if ((ids[1:] == ids[:-1]) & (rows[1:] == rows[:-1])).any():
            raise ValueError("an id occurs twice at one position")
        if self.plan.scheme == "pps":
            logs, tail = (
                self._pps_logs(kinds, rows, shares, rests, context),
                np.full(length, -np.inf, np.float32),
            )
        else:
            logs, tail = self._logs(planes, kinds, rows, length, context)
        return _padded(ids, logs, heads + rests + implied, tail)

    def _implied(self, context: Context) -> NDArray[np.bool_]:
        """True where the label is in the head and its log code says its weight."""
        return context.label_codes.astype(np.int64) <= self._implied_up_to

    def _gaps(
        self, rows: NDArray[np.int64], ids: NDArray[np.int32], head: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Order of the entries (heads by position, then rests; by rank in each) and their rank gaps, from 1."""
        run = (~head).astype(np.int64) * (int(rows.max(initial=0)) + 1) + rows
        key = (run << ID_BITS) | self.ranks.rank_of[ids]
        order = np.argsort(key, kind="stable")
        key = key[order]
        run, rank = key >> ID_BITS, key & ((1 << ID_BITS) - 1)
        gaps = np.diff(rank, prepend=0)
        first = np.diff(run, prepend=-1) != 0
        gaps[first] = rank[first] + 1
        return order, gaps

    def _ids(self, planes: Planes, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids of all runs, int64 [counts.sum()]."""
        octaves = _first(planes["octaves"], int(counts.sum())).astype(np.int64)
        if octaves.max(initial=0) > ID_BITS:
            raise ValueError("a gap leads outside the vocabulary")
        reached = np.concatenate([[0], np.cumsum(_unpack(planes["bits"], octaves), dtype=np.int64)])
        before = reached[np.cumsum(counts) - counts]
        ranks = reached[1:] - np.repeat(before + 1, counts)
        if ranks.max(initial=0) >= len(self.ranks.id_of):
            raise ValueError("a gap leads outside the vocabulary")
        ids: NDArray[np.int64] = self.ranks.id_of.take(ranks).astype(np.int64)
        return ids

    def _codes(
        self,
        weights: NDArray[np.float64],
        rows: NDArray[np.int64],
        mass: NDArray[np.float64],
        context: Context,
    ) -> NDArray[np.int64]:
        """Codes of the head weights, which stand in rising order of `rows`; mass float64 [L] is the rest's."""
        if self.plan.scheme == "random":
            return np.rint(weights * self.plan.draws).astype(np.int64)
        low, share = _cell_of(self._weights, weights)
        if self.plan.scheme != "pps":
            # topk's code 0 would be no weight at all
            return np.maximum(low + (share > 0.5), int(self.plan.scheme == "topk"))
        uniform = self._uniforms(context.key, len(weights) + len(mass))
        codes = low + (share > uniform[: len(weights)])
        mass_low, mass_share = _cell_of(self._masses, mass)
        mass_codes = mass_low + (mass_share > uniform[len(weights) :])
        largest = _largest(weights, rows)
        largest = largest[weights[largest] > mass[rows[largest]]]
        codes[largest] = LEVELS + 1 + mass_codes[rows[largest]]
        # Rounding up in several places may leave too little. Such rows are rounded down throughout.
        shares = self._split(codes, rows, context)
        squeezed = np.where(shares.marked, shares.largest, shares.mass) < 0
        codes = np.where(squeezed[rows], low, codes)
        codes[largest] = np.where(squeezed[rows], LEVELS + 1 + mass_low[rows], codes)[largest]
        return codes

    def _uniforms(self, key: str, count: int) -> NDArray[np.float64]:
        """Uniform numbers in [0, 1) for the rounding of one window."""
        digest = hashlib.blake2b(f"{self.plan.seed}/{key}/rounding".encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)

    def _split(self, codes: NDArray[np.int64], rows: NDArray[np.int64], context: Context) -> Shares:
        """Under `pps`: what rest and largest head entry of each position weigh."""
        length = len(context.labels)
        marked = codes > LEVELS
        if codes.max(initial=0) > 2 * LEVELS + 1:
            raise ValueError("a weight code is too large")
        if np.bincount(rows[marked], minlength=length).max(initial=0) > 1:
            raise ValueError("a position has two largest entries")
        others = np.bincount(rows, self._units.take(codes), length)
        left = ONE - np.where(self._implied(context), self._label_units[context.label_codes], 0)
        left -= others.astype(np.int64)  # exact: the sums stay below 2^53
        mass = left.copy()
        mass[rows[marked]] = self._mass_units[codes[marked] - LEVELS - 1]
        has_marked = np.zeros(length, bool)
        has_marked[rows[marked]] = True
        return Shares(mass, left - mass, has_marked)

    def _draws(self, mass: NDArray[np.int64], context: Context) -> NDArray[np.int64]:
        """How many draws `pps` makes of a rest of `mass`; 0 without a label."""
        draws = np.maximum(-(-mass // self._tau_units), 1)
        return np.where(context.label_codes == NO_LOG, 0, draws)

    def _pps_logs(
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

    def _logs(
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


def _cells(lowest: float) -> NDArray[np.float64]:
    """Ends of the quantiser's cells, float64 [LEVELS + 1], by multiplication only: equal on every machine."""
    floor = float(np.sqrt(np.sqrt(lowest)))
    root = floor + (1.0 - floor) / LEVELS * np.arange(LEVELS + 1)
    root[-1] = 1.0
    return root * root * (root * root)


def _cell_of(
    ends: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The cell each value lies in, and where inside it, 0 to 1."""
    low = np.clip(np.searchsorted(ends, values, side="right") - 1, 0, LEVELS - 1)
    return low, (values - ends[low]) / (ends[low + 1] - ends[low])


def _largest(weights: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the first largest weight of each row that has any; `rows` rise."""
    starts = np.diff(rows, prepend=-1).nonzero()[0]
    if not len(starts):
        return starts
    most = np.maximum.reduceat(weights, starts)
    candidates = (weights == np.repeat(most, np.diff(starts, append=len(rows)))).nonzero()[0]
    firsts: NDArray[np.int64] = candidates[np.diff(rows[candidates], prepend=-1) != 0]
    return firsts


def _label_units() -> NDArray[np.int64]:
    """exp(-code / LOG_STEPS) in units of 1 / ONE, int64 [65536], by multiplication only; 0 for NO_LOG."""
    weights = np.multiply.accumulate(np.concatenate([[1.0], np.full(NO_LOG - 1, STEP_RATIO)]))
    return np.append(np.rint(weights * ONE).astype(np.int64), 0)


def _first(plane: NDArray[np.unsignedinteger], count: int) -> NDArray[np.unsignedinteger]:
    if len(plane) < count:
        raise ValueError("a plane is too short")
    return plane[:count]


def _pack(values: NDArray[np.int64], widths: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The low `widths` bits of each value one after the other, lowest first."""
    ends = np.cumsum(widths)
    bit = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - widths, widths)
    return np.packbits(((np.repeat(values, widths) >> bit) & 1).astype(np.uint8), bitorder="little")


def _unpack(bits: NDArray[np.unsignedinteger], octaves: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Gaps from their octaves and the packed bits below them. Raises ValueError if bits are missing."""
    ends = np.cumsum(octaves)
    starts = ends - octaves
    if len(ends) and ends[-1] > 8 * len(bits):
        raise ValueError("a plane is too short")
    buffer = np.zeros(len(bits) + 4, np.uint8)
    buffer[: len(bits)] = bits
    # the 32 bits that start at each byte; a copy, for aligned words are read faster
    words = np.ndarray((len(bits) + 1,), np.dtype("<u4"), buffer, 0, (1,)).copy()
    top = np.uint32(1) << octaves.astype(np.uint32)
    shifts = (starts & 7).astype(np.uint32)
    gaps: NDArray[np.unsignedinteger] = ((words.take(starts >> 3) >> shifts) & (top - np.uint32(1))) | top
    return gaps


def _tail(codes: NDArray[np.unsignedinteger], kept: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tail weights: what the kept weights leave, held inside the half step around the log code.

    Near 1 the code alone would be too coarse (its half step is as large as the kept mass), near 0 the sum.
    """
    steps = codes.astype(np.float64)
    least, most = np.exp(-(steps + 0.5) / LOG_STEPS), np.exp(-np.maximum(steps - 0.5, 0.0) / LOG_STEPS)
    return np.where(codes == NO_LOG, 0.0, np.clip(1.0 - kept, least, np.minimum(most, 1 - 1e-9)))


def _padded(
    ids: NDArray[np.int64],
    logs: NDArray[np.float32],
    counts: NDArray[np.int64],
    tail: NDArray[np.float32],
) -> SparseTargets:
    """Entries sorted by row and id -> SparseTargets."""
    length, width = len(counts), int(counts.max(initial=0))
    starts = np.cumsum(counts) - counts
    flat = np.arange(len(ids)) - np.repeat(starts - np.arange(length) * width, counts)
    padded_ids = np.full(length * width, PADDING_ID, np.int32)
    logprobs = np.full(length * width, -np.inf, np.float32)
    padded_ids[flat] = ids.astype(np.int32)
    logprobs[flat] = logs
    shape = (length, width)
    return SparseTargets(
        ids=torch.from_numpy(padded_ids.reshape(shape)),
        logprobs=torch.from_numpy(logprobs.reshape(shape)),
        tail=torch.from_numpy(tail),
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
