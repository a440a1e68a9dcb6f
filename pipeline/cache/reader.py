"""Reads a cache.

A reader compares every chunk with the checksum in the commit record and the window number at every read, so damage is an
error that names the file and the repair, never a wrong value.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache.damage import damage, repair
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.record import group_named, group_of, random_part, record_bytes, record_of
from ddk_pipe.pipeline.cache.shards import Shard, SplitSize, shard_of, shards_of, uncommitted
from ddk_pipe.pipeline.cache.spec import CacheSpec, read_spec
from ddk_pipe.pipeline.cache.windows import CachedWindow, ShardWindows, learnt_from, open_windows
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LOCK, Folder
from ddk_pipe.pipeline.text import SPLITS

KEPT_BYTES = 1 << 29  # of what a reader has learnt of shards: some 500 for one of a single window,
PER_SHARD = 384  # of them beside the 16 per window and array
GROUP_BYTES = 4  # its name's random part, in front of what was learnt of its arrays


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
        self._known: OrderedDict[str, bytes] = OrderedDict()  # by shard: all that its opening found out
        self._known_bytes = 0
        self._opened = _Opened(self.spec)

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
            known = self._known.pop(shard.name, None)
            self._known_bytes -= 0 if known is None else len(known) + PER_SHARD

    def _windows(self, shard: Shard) -> tuple[str, ShardWindows]:
        """The group of a shard, opened; two threads may open the same one, the second of them in vain."""
        with LOCK:
            known = self._known.get(shard.name)
            if known is not None:
                self._known.move_to_end(shard.name)
        if known is not None:
            return self._again(shard, known)
        content = record_bytes(self.folder, shard)
        if self._opened.had(shard, content):
            codec, _ = self._codecs.of(shard.domain, self._slot)
            group, learnt = learnt_from(content, self.spec, codec, self._slot)
            known = random_part(group) + learnt
            self._keep(shard, known)
            return self._again(shard, known)
        record = record_of(content, self.folder, shard, self.spec)
        opened = open_windows(self.folder, shard, record, self.spec, self._codecs, self._slot)
        if record.places:
            self._opened.add(shard, content)
        self._keep(shard, random_part(record.group) + opened.arrays.learnt)
        return group_of(shard, record), opened

    def _again(self, shard: Shard, known: bytes) -> tuple[str, ShardWindows]:
        """Objects of a shard live for one read: a million of them would be gigabytes."""
        group = group_named(shard, known[:GROUP_BYTES])
        codec, _ = self._codecs.of(shard.domain, self._slot)
        learnt = known[GROUP_BYTES:]
        return group, ShardWindows(self.folder, group, shard, self.spec, codec, self._slot, learnt=learnt)

    def _keep(self, shard: Shard, known: bytes) -> None:
        with LOCK:
            if shard.name not in self._known:
                self._known[shard.name] = known
                self._known_bytes += len(known) + PER_SHARD
            while self._known_bytes > KEPT_BYTES and len(self._known) > 1:
                self._known_bytes -= len(self._known.popitem(last=False)[1]) + PER_SHARD


class _Opened:
    """Digests of the commit records of shards that were opened: where the bound makes a reader forget what it learnt,
    the record alone tells it again. 16 bytes a shard, and only for splits that are read."""

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec
        self._digests: dict[tuple[str, str], NDArray[np.uint8]] = {}

    def had(self, shard: Shard, content: bytes) -> bool:
        """True if the shard was opened with exactly this record."""
        return bool(self._of(shard).tobytes() == _digest(content))

    def add(self, shard: Shard, content: bytes) -> None:
        self._of(shard)[:] = np.frombuffer(_digest(content), np.uint8)

    def _of(self, shard: Shard) -> NDArray[np.uint8]:
        """uint8 [16], zeros at first."""
        place = shard.domain, shard.split
        if place not in self._digests:
            shards = self._spec.domains[shard.domain][shard.split].shards
            self._digests.setdefault(place, np.zeros((shards, 16), np.uint8))
        row: NDArray[np.uint8] = self._digests[place][shard.number]
        return row


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
