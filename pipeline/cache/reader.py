"""The teacher cache: Zarr v3 shards on a disk or in an object store, written once, read by any number of students.

    cache.json                                    what made it: teacher, tokenizer, scheme, ... and its fingerprint
    <domain>/ranks.npy                            token ids by how often the teacher keeps them, int32 [vocab_size]
    <domain>/<split>/<shard>.<8 hex digits>.zarr  one group per shard, readable by plain zarr.open:
        tokens        u16 or u32 [windows, seq_len]
        labels        u16 [windows, 4 + seq_len]  window number (4 words, low first), label log-probability codes;
                                                  code 65535 at t: token t+1 is no label
        t<i>/<plane>  [windows, widest]           the codec's planes of the i-th temperature, rows filled up with zeros
    <domain>/<split>/<shard>.json                 the commit record: names the group; digest of every file, checksum of
                                                  every window, statistics, fingerprint

Chunk = one window, one shard file per array, stock codecs that end in crc32c. The commit record is created last and
exclusively: only committed shards exist for readers, and writers who race cannot touch each other's files. A reader
compares every chunk with the checksum in the record and the window number at every read, so damage is an error that
names the file and the repair, never a wrong value.

cache_spec, cache_shard and cache_writer hold the parts; this module is what other code imports.
"""

from __future__ import annotations

from collections import OrderedDict

from ddk_pipe.pipeline.cache.shard import (
    CachedWindow,
    Codecs,
    ShardFacts,
    ShardRecord,
    ShardWindows,
    check_shard,
    committed,
    damage,
    group_of,
    open_windows,
    read_record,
    require_record,
    verify_shard,
)
from ddk_pipe.pipeline.cache.spec import (
    SCHEMA_VERSION,
    CacheSpec,
    Shard,
    SplitSize,
    all_shards,
    ranks_digest,
    read_ranks,
    read_spec,
    repair,
    shard_of,
    shards_of,
    split_size,
    uncommitted,
)
from ddk_pipe.pipeline.cache.writer import CacheWriter, planned
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LOCK, Folder
from ddk_pipe.pipeline.text import SPLITS

__all__ = [
    "SCHEMA_VERSION",
    "CacheReader",
    "CacheSpec",
    "CacheWriter",
    "CachedWindow",
    "Codecs",
    "Shard",
    "ShardFacts",
    "ShardRecord",
    "SplitSize",
    "all_shards",
    "check_shard",
    "committed",
    "group_of",
    "planned",
    "ranks_digest",
    "read_ranks",
    "read_record",
    "read_spec",
    "repair",
    "shard_of",
    "shards_of",
    "split_size",
    "uncommitted",
    "verify_shard",
]

OPEN_SHARDS = 1 << 14  # a reader keeps open: some kB each,
OPEN_WINDOWS = 1 << 20  # and 16 bytes per window and array


class CacheReader:
    """Reads committed windows in any order, from any number of threads.

    Raises DdkError rather than return anything doubtful, and for a temperature that is not in the cache.
    """

    def __init__(self, folder: Folder, temperature: float) -> None:
        self.folder = folder
        self.spec = read_spec(folder)
        temperatures = self.spec.plan.temperatures
        if temperature not in temperatures:
            listed = ", ".join(map(str, temperatures))
            raise DdkError(
                f"{folder.name}: temperature {temperature} is not in the cache (it has {listed})",
                hint="use one of those, or cache again with it in cache.temperatures",
            )
        self._slot = temperatures.index(temperature)
        self._codecs = Codecs(folder, self.spec)
        self._open: OrderedDict[Shard, tuple[str, ShardWindows]] = OrderedDict()
        self._open_windows = 0

    def size(self, domain: str, split: str) -> SplitSize:
        """Raises DdkError if the cache lacks the split."""
        size = self.spec.domains.get(domain, {}).get(split)
        if size is None:
            raise DdkError(
                f"{self.folder.name}: no {domain}/{split} in the cache", hint="run `ddk-pipe cache-teacher`"
            )
        return size

    def require_complete(self, domains: list[str]) -> None:
        """Raises DdkError unless every shard of these domains is committed."""
        for domain in domains:
            for split in SPLITS:
                shards = shards_of(domain, split, self.size(domain, split))
                missing = uncommitted(self.folder, shards)
                if missing:
                    raise DdkError(
                        f"{self.folder.name}: {len(missing)} of {len(shards)} shards of {domain}/{split}"
                        " are not there yet",
                        hint="run `ddk-pipe cache-teacher`, it continues where it stopped",
                    )

    def read(self, domain: str, split: str, window: int) -> CachedWindow:
        """One window; raises IndexError past the end, DdkError for damage (names the file and the repair)."""
        size = self.size(domain, split)
        if not 0 <= window < size.windows:
            raise IndexError(f"{domain}/{split} has {size.windows} windows, asked for {window}")
        shard = shard_of(domain, split, size, window // size.shard_windows)
        group, windows = self._windows(shard)
        try:
            with damage(self.folder, group):
                return windows.read(window)
        except DdkError as problem:
            if problem.hint != repair(self.folder):
                raise
            self._forget(shard)
            again, windows = self._windows(shard)
            if again == group:
                raise
        with damage(self.folder, again):  # repaired and made again since we opened it
            return windows.read(window)

    def _forget(self, shard: Shard) -> None:
        with LOCK:
            if self._open.pop(shard, None) is not None:
                self._open_windows -= shard.windows

    def _windows(self, shard: Shard) -> tuple[str, ShardWindows]:
        """The group of a shard, opened; two threads may open the same one, the second of them in vain."""
        with LOCK:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        record = require_record(self.folder, shard, self.spec)
        opened = open_windows(self.folder, shard, record, self.spec, self._codecs, self._slot)
        with LOCK:
            if shard not in self._open:
                self._open[shard] = group_of(shard, record), opened
                self._open_windows += shard.windows
            while len(self._open) > OPEN_SHARDS or (
                self._open_windows > OPEN_WINDOWS and len(self._open) > 1
            ):
                self._open_windows -= self._open.popitem(last=False)[0].windows
            return group_of(shard, record), opened
