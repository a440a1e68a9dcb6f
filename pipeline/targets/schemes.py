"""The four ways to thin a distribution: probabilities [N, V] of one temperature in, SparseTargets out.

On a CPU tensors are as wide as their rows need. Elsewhere the host would have to wait to learn that width, so they
are as wide as any row could need, filled up with nothing; a row more at the end takes what nothing writes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddk_pipe.pipeline.targets.selected import Kept
from ddk_pipe.pipeline.targets.sparse import PADDING_ID, SparseTargets

BLOCK = 256  # tokens per block of the two-level draw
ASKED_FREELY = {"cpu"}  # devices that the host need not wait for


def most_slots(tau: float) -> int:
    """So many entries of a row can reach tau, and so many draws can be made of weight tau: its weights sum to 1."""
    return math.ceil(1.01 / tau)


def pps(p: Tensor, tau: float, offsets: Tensor) -> Kept:
    """Exact head p >= tau and n = ceil(R / tau) systematic draws of weight R / n from the rest, of mass R.

    p float32 [N, V], offsets float64 [N] in [0, 1). E[weight] = p for every token; the weights of a row
    sum to 1. Draws run in token-id order (no sort needed; as good as the best order tried, facts/cache.md).
    A token drawn twice weighs at least tau and counts as head: the draws of a row all weigh the same.
    """
    p, most = _blocks(p), most_slots(tau)
    sums = p.sum(2)
    head_ids, head_weights = _take_head(p, sums, tau)
    outer = sums[:-1].double().cumsum(1)
    mass = outer[:, -1]
    draws = torch.where(mass > 0, (mass / tau).ceil().clamp_min(1), 0).long()
    step = torch.arange(max(_width(draws, most), 1), device=p.device)
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
        _draw(p, p.sum(2)[:-1].double().cumsum(1), points, torch.ones_like(points, dtype=torch.bool))
    )
    return _build(ids, counts.double(), ids >= 0)[0]


def _blocks(p: Tensor) -> Tensor:
    """A copy of p [N, V] as [N + 1, B, BLOCK]: the vocabulary in blocks, filled up with zeros, and a row of zeros."""
    width = -(-p.shape[1] // BLOCK) * BLOCK
    blocks = p.new_empty(len(p) + 1, width)
    blocks[:-1, : p.shape[1]] = p
    blocks[:-1, p.shape[1] :] = 0.0
    blocks[-1] = 0.0
    return blocks.view(len(blocks), width // BLOCK, BLOCK)


def _take_head(p: Tensor, sums: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Entries >= tau of p [N + 1, B, BLOCK] as padded ids [N, H] (-1) and float64 weights (0).

    Takes them out of p (they become zero) and of its block sums [N + 1, B].
    """
    rows, blocks, most = *sums.shape, most_slots(tau)
    # only these can hold any, rounding included
    row, block = _true_at(sums >= tau * 0.999, (rows - 1) * min(blocks, most))
    candidates = p[row, block]
    at, lane = _true_at(candidates >= tau, (rows - 1) * most)
    weight = candidates[at, lane].double()
    candidates[at, lane] = 0.0
    sums[row, block] = candidates.sum(1)
    row, block = row[at] % rows, block[at]
    counts = torch.zeros(rows, dtype=torch.int64, device=p.device)
    counts.scatter_add_(0, row, torch.ones_like(row))
    width = _width(counts[:-1], most)
    slot = (torch.arange(len(row), device=p.device) - (counts.cumsum(0) - counts)[row]).clamp_max(width - 1)
    ids = torch.full((rows, width), PADDING_ID, device=p.device)
    weights = torch.zeros((rows, width), dtype=torch.float64, device=p.device)
    ids[row, slot], weights[row, slot] = block * BLOCK + lane, weight
    p[row, block, lane] = 0.0
    return ids[:-1], weights[:-1]


def _true_at(mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows and columns where mask [R, C] is True, in order. Where the host would have to wait for their number:
    most + 1 of each, filled up with -1, so that the last of them is always -1."""
    if mask.device.type in ASKED_FREELY:
        row, column = mask.nonzero(as_tuple=True)
    else:
        row, column = torch.nonzero_static(mask, size=most + 1).unbind(1)
    return row, column


def _width(counts: Tensor, most: int) -> int:
    """The largest of the counts, or `most` where the host would have to wait for it."""
    if counts.device.type not in ASKED_FREELY:
        return most
    return int(counts.max()) if len(counts) else 0


def _draw(p: Tensor, outer: Tensor, points: Tensor, live: Tensor) -> Tensor:
    """Token ids at points [N, D], shares in [0, 1] of each row's mass cumulated in id order; -1 where not live [N, D].

    p [N + 1, B, BLOCK]; outer float64 [N, B]: its block sums, cumulated. Two levels, blocks and then tokens inside one,
    each cumulated in float64: a float32 running sum over a large vocabulary loses the tail, and a float64 one over
    all of it costs more than the softmax. The sum of one block is good enough in float32.
    """
    block, residual = _find(outer, points * outer[:, -1:])
    # a third of the slots: rows have as many as the flattest of them draws
    row, slot = _true_at(live, live.numel())
    block, residual = block[row, slot], residual[row, slot]
    lane, _ = _find(p[row, block].cumsum(1, dtype=torch.float64), residual[:, None])
    ids = torch.full((len(points) + 1, points.shape[1]), PADDING_ID, device=points.device)
    ids[row, slot] = block * BLOCK + lane[:, 0]
    return ids[:-1]


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
    others = p.scatter(1, ids, torch.where(kept, 0.0, values))
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
    width = _width((ids >= 0).sum(1), ids.shape[1])
    ids, weights = ids[:, :width], torch.where(ids >= 0, weights, 0.0)[:, :width]
    tail = torch.full((len(ids),), float("-inf"), device=ids.device).double() if tail is None else tail
    total = weights.sum(1) + tail.exp()
    targets = SparseTargets(
        ids=ids.int(),
        logprobs=(weights.log() - total.log()[:, None]).float(),
        tail=(tail - total.log()).float(),
    )
    return targets, head[:, :width], total
