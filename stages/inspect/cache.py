"""What `ddk-pipe inspect` says of a cache: from its commit records, and from a few windows of each domain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from ddk_pipe.pipeline.storage import Folder
from ddk_pipe.stages.common import new_table, perplexity

if TYPE_CHECKING:
    from ddk_pipe.pipeline.cache import CacheReader, CacheSpec, Shard, ShardRecord

SAMPLE_WINDOWS = 20  # of a domain, decoded
PARTS = ("tokens", "starts", "labels", "heads", "draws", "tails", "octaves", "bits", "codes", "metadata")
Records = dict[str, dict["Shard", "ShardRecord"]]  # by domain


def cache_tables(folder: Folder) -> Iterator[Table]:
    """Raises DdkError if `folder` holds no cache, or a damaged one."""
    from ddk_pipe.pipeline.cache import CacheReader, committed, read_spec

    spec = read_spec(folder)
    yield _facts(folder, spec)
    records: Records = {domain: {} for domain in spec.domains}
    for shard, record in committed(folder, spec):
        records[shard.domain][shard] = record
    yield _shards(spec, records)
    if any(records.values()):
        yield _bytes_by_part(records)
        for temperature in spec.plan.temperatures:
            yield _targets(CacheReader(folder, temperature), records, temperature)


def _facts(folder: Folder, spec: CacheSpec) -> Table:
    out = new_table(f"cache {folder.name}", "what", "value")
    for name, value in {**spec.about, **spec.identity(), "fingerprint": spec.fingerprint}.items():
        out.add_row(escape(name), escape(_text(value)))
    return out


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return str(value)


def _shards(spec: CacheSpec, records: Records) -> Table:
    title = "shards: entries and bytes per position, nats per token and perplexity of the teacher"
    out = new_table(
        title, "split", "shards", "windows", "positions", "entries", "bytes", "nats", "perplexity"
    )
    for domain, sizes in spec.domains.items():
        for split, size in sizes.items():
            mine = [record for shard, record in records[domain].items() if shard.split == split]
            positions = sum(record.positions for record in mine)
            nats = sum(record.label_nats for record in mine) / max(positions, 1)
            out.add_row(
                escape(f"{domain}/{split}"),
                f"{len(mine):,} of {size.shards:,}",
                f"{size.windows:,}",
                f"{positions:,}",
                f"{sum(record.entries for record in mine) / max(positions, 1):.1f}",
                f"{sum(record.target_bytes for record in mine) / max(positions, 1):.1f}",
                f"{nats:.3f}" if positions else "",
                f"{perplexity(nats):,.5g}" if positions else "",
            )
    return out


def _bytes_by_part(records: Records) -> Table:
    """By array, all temperatures together; commit records left out."""
    sizes = {domain: _sizes(list(mine.values())) for domain, mine in records.items()}
    parts = [part for part in PARTS if any(part in size for size in sizes.values())]
    out = new_table("bytes/position by part", "domain", *parts, "all")
    for domain, mine in records.items():
        positions = max(sum(record.positions for record in mine.values()), 1)
        figures = [sizes[domain].get(part, 0) / positions for part in parts]
        out.add_row(escape(domain), *(f"{figure:.2f}" for figure in (*figures, sum(figures))))
    return out


def _sizes(records: list[ShardRecord]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for record in records:
        for name, size in record.sizes.items():
            part = (
                "metadata" if name.endswith("zarr.json") else name.removesuffix("/c/0/0").rpartition("/")[2]
            )
            sizes[part] = sizes.get(part, 0) + size
    return sizes


@dataclass(frozen=True)
class Kept:
    """Of each labelled position of a sample: entries, and how its mass of 1 is shared out."""

    entries: NDArray[np.int64]
    head: NDArray[np.float64]  # kept as they are
    rest: NDArray[np.float64]  # stood for by draws
    tail: NDArray[np.float64]  # one bucket


def _targets(reader: CacheReader, records: Records, temperature: float) -> Table:
    title = f"targets at temperature {temperature:g}, from at most {SAMPLE_WINDOWS} windows a domain"
    quantiles = ("10%", "50%", "90%")
    out = new_table(
        title, "domain", "positions", *(f"entries {q}" for q in quantiles), "head mass", "rest", "tail"
    )
    for domain, mine in records.items():
        kept = _sample(reader, list(mine))
        if kept is None:
            continue
        entries = np.quantile(kept.entries, [0.1, 0.5, 0.9])
        masses = [float(mass.mean()) for mass in (kept.head, kept.rest, kept.tail)]
        out.add_row(
            escape(domain),
            f"{len(kept.entries):,}",
            *(f"{entry:.0f}" for entry in entries),
            *(f"{mass:.3f}" for mass in masses),
        )
    return out


def _sample(reader: CacheReader, shards: list[Shard]) -> Kept | None:
    """Windows spread evenly over the shards of a domain; None if they have no label."""
    if not shards:
        return None
    ends = np.cumsum([shard.windows for shard in shards])
    count = min(SAMPLE_WINDOWS, int(ends[-1]))
    kept = []
    for at in np.unique(np.linspace(0, int(ends[-1]) - 1, count).round().astype(int)).tolist():
        number = int(np.searchsorted(ends, at, side="right"))
        last = shards[number].first_window + shards[number].windows
        kept.append(_kept(reader, shards[number], last + at - int(ends[number])))
    if not sum(len(one.entries) for one in kept):
        return None
    return Kept(*(np.concatenate([getattr(one, name) for one in kept]) for name in vars(kept[0])))


def _kept(reader: CacheReader, shard: Shard, number: int) -> Kept:
    plan = reader.spec.plan
    window = reader.read(shard.domain, shard.split, number)
    live = window.labels >= 0
    weights = np.exp(window.targets.logprobs.numpy()[live].astype(np.float64))
    lowest = {"pps": plan.tau * (1 - 1e-6), "random": 2.0}.get(plan.scheme, 0.0)
    head = np.where(weights >= lowest, weights, 0.0).sum(1)
    return Kept(
        entries=(window.targets.ids.numpy()[live] >= 0).sum(1),
        head=head,
        rest=weights.sum(1) - head,
        tail=np.exp(window.targets.tail.numpy()[live].astype(np.float64)),
    )
