"""Dense teacher probabilities -> SparseTargets: a head kept exactly and a rule for the rest.

| scheme    | head            | rest, of mass R                              | property            |
|-----------|-----------------|----------------------------------------------|---------------------|
| pps       | every p >= tau  | n = ceil(R / tau) systematic draws of R / n  | unbiased            |
| threshold | every p >= tau  | one bucket: tail = log R                     | biased in the tail  |
| topk      | the k largest   | one bucket: tail = log R                     | biased in the tail  |
| random    | none            | n draws with replacement, weight count / n   | unbiased, noisier   |

pps is threshold (probability-proportional-to-size) sampling; random is Random Sampling KD (arXiv 2503.16870).
Every draw is a pure function of (cache seed, domain, split, shard, window, temperature, position): a shard
computed twice is the same, byte for byte, on the same backend.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.targets.selected import Kept, Selected, join
from ddk_pipe.pipeline.targets.sparse import PADDING_ID, SparseTargets

BLOCK = 256  # tokens per block of the two-level draw
HEAD_BYTES = 256 << 20  # memory for the logits of one run of the output layer: at 64 MB its product is slower
RARE = 1e-30  # probabilities below lose digits in float32, and vanish near 1e-38
# rows selected at once, on a CPU (few enough for its cache, many enough that calls of torch cost little) or elsewhere
BLOCK_BYTES = {True: 16 << 20, False: 256 << 20}


@dataclass(frozen=True)
class Plan:
    """What is kept of each distribution: the manifest's cache section without its folders."""

    scheme: str
    tau: float
    k: int
    cap: int
    draws: int
    temperatures: tuple[float, ...]
    seed: int

    @classmethod
    def of(cls, cache: manifest.Cache) -> Plan:
        return cls(
            cache.scheme, cache.tau, cache.k, cache.cap, cache.draws, tuple(cache.temperatures), cache.seed
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        return cls(**{**values, "temperatures": tuple(values["temperatures"])})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "temperatures": list(self.temperatures)}

    def settings(self) -> dict[str, Any]:
        """Only what this scheme depends on: caches that differ in nothing else are the same."""
        used = {"pps": ["tau"], "threshold": ["tau", "cap"], "topk": ["k"], "random": ["draws"]}[self.scheme]
        values = self.to_dict()
        seed = ["seed"] if self.scheme in ("pps", "random") else []
        return {name: values[name] for name in ["scheme", *used, "temperatures", *seed]}

    @property
    def has_tail(self) -> bool:
        """True if targets carry a bucket for the unkept mass."""
        return self.scheme in ("threshold", "topk")

    @property
    def uniforms_per_position(self) -> int:
        return {"pps": 1, "random": self.draws}.get(self.scheme, 0)

    def uniforms(self, key: str, positions: int) -> NDArray[np.float64]:
        """Uniform numbers in [0, 1), float64 [temperatures, positions, uniforms_per_position].

        `key` names the window: "<domain>/<split>/<shard>/<window>".
        """
        shape = (len(self.temperatures), positions, self.uniforms_per_position)
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        return generator.random(shape)


