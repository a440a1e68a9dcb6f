"""SparseTargets of one window <-> small integer planes that stock compressors shrink well.

Ids become ranks in the domain's frequency table and are stored as sorted gaps, the head apart from the rest (`gaps`);
weights become codes (`weights`, which also bounds the error). Three kinds of entries, by what their weight costs:

| kind  | which                                              | weight                                            |
|-------|----------------------------------------------------|---------------------------------------------------|
| label | the true next token where its p >= tau, at T = 1   | known: the cache holds its log-probability anyway |
| head  | the others that have a weight of their own (`Kept`) | u8 code, uniform in p^(1/4)                       |
| rest  | draws from below tau (`pps` only)                  | equal shares of the rest's mass                   |

| scheme    | label entry        | codes of the head                         | tail         |
|-----------|--------------------|-------------------------------------------|--------------|
| pps       | implied            | rounded at random: E[decoded] = p         | none         |
| threshold | implied, if tau * cap >= 1 (the cap never cuts) | to the nearest | u16 log code |
| topk      | in the head        | to the nearest                            | u16 log code |
| random    | in the head        | the count of draws, exact                 | none         |

A label surely in the head is implied: its code is two steps or more above tau. Under `pps` the number of rest entries is stored as its difference from the number of draws that the rest's mass asks for.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.targets.gaps import ID_BITS, ids_of, octaves_and_bits, rank_gaps
from ddk_pipe.pipeline.targets.quantisers import LEVELS, encode_log
from ddk_pipe.pipeline.targets.ranks import Ranks
from ddk_pipe.pipeline.targets.selected import Kept
from ddk_pipe.pipeline.targets.selection import Plan
from ddk_pipe.pipeline.targets.sparse import PADDING_ID, SparseTargets
from ddk_pipe.pipeline.targets.weights import LABEL, LARGEST, REST, WeightCodec
from ddk_pipe.pipeline.targets.window import Context, Planes, used

KIND_BITS = 10  # kind of an entry while decoding: a head code, or LARGEST, REST or LABEL
MOST_ENTRIES = 1 << 23  # of a window: decoding takes some 85 bytes for each
MOST_PADDED = 1 << 24  # positions times the most entries of one: one long row makes all others as wide


class Codec:
    """Encodes and decodes windows at one temperature: a pure function of plan, temperature and rank table.

    `planes` names the arrays of a window with their types: heads [L], draws [L] (pps), tails [L] (threshold, topk),
    octaves [entries], bits [bytes], codes [head entries, then the rows of likely labels]; entries run over the heads by
    position, then the rests. `label_rests` False reads caches of schema version 2 (`WeightCodec`).
    """

    def __init__(
        self, plan: Plan, ranks: Ranks, temperature: float = 1.0, *, label_rests: bool = True
    ) -> None:
        if len(ranks.id_of) > 1 << ID_BITS:
            raise ValueError(f"a vocabulary of {len(ranks.id_of):,} is too large")
        self.plan, self.ranks = plan, ranks
        self.weights = WeightCodec(plan, temperature, label_rests=label_rests)
        many = np.dtype("u4") if plan.scheme == "pps" and plan.tau < 1 / 30_000 else np.dtype("u2")
        extra = {"draws": many} if plan.scheme == "pps" else {}
        extra |= {"tails": np.dtype("u2")} if plan.has_tail else {}
        one_byte = {name: np.dtype("u1") for name in ("octaves", "bits", "codes")}
        self.planes: dict[str, np.dtype[np.unsignedinteger]] = {"heads": many, **extra, **one_byte}

    def cell(self, weight: float) -> float:
        """Bound on what coding changes of a head weight before the row is made to sum to 1 (`WeightCodec.cell`)."""
        return self.weights.cell(weight)

    def encode(self, kept: Kept, context: Context) -> Planes:
        """Raises ValueError for targets that break the invariants of SparseTargets or contradict the context."""
        kept.targets.validate(len(self.ranks.id_of))
        length = kept.targets.positions
        all_ids = kept.targets.ids.cpu().numpy()
        rows, columns = np.nonzero(all_ids >= 0)
        ids, head = all_ids[rows, columns], kept.head.cpu().numpy()[rows, columns]
        weights = np.exp(kept.targets.logprobs.cpu().numpy()[rows, columns].astype(np.float64))
        implied = self.weights.implied(context)
        is_label = implied[rows] & (ids == context.labels[rows]) & head
        if is_label.sum() != implied.sum():
            raise ValueError("a label likely enough for the head is not among the targets")
        label = np.bincount(rows[is_label], weights[is_label], length).astype(np.float64)
        rows, ids, weights, head = (values[~is_label] for values in (rows, ids, weights, head))
        order, gaps = rank_gaps(self.ranks, rows, ids, head)
        cut = int(head.sum())
        head_rows, rests = rows[order[:cut]], np.bincount(rows[order[cut:]], minlength=length)
        octaves, bits = octaves_and_bits(gaps)
        planes = {"heads": np.bincount(head_rows, minlength=length), "octaves": octaves, "bits": bits}
        if self.plan.scheme == "pps":
            mass = kept.mass.cpu().numpy()
            codes = self.weights.pps_codes(weights[order[:cut]], head_rows, label, mass, context)
            shares = self.weights.split(codes, head_rows, context)
            difference = rests - self.weights.draws(shares.mass, context)
            planes["draws"] = (difference << 1) ^ (difference >> 63)  # zigzag: 0, -1, 1, -2, ...
        else:
            codes = self.weights.codes(weights[order[:cut]])
        planes["codes"] = codes
        if self.plan.has_tail:
            planes["tails"] = encode_log(kept.targets.tail.cpu().numpy())
        return {name: planes[name].astype(dtype) for name, dtype in self.planes.items()}

    def decode(self, planes: Planes, context: Context) -> SparseTargets:
        """Inverse of encode; planes may be longer than they need to be. Raises ValueError if they contradict each other."""
        heads = planes["heads"].astype(np.int64)
        length, cut = len(heads), int(heads.sum())
        with_rests = cut + int(self.weights.has_rest(context).sum())
        codes = used(planes["codes"], with_rests).astype(np.int64)
        head_rows = np.repeat(np.arange(length), heads)
        implied = self.weights.implied(context)
        rests, kinds = np.zeros(length, np.int64), codes[:cut]
        if self.plan.scheme == "pps":
            shares = self.weights.split(codes, head_rows, context)
            kinds = np.where(kinds > LEVELS, LARGEST, kinds)
            zigzag = planes["draws"].astype(np.int64)
            rests = self.weights.draws(shares.mass, context) + ((zigzag >> 1) ^ -(zigzag & 1))
            if (rests < 0).any() or rests.max(initial=0) > len(self.ranks.id_of):
                raise ValueError("heads and draws do not fit together")
        most = int((heads + rests).max(initial=0)) + 1
        if length * most > MOST_PADDED:
            raise ValueError(f"{length:,} positions of up to {most:,} entries are too many")
        counts = np.concatenate([heads, rests])
        ids = ids_of(self.ranks, planes, counts)
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
                self.weights.pps_logs(kinds, rows, shares, rests, context),
                np.full(length, -np.inf, np.float32),
            )
        else:
            logs, tail = self.weights.logs(planes, kinds, rows, length, context)
        return _padded(ids, logs, heads + rests + implied, tail)


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
