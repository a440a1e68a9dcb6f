"""How a domain's windows are cut into shards, and which of these are committed."""

from __future__ import annotations

from dataclasses import dataclass

from ddk_pipe.pipeline.storage import Folder
from ddk_pipe.pipeline.text import Split


@dataclass(frozen=True)
class SplitSize:
    """How one split is cut: `windows` in shards of `shard_windows`; `tokens_digest` fixes their content."""

    windows: int
    shard_windows: int
    tokens_digest: str

    @property
    def shards(self) -> int:
        return -(-self.windows // self.shard_windows)


@dataclass(frozen=True)
class Shard:
    """A run of windows of one domain and split: the unit of teacher work, of commit and of retry."""

    domain: str
    split: str
    number: int
    first_window: int
    windows: int

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.split}/{self.number:05d}"

    @property
    def record(self) -> str:
        """Name of its commit record."""
        return f"{self.name}.json"

    def key(self, window: int) -> str:
        """Names a window for the draws of the selection."""
        return f"{self.domain}/{self.split}/{self.number}/{window}"


def shard_of(domain: str, split: str, size: SplitSize, number: int) -> Shard:
    """Shard `number` of a split; the last may be short."""
    start = number * size.shard_windows
    return Shard(domain, split, number, start, min(size.shard_windows, size.windows - start))


def shards_of(domain: str, split: str, size: SplitSize) -> list[Shard]:
    """The shards of a split in order."""
    return [shard_of(domain, split, size, number) for number in range(size.shards)]


def split_size(split: Split, shard_windows: int) -> SplitSize:
    """How a prepared split is cut into shards."""
    return SplitSize(split.facts.windows, shard_windows, split.facts.digest)


def uncommitted(folder: Folder, shards: list[Shard]) -> list[Shard]:
    """Those without a commit record, in order; one listing per split."""
    there = {
        name
        for place in {f"{shard.domain}/{shard.split}" for shard in shards}
        for name in folder.files(place)
    }
    return [shard for shard in shards if shard.record not in there]
