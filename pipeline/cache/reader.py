"""Reads a cache.

A reader compares every chunk with the checksum in the commit record and the window number at every read, so damage is an
error that names the file and the repair, never a wrong value.
"""

from __future__ import annotations

from collections import OrderedDict

from ddk_pipe.pipeline.cache.damage import damage, repair
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.record import group_of, require_record
from ddk_pipe.pipeline.cache.shards import Shard, SplitSize, shard_of, shards_of, uncommitted
from ddk_pipe.pipeline.cache.spec import read_spec
from ddk_pipe.pipeline.cache.windows import CachedWindow, ShardWindows, open_windows
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LOCK, Folder
from ddk_pipe.pipeline.text import SPLITS

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