def head_rows(vocab_size: int) -> int:
    """Positions whose logits [rows, vocab_size] float32 should exist at once: enough for a fast matrix product."""
    return max(16, HEAD_BYTES // (4 * vocab_size))


def select_logits(logits: Tensor, labels: Tensor, plan: Plan, uniforms: Tensor) -> Selected:
    """Teacher logits -> what the cache keeps, on the logits' device.

    logits [N, V] in any float type, labels int64 [N] (negative: no label, no targets), uniforms float64
    [temperatures, N, plan.uniforms_per_position]. Probabilities are formed in float32 over the whole
    vocabulary. Raises FloatingPointError if a labelled row holds NaN or +inf.
    """
    rows = max(1, BLOCK_BYTES[logits.device.type == "cpu"] // (4 * logits.shape[1]))
    blocks = [slice(start, start + rows) for start in range(0, max(len(logits), 1), rows)]
    return join([_select_block(logits[rows], labels[rows], plan, uniforms[:, rows]) for rows in blocks])


def _select_block(logits: Tensor, labels: Tensor, plan: Plan, uniforms: Tensor) -> Selected:
    live = (labels >= 0).nonzero()[:, 0]
    if len(live) < len(labels):
        logits, uniforms = logits[live], uniforms[:, live]
    p = torch.softmax(logits, dim=1, dtype=torch.float32)
    if bool(p[:, 0].isnan().any()):  # NaN or +inf anywhere in a row make all of it NaN
        raise FloatingPointError("the teacher's logits hold NaN or infinity")
    label_logprobs = torch.full(labels.shape, float("nan"), device=logits.device)
    # float32 softmax over a large vocabulary sums to 1 only within 2e-5, which 1 - p of a likely label must not carry
    label_logprobs[live] = _logprobs_of(labels[live], p, logits) - p.sum(1).log()
    kept = []
    for temperature, numbers in zip(plan.temperatures, uniforms, strict=True):
        softened = p if temperature == 1.0 else torch.softmax(logits.float() / temperature, dim=1)
        kept.append(_spread(select(softened, plan, numbers), live, len(labels)))
    return Selected(label_logprobs, tuple(kept))


def _logprobs_of(labels: Tensor, p: Tensor, logits: Tensor) -> Tensor:
    """log p of the labels, float32 [N], where p has underflowed too: a log-softmax of all would be one more pass."""
    taken = p.gather(1, labels[:, None])[:, 0]
    logprobs = taken.log()
    rare = (taken < RARE).nonzero()[:, 0]
    if len(rare):
        exact = torch.log_softmax(logits[rare], dim=1, dtype=torch.float32)
        logprobs[rare] = exact.gather(1, labels[rare, None])[:, 0]
    return logprobs


def select(p: Tensor, plan: Plan, uniforms: Tensor) -> Kept:
    """One temperature: float32 probabilities [N, V], uniforms float64 [N, draws] -> what is kept."""
    if plan.scheme == "pps":
        return pps(p, plan.tau, uniforms[:, 0])
    if plan.scheme == "random":
        return Kept.exact(random_draws(p, uniforms))
    if plan.scheme == "threshold":
        return Kept.exact(top_with_tail(p, plan.cap, floor=plan.tau))
    return Kept.exact(top_with_tail(p, plan.k, floor=0.0))


def pps(p: Tensor, tau: float, offsets: Tensor) -> Kept:
    """Exact head p >= tau and n = ceil(R / tau) systematic draws of weight R / n from the rest, of mass R.

    p float32 [N, V], offsets float64 [N] in [0, 1). E[weight] = p for every token; the weights of a row
    sum to 1. Draws run in token-id order (no sort needed; as good as the best order tried, facts/cache.md).
    A token drawn twice weighs at least tau and counts as head: the draws of a row all weigh the same.
    """
    p = _blocks(p)
    sums = p.sum(2)
    head_ids, head_weights = _take_head(p, sums, tau)
    outer = sums.double().cumsum(1)
    mass = outer[:, -1]
    draws = torch.where(mass > 0, (mass / tau).ceil().clamp_min(1), 0).long()
    step = torch.arange(max(int(draws.max()), 1) if len(draws) else 1, device=p.device)
    live = step < draws[:, None]
    points = (offsets[:, None] + step) / draws.clamp_min(1)[:, None]  # in units of the rest's mass
    ids, counts = _merge(_draw(p, outer, points.clamp_max(1.0), live))
    share = (mass / draws.clamp_min(1))[:, None]
    is_head = torch.cat([head_ids >= 0, counts > 1], dim=1)
    weights = torch.cat([head_weights, counts * share], dim=1)
    targets, is_head, total = _build(torch.cat([head_ids, ids], dim=1), weights, is_head)
    return Kept(targets, is_head, (counts == 1).sum(1) * share[:, 0] / total)


def random_draws(p: Tensor, uniforms: Tensor) -> SparseTargets:
    """n draws with replacement, weight count / n (Random Sampling KD, arXiv 2503.16870). uniforms float64 [N, n]."""
    p = _blocks(p)
    points = uniforms.sort(1).values
    ids, counts = _merge(
        _draw(p, p.sum(2).double().cumsum(1), points, torch.ones_like(points, dtype=torch.bool))
    )
    return _build(ids, counts.double(), ids >= 0)[0]


def _blocks(p: Tensor) -> Tensor:
    """A copy of p [N, V] as [N, B, BLOCK]: the vocabulary in blocks, filled up with zeros."""
    width = -(-p.shape[1] // BLOCK) * BLOCK
    blocks = p.new_empty(len(p), width)
    blocks[:, : p.shape[1]] = p
    blocks[:, p.shape[1] :] = 0.0
    return blocks.view(len(p), width // BLOCK, BLOCK)


def _take_head(p: Tensor, sums: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Entries >= tau of p [N, B, BLOCK] as padded ids [N, H] (-1) and float64 weights (0).

    Takes them out of p (they become zero) and of its block sums [N, B].
    """
    row, block = (sums >= tau * 0.999).nonzero(as_tuple=True)  # only these can hold any, rounding included
    candidates = p[row, block]
    at, lane = (candidates >= tau).nonzero(as_tuple=True)
    weight = candidates[at, lane].double()
    candidates[at, lane] = 0.0
    sums[row, block] = candidates.sum(1)
    row, block = row[at], block[at]
    counts = torch.bincount(row, minlength=len(p))
    slot = torch.arange(len(row), device=p.device) - (counts.cumsum(0) - counts)[row]
    shape = (len(p), int(counts.max()) if len(counts) else 0)
    ids = torch.full(shape, PADDING_ID, device=p.device)
    weights = torch.zeros(shape, dtype=torch.float64, device=p.device)
    ids[row, slot], weights[row, slot] = block * BLOCK + lane, weight
    p[row, block, lane] = 0.0
    return ids, weights


def _draw(p: Tensor, outer: Tensor, points: Tensor, live: Tensor) -> Tensor:
    """Token ids at points [N, D], shares in [0, 1] of each row's mass cumulated in id order; -1 where not live [N, D].

    p [N, B, BLOCK]; outer float64 [N, B]: its block sums, cumulated. Two levels, blocks and then tokens inside one,
    each cumulated in float64: a float32 running sum over a large vocabulary loses the tail, and a float64 one over
    all of it costs more than the softmax. The sum of one block is good enough in float32.
    """
    block, residual = _find(outer, points * outer[:, -1:])
    # a third of the slots: rows have as many as the flattest of them draws
    row, slot = live.nonzero(as_tuple=True)
    block, residual = block[row, slot], residual[row, slot]
    lane, _ = _find(p[row, block].cumsum(1, dtype=torch.float64), residual[:, None])
    ids = torch.full(points.shape, PADDING_ID, device=points.device)
    ids[row, slot] = block * BLOCK + lane[:, 0]
    return ids


def _find(cumulated: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """First index of each row of cumulated [R, C] whose value exceeds the point [R, D], and what is left of
    the point there. A point rounded up to the total falls to the last index that weighs anything."""
    total = cumulated[:, -1:]
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total))).contiguous()
    index = torch.searchsorted(cumulated.contiguous(), points, right=True).clamp_max(cumulated.shape[1] - 1)
    before = torch.where(index > 0, cumulated.gather(1, (index - 1).clamp_min(0)), 0.0)
    return index, points - before


def top_with_tail(p: Tensor, k: int, *, floor: float) -> SparseTargets:
    """The k largest entries with p >= floor (and above 0), exactly; tail = log of the mass of all others.

    The tail is a sum over the others themselves: 1 - sum would cancel where the kept mass is near 1.
    """
    values, ids = p.topk(min(k, p.shape[1]), dim=1)
    kept = (values >= floor) & (values > 0)
    rows, slots = kept.nonzero(as_tuple=True)
    others = p.index_put((rows, ids[rows, slots]), torch.zeros((), device=p.device))
    tail = others.sum(1, dtype=torch.float64).log()
    ids = torch.where(kept, ids, PADDING_ID)
    return _build(ids, torch.where(kept, values, 0.0).double(), kept, tail=tail)[0]


def _merge(picked: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending picks [N, D] (padding -1 last) -> distinct ids [N, D] (padding -1) and how often each came."""
    valid = picked >= 0
    is_new = valid.clone()
    is_new[:, 1:] &= picked[:, 1:] != picked[:, :-1]
    slot = (is_new.cumsum(1) - 1).clamp_min(0)
    counts = torch.zeros(picked.shape, dtype=torch.int64, device=picked.device)
    counts.scatter_add_(1, slot, valid.long())
    ids = torch.full_like(picked, PADDING_ID)
    ids.scatter_reduce_(1, slot, torch.where(valid, picked, PADDING_ID), "amax")
    return ids, counts


def _build(
    ids: Tensor, weights: Tensor, head: Tensor, tail: Tensor | None = None
) -> tuple[SparseTargets, Tensor, Tensor]:
    """Sort by id, trim the padding, and normalise: float32 log-softmax sums to 1 only within 2e-5.

    Returns the targets, `head` in their order, and what the rows summed to, float64 [N].
    """
    order = torch.where(ids >= 0, ids, torch.iinfo(torch.int64).max).argsort(1)
    ids, weights, head = ids.gather(1, order), weights.gather(1, order), head.gather(1, order)
    width = int((ids >= 0).sum(1).max()) if len(ids) else 0
    ids, weights = ids[:, :width], torch.where(ids >= 0, weights, 0.0)[:, :width]
    tail = torch.full((len(ids),), float("-inf"), device=ids.device).double() if tail is None else tail
    total = weights.sum(1) + tail.exp()
    targets = SparseTargets(
        ids=ids.int(),
        logprobs=(weights.log() - total.log()[:, None]).float(),
        tail=(tail - total.log()).float(),
    )
    return targets, head[:, :width], total


def _spread(chosen: Kept, live: Tensor, positions: int) -> Kept:
    """Rows of `chosen` at positions `live` of `positions`; the others say nothing."""
    targets = chosen.targets
    device, width = targets.ids.device, targets.ids.shape[1]
    nothing = Kept.exact(
        SparseTargets(
            ids=torch.full((positions, width), PADDING_ID, dtype=torch.int32, device=device),
            logprobs=torch.full((positions, width), float("-inf"), device=device),
            tail=torch.full((positions,), float("-inf"), device=device),
        )
    )
    out = nothing.targets
    out.ids[live], out.logprobs[live], out.tail[live] = targets.ids, targets.logprobs, targets.tail
    nothing.head[live], nothing.mass[live] = chosen.head, chosen.mass
    return nothing
