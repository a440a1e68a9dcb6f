"""From the samples to the whole text: the figures of every setting, and which one is recommended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ddk_pipe.pipeline.cache import CacheSpec
from ddk_pipe.pipeline.targets import Plan
from ddk_pipe.stages.cache_teacher.estimates.noise import added_noise
from ddk_pipe.stages.cache_teacher.estimates.settings import draw_weight, knobs, name_of
from ddk_pipe.stages.cache_teacher.estimates.trial import Measured, Sample

MOST_NOISE = 0.01  # half of what Random Sampling KD adds with its usual 50 draws


@dataclass(frozen=True)
class Row:
    """One setting. Per position means per position with a label; bytes of targets include the label's code."""

    name: str
    cache: dict[str, Any]  # for the manifest's section `cache`
    entries_per_position: float
    bytes_per_position: float  # tokens left out
    total_bytes: float  # of the whole cache, tokens and records included
    positions_per_second: float
    teacher_seconds: float  # for the whole text
    added_noise: float  # relative to that of a label drawn from the teacher; 0.01 is 1%


@dataclass(frozen=True)
class Estimate:
    """All rows, the manifest's own setting first; `recommended` names one of them."""

    rows: list[Row]
    recommended: str | None
    sampled_positions: int  # with a label
    labels: int  # of the whole text
    positions: int


def figures_of(
    spec: CacheSpec, plans: list[Plan], measured: list[Measured], samples: list[Sample]
) -> Estimate:
    """One row for each plan, in their order; the noise of each is judged by the two quietest unbiased others."""
    unbiased = [number for number, plan in enumerate(plans) if not plan.has_tail]
    unbiased.sort(key=lambda number: draw_weight(plans[number]))
    rows = []
    for number, plan in enumerate(plans):
        others = [measured[index].targets for index in unbiased if index != number][:2]
        noise = 0.0 if plan.has_tail else added_noise(measured[number].targets, *others)
        rows.append(_row(spec, plan, measured[number], samples, noise))
    return Estimate(
        rows=rows,
        recommended=_recommended([row for row in rows if row.cache["scheme"] == "pps"]),
        sampled_positions=sum(sizes.labels for sizes in measured[0].domains),
        labels=sum(sample.labels for sample in samples),
        positions=sum(sample.positions for sample in samples),
    )


def _recommended(rows: list[Row]) -> str | None:
    """The largest tau whose noise is small enough, else the smallest there is."""
    rows = sorted(rows, key=lambda row: -row.cache["tau"])
    quiet = [row.name for row in rows if row.added_noise <= MOST_NOISE]
    return next(iter(quiet + [row.name for row in rows[-1:]]), None)


def _row(spec: CacheSpec, plan: Plan, measured: Measured, samples: list[Sample], noise: float) -> Row:
    """From the sample to the whole text: what depends on labels grows with them, metadata with the shards."""
    targets, tokens, entries = 0.0, 0.0, 0.0
    for sizes, sample in zip(measured.domains, samples, strict=True):
        growth = sample.labels / max(sizes.labels, 1)
        targets += sizes.target_bytes * growth
        entries += sizes.entries * growth
        tokens += sizes.input_bytes * sample.positions / (len(sample.windows) * spec.seq_len)
    shards = sum(size.shards for domain in spec.domains.values() for size in domain.values())
    targets += shards * float(np.mean([size for sizes in measured.domains for size in sizes.target_fixed]))
    tokens += shards * float(np.mean([size for sizes in measured.domains for size in sizes.input_fixed]))
    records = shards * float(np.mean([size for sizes in measured.domains for size in sizes.record_bytes]))
    tables = 4 * spec.vocab_size * len(samples)
    labels = max(sum(sample.labels for sample in samples), 1)
    rate = sum(len(sample.windows) for sample in samples) * spec.seq_len / max(measured.seconds, 1e-9)
    return Row(
        name=name_of(plan),
        cache={"scheme": plan.scheme, **knobs(plan)},
        entries_per_position=entries / labels,
        bytes_per_position=targets / labels,
        total_bytes=targets + tokens + records + tables,
        positions_per_second=rate,
        teacher_seconds=sum(sample.positions for sample in samples) / rate,
        added_noise=noise,
    )
