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
from ddk_pipe.pipeline.targets.schemes import BLOCK, most_slots, pps, random_draws, top_with_tail
from ddk_pipe.pipeline.targets.selected import Kept, Selected, join
from ddk_pipe.pipeline.targets.sparse import PADDING_ID, SparseTargets

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

    @property
    def draws_per_position(self) -> int:
        """At most so many; the schemes that draw nothing look at no blocks."""
        return {"pps": most_slots(self.tau), "random": self.draws}.get(self.scheme, 0)

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
    """Teacher logits -> what the cache keeps, on the logits' device, which the host waits for once a block of rows.

    logits [N, V] in any float type; on the host labels int64 [N] (negative: no label, no targets) and uniforms
    float64 [temperatures, N, plan.uniforms_per_position]. Probabilities are formed in float32 over the whole
    vocabulary. Raises FloatingPointError if a labelled row holds NaN or +inf.
    """
    rows = _rows_at_once(logits, plan)
    blocks = [slice(start, start + rows) for start in range(0, max(len(logits), 1), rows)]
    return join([_select_block(logits[rows], labels[rows], plan, uniforms[:, rows]) for rows in blocks])


def _rows_at_once(logits: Tensor, plan: Plan) -> int:
    on_cpu = logits.device.type == "cpu"
    width = logits.shape[1]
    if not on_cpu:  # every slot of a draw looks at a block of tokens, in float32 and in float64
        width = max(width, 3 * BLOCK * plan.draws_per_position)
    return max(1, BLOCK_BYTES[on_cpu] // (4 * width))


def _select_block(logits: Tensor, labels: Tensor, plan: Plan, uniforms: Tensor) -> Selected:
    on_host = torch.from_numpy(np.flatnonzero(labels.cpu().numpy() >= 0))  # where it is known without a wait
    label_logprobs = torch.full(labels.shape, float("nan"), device=logits.device)
    if len(on_host) == 0:
        return Selected(label_logprobs, (_silent(len(labels), 0, logits.device),) * len(plan.temperatures))
    live, taken = _sent(on_host, logits.device), _sent(labels[on_host], logits.device)
    uniforms = _sent(uniforms[:, on_host], logits.device)
    if len(live) < len(labels):
        logits = logits[live]
    p = torch.softmax(logits, dim=1, dtype=torch.float32)
    chances = p.gather(1, taken[:, None])[:, 0]
    # float32 softmax over a large vocabulary sums to 1 only within 2e-5, which 1 - p of a likely label must not carry
    excess = p.sum(1).log()
    kept = []
    for temperature, numbers in zip(plan.temperatures, uniforms, strict=True):
        softened = p if temperature == 1.0 else torch.softmax(logits.float() / temperature, dim=1)
        kept.append(select(softened, plan, numbers))
    widths = [(each.targets.ids >= 0).sum(1).amax() for each in kept]
    is_nan = p[:, 0].isnan().any()  # NaN or +inf anywhere in a row make all of it NaN
    is_rare = (chances < RARE).any()
    broken, rare, *used = _read([is_nan, is_rare, *widths])
    if broken:
        raise FloatingPointError("the teacher's logits hold NaN or infinity")
    logprobs = chances.log()
    if rare:
        logprobs = torch.where(chances < RARE, _exact_logprobs(taken, logits, chances < RARE), logprobs)
    label_logprobs[live] = logprobs - excess
    trimmed = [each.trimmed(width) for each, width in zip(kept, used, strict=True)]
    return Selected(label_logprobs, tuple(_spread(each, live, len(labels)) for each in trimmed))


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """The same on the device; the host does not wait for it."""
    if device.type == "cpu" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _read(facts: list[Tensor]) -> list[int]:
    """Single numbers, read from the device together: the one wait of a block."""
    values: list[int] = torch.stack([fact.long() for fact in facts]).tolist()
    return values


def _exact_logprobs(labels: Tensor, logits: Tensor, wanted: Tensor) -> Tensor:
    """log p of the labels where wanted [N], float32 [N]: where p has underflowed. Of all it would be one more pass."""
    rows = wanted.nonzero()[:, 0]
    exact = torch.log_softmax(logits[rows], dim=1, dtype=torch.float32)
    out = torch.zeros(len(labels), device=logits.device)
    out[rows] = exact.gather(1, labels[rows, None])[:, 0]
    return out


def select(p: Tensor, plan: Plan, uniforms: Tensor) -> Kept:
    """One temperature: float32 probabilities [N, V], uniforms float64 [N, draws] -> what is kept."""
    if plan.scheme == "pps":
        return pps(p, plan.tau, uniforms[:, 0])
    if plan.scheme == "random":
        return Kept.exact(random_draws(p, uniforms))
    if plan.scheme == "threshold":
        return Kept.exact(top_with_tail(p, plan.cap, floor=plan.tau))
    return Kept.exact(top_with_tail(p, plan.k, floor=0.0))


def _spread(chosen: Kept, live: Tensor, positions: int) -> Kept:
    """Rows of `chosen` at positions `live` of `positions`; the others say nothing."""
    targets = chosen.targets
    spread = _silent(positions, targets.ids.shape[1], live.device)
    out = spread.targets
    out.ids[live], out.logprobs[live], out.tail[live] = targets.ids, targets.logprobs, targets.tail
    spread.head[live], spread.mass[live] = chosen.head, chosen.mass
    return spread


def _silent(positions: int, width: int, device: torch.device) -> Kept:
    """Positions that say nothing."""
    return Kept.exact(
        SparseTargets(
            ids=torch.full((positions, width), PADDING_ID, dtype=torch.int32, device=device),
            logprobs=torch.full((positions, width), float("-inf"), device=device),
            tail=torch.full((positions,), float("-inf"), device=device),
        )
    )
