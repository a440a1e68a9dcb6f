"""What `verify` found in a cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ddk_pipe.pipeline.cache.record import ShardRecord
from ddk_pipe.pipeline.cache.shards import Shard
from ddk_pipe.pipeline.cache.soundness import ShardFacts


@dataclass
class SplitReport:
    """What one split holds; the sums are over its sound shards, bytes over all files of their groups."""

    shards: int = 0
    committed: int = 0
    sound: int = 0
    windows: int = 0
    positions: int = 0  # with a label
    entries: int = 0  # over all temperatures
    label_nats: float = 0.0  # minus the sum of the labels' log-probabilities
    target_bytes: int = 0
    input_bytes: int = 0

    def add(self, shard: Shard, record: ShardRecord, facts: ShardFacts) -> None:
        """A sound shard more."""
        self.sound += 1
        self.windows += shard.windows
        self.positions += facts.positions
        self.entries += facts.entries
        self.label_nats += facts.label_nats
        self.target_bytes += record.target_bytes
        self.input_bytes += record.input_bytes


@dataclass(frozen=True)
class Leftover:
    """Something a writer left behind; `removable` says if a repair takes it away now, `why` if or why not."""

    name: str
    why: str
    removable: bool


@dataclass
class Report:
    """What `verify` found, by the names of shards, domains and files; `removed` is what a repair took away.

    A shard is in at most one of `missing`, `bad` and `undecodable`. The values of `tables` and `bad` are the
    problems, one line each.
    """

    cache: str
    splits: dict[str, SplitReport] = field(default_factory=dict)  # by "<domain>/<split>"
    missing: list[str] = field(default_factory=list)  # shards that are not committed
    tables: dict[str, str] = field(default_factory=dict)  # domains whose rank table is missing or damaged
    undecodable: list[str] = field(default_factory=list)  # committed shards of those domains
    bad: dict[str, str] = field(default_factory=dict)  # committed shards with a problem
    leftovers: list[Leftover] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # files that no ddk-pipe would look for here
    removed: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """True if students can rely on all of the cache. A shard that a repair dropped is still to be made again."""
        return not (self.missing or self.tables or self.bad)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"sound": self.sound, **asdict(self)}
