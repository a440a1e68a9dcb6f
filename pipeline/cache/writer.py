"""Writes a cache, shard by shard; any number of writers may work on one cache, also on one shard, at once.

A shard is built in a scratch folder, read back through the reader, and published under a name that nobody else
uses. Its commit record, created exclusively, then decides which of several writers won. Nothing is removed before
that; afterwards the winner removes the groups that stood there before it won, a loser its own.
"""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache.arrays import write_group
from ddk_pipe.pipeline.cache.damage import repair
from ddk_pipe.pipeline.cache.joining import check_shards, merged
from ddk_pipe.pipeline.cache.layout import content
from ddk_pipe.pipeline.cache.ranks import Codecs, ranks_bytes, ranks_name
from ddk_pipe.pipeline.cache.record import GROUP, FileFacts, ShardRecord, checks_text, is_input, read_record
from ddk_pipe.pipeline.cache.shards import Shard, uncommitted
from ddk_pipe.pipeline.cache.soundness import measure
from ddk_pipe.pipeline.cache.spec import CacheSpec, all_shards, read_spec
from ddk_pipe.pipeline.cache.strict_json import MOST_JSON_BYTES
from ddk_pipe.pipeline.cache.windows import ShardWindows
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import Starts
from ddk_pipe.pipeline.storage import Folder, LocalFolder, durable
from ddk_pipe.pipeline.targets import Ranks, Selected

COMMIT_TRIES = 5
MOST_PLACES = 1 << 20  # characters in a record: beyond, the files tell a reader sooner


class CacheWriter:
    """Creates or continues the cache in `folder`.

    A domain needs a rank table (`add_ranks`) before its first shard is written. Raises DdkError where the cache there
    was made with other settings.
    """

    def __init__(self, folder: Folder, spec: CacheSpec) -> None:
        self.folder = folder
        self.spec = self._open(spec)
        self._codecs = Codecs(folder, self.spec)

    def _open(self, spec: CacheSpec) -> CacheSpec:
        check_shards(self.folder, spec)
        if not self.folder.exists("cache.json"):
            with suppress(FileExistsError):  # somebody was faster: then theirs is the cache
                self.folder.create("cache.json", spec.to_json())
        known = read_spec(self.folder)
        both = merged(self.folder, known, spec)
        if both != known:
            self.folder.write("cache.json", both.to_json())
        return both

    def has_ranks(self, domain: str) -> bool:
        """True if the domain's rank table is there."""
        return self.folder.exists(ranks_name(domain))

    def add_ranks(self, domain: str, ranks: Ranks) -> None:
        """Give a domain its rank table; where somebody was faster, theirs stays (any permutation will do)."""
        with suppress(FileExistsError):
            self.folder.create(ranks_name(domain), ranks_bytes(ranks))

    def pending(self) -> list[Shard]:
        """Shards without a commit record, in order."""
        return uncommitted(self.folder, all_shards(self.spec))

    def is_committed(self, shard: Shard) -> bool:
        """True if somebody has committed the shard by now."""
        return self.folder.exists(shard.record)

    def write(
        self,
        shard: Shard,
        tokens: NDArray[np.int64],
        loss_mask: NDArray[np.uint8],
        selected: list[Selected],
        facts: dict[str, Any],
        starts: Starts | None = None,
    ) -> ShardRecord:
        """Write and commit one shard; returns its commit record. tokens, loss_mask [windows, seq_len], and under
        `attention: document` starts of the same shape.

        Where somebody else commits the shard first, nothing of ours remains and theirs is returned. `facts` (teacher,
        seconds, ...) go into the record. Raises ValueError for targets or labels that contradict each other.
        """
        scratch = self.folder.scratch()
        try:
            group = f"{shard.number:05d}.{secrets.token_hex(4)}.zarr"
            attributes, arrays = content(shard, self.spec, self._codecs, tokens, loss_mask, selected, starts)
            write_group(scratch / group, attributes, arrays)
            record = self._record(shard, scratch, group, facts)
            return self._publish(shard, scratch / group, record)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _record(self, shard: Shard, scratch: Path, group: str, facts: dict[str, Any]) -> ShardRecord:
        """The shard in `scratch`, read back as a student will read it: what cannot be read is never committed."""
        folder = LocalFolder(scratch)
        files = {
            name.removeprefix(f"{group}/"): FileFacts(
                bytes=folder.size(name), blake2b=durable.file_digest(scratch / name)
            )
            for name in folder.names(f"{group}/")
        }
        sizes = {name: file.bytes for name, file in files.items()}
        slots = [
            ShardWindows(folder, group, shard, self.spec, self._codecs.of(shard.domain, slot)[0], slot, sizes)
            for slot in range(len(self.spec.plan.temperatures))
        ]
        checks = {name: checks_text(sums) for slot in slots for name, sums in slot.arrays.checks().items()}
        places = {
            name: checks_text(values) for slot in slots for name, values in slot.arrays.places().items()
        }
        input_bytes = sum(size for name, size in sizes.items() if is_input(name))
        return ShardRecord.model_validate(
            {
                **facts,
                **vars(shard),
                **vars(measure(slots, self.spec)),
                "schema_version": self.spec.schema_version,
                "fingerprint": self.spec.fingerprint,
                "ranks_digest": self._codecs.of(shard.domain, 0)[1],
                "group": group,
                "files": files,
                "checks": checks,
                "places": places if sum(map(len, places.values())) <= MOST_PLACES else {},
                "target_bytes": sum(sizes.values()) - input_bytes,
                "input_bytes": input_bytes,
            }
        )

    def _publish(self, shard: Shard, built: Path, record: ShardRecord) -> ShardRecord:
        ours = f"{shard.domain}/{shard.split}/{record.group}"
        sealed = record.sealed()
        if len(sealed) > MOST_JSON_BYTES:
            raise DdkError(f"{shard.name}: its commit record is too large", hint="lower cache.shard_windows")
        # Listed before the commit: a group that comes later belongs to a loser who removes it himself, or, should
        # somebody repair the shard meanwhile, to the next winner.
        leftovers = self._groups(shard)
        try:
            self.folder.publish(built, ours)
        except BaseException:
            with suppress(Exception):  # half uploaded, and no record names it
                self.folder.remove(ours)
            raise
        try:
            known = self._commit(shard, record, sealed)
        except OSError:  # the disk is full, say; not for a store out of reach, which may hold our record yet
            if not self.folder.exists(shard.record):
                self.folder.remove(ours)
            raise
        for group in leftovers if known.group == record.group else [ours]:
            self.folder.remove(group)
        return known

    def _commit(self, shard: Shard, record: ShardRecord, sealed: bytes) -> ShardRecord:
        """Create the commit record; returns the one that stands there then, ours or that of somebody faster.

        After a lost answer a store retries, finds our own record and says "exists": only reading it tells who won.
        """
        for attempt in range(COMMIT_TRIES):
            try:
                self.folder.create(shard.record, sealed)
                return record
            except FileExistsError:
                known = read_record(self.folder, shard, self.spec)
                if known is not None:
                    return known
                time.sleep(0.1 * 2**attempt)  # a store may refuse both of two that come at the same moment
        raise DdkError(f"{self.folder.name}/{shard.record}: cannot be created", hint=repair(self.folder))

    def _groups(self, shard: Shard) -> list[str]:
        """Groups of this shard that are there, committed or not."""
        names = self.folder.names(f"{shard.name}.")
        groups = {"/".join(name.split("/")[:3]) for name in names}
        return sorted(group for group in groups if GROUP.fullmatch(group.rpartition("/")[2]))
