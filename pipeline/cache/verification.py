"""Is a cache what it says it is? Everything that can be checked without the teacher, and the way back.

A cache is sound if every shard is committed and every byte of it is what was committed, decodes, and gives the
statistics of its record. What is not part of it (leavings of killed writers, files of somebody else) takes space but
makes it no less sound.

`verify(repair=True)` removes, and never writes. What goes, and nothing else:

| what                                                     | why it may go                                          |
|----------------------------------------------------------|--------------------------------------------------------|
| record, then group of a bad shard                        | `cache-teacher` then makes exactly this shard again    |
| rank table of a domain, after all shards coded with it   | without it they cannot be decoded                      |
| files in a sound shard's group that were never committed | its record knows all that belong there                 |
| other groups of a sound shard                            | its record stands, so no writer can commit them now    |
| `.*.partial` on a disk, an hour after the last write     | no writer builds one shard, or writes a file, so long  |

Where every record is that of another cache, cache.json is to blame and nothing goes.
Groups of a shard without a record stay: a writer may be about to commit one, and the next who commits the shard
removes them. Unknown files stay too. It may be killed at any moment and run again; writers and readers may work
meanwhile, but one repair at a time is enough: two, and a writer between them, could cost a shard (never silently).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from ddk_pipe.pipeline.cache.damage import RESTORE, blame
from ddk_pipe.pipeline.cache.leftovers import partials, sort_names
from ddk_pipe.pipeline.cache.ranks import Codecs, ranks_digest, ranks_name, read_ranks
from ddk_pipe.pipeline.cache.record import FOREIGN, ShardRecord, group_in, group_of, read_record
from ddk_pipe.pipeline.cache.report import Leftover, Report, SplitReport
from ddk_pipe.pipeline.cache.shards import Shard, uncommitted
from ddk_pipe.pipeline.cache.soundness import ShardFacts, verify_shard
from ddk_pipe.pipeline.cache.spec import CacheSpec, all_shards, read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, LocalFolder

STORE_THREADS = 8  # shards checked at once in an object store, where waiting is most of the work

Advance = Callable[[float, str], object]  # windows checked since the last call, name of their shard


def silent(windows: float, shard: str) -> None:
    """An `Advance` that shows nothing."""


def verify(folder: Folder, *, repair: bool = False, advance: Advance = silent) -> Report:
    """Check all of a cache; with `repair`, remove what is bad so that `cache-teacher` makes it again.

    Raises DdkError if there is no cache, if its cache.json is damaged, and where the place cannot be read or written
    (network, credentials): that is never taken for damage. `advance` is called from one thread, shard by shard.
    """
    spec = read_spec(folder)
    report = Report(folder.name)
    # Listed before the records are read: a group that comes later is never taken for a leftover.
    names = folder.names()
    shards = all_shards(spec)
    missing = set(uncommitted(folder, shards))
    report.missing = [shard.name for shard in shards if shard in missing]
    for shard in shards:
        split = report.splits.setdefault(f"{shard.domain}/{shard.split}", SplitReport())
        split.shards += 1
        split.committed += shard not in missing
    check = _Check(folder, spec, report, repair)
    check.shards([shard for shard in shards if shard not in missing], names, advance)
    check.leftovers(names)
    return report


class _Check:
    """One run of `verify`: fills the report, and removes at once what is to go."""

    def __init__(self, folder: Folder, spec: CacheSpec, report: Report, repair: bool) -> None:
        self.folder, self.spec, self.report, self.repair = folder, spec, report, repair
        self.codecs = Codecs(folder, spec)
        self.records: dict[Shard, ShardRecord] = {}  # of committed shards, those that can be read
        self.sound: set[Shard] = set()

    def shards(self, shards: list[Shard], names: list[str], advance: Advance) -> None:
        """Check committed shards and the tables they need."""
        problems = {shard: problem for shard in shards if (problem := self._read(shard)) is not None}
        if problems and not self.records and all(text.endswith(FOREIGN) for text in problems.values()):
            raise DdkError(  # a repair would remove all of them
                f"{self.folder.name}/cache.json: not that of the {len(problems)} shards beside it",
                hint=RESTORE,
            )
        for shard, problem in problems.items():
            self._bad(shard, problem)
        for domain in self.spec.domains:
            self._table(domain)
        ready = [shard for shard in self.records if shard.domain not in self.report.tables]
        for shard in shards:
            if shard not in self.records or shard.domain in self.report.tables:
                advance(shard.windows, shard.name)
        extra = self._extra_files(names)
        for shard, outcome in self._outcomes(ready):
            self._judge(shard, outcome, extra.get(shard, []))
            advance(shard.windows, shard.name)

    def _read(self, shard: Shard) -> str | None:
        """Keep the commit record, or say what is wrong with it; one that is gone was dropped since we looked."""
        try:
            record = read_record(self.folder, shard, self.spec)
        except (DdkError, OSError) as problem:
            return blame(self.folder, problem)
        if record is None:
            self.report.missing.append(shard.name)
        else:
            self.records[shard] = record
        return None

    def _table(self, domain: str) -> None:
        """A bad rank table is reported once, however many shards need it."""
        shards = [shard for shard in self.records if shard.domain == domain]
        problem = self._table_problem(domain, {self.records[shard].ranks_digest for shard in shards})
        if problem is None:
            return
        self.report.tables[domain] = problem
        self.report.undecodable += [shard.name for shard in shards]
        if self.repair:
            for shard in shards:
                self._drop(shard)
            self._remove(ranks_name(domain))

    def _table_problem(self, domain: str, digests: set[str]) -> str | None:
        """`digests`: those that the domain's shards name. One other than the table's is that shard's problem."""
        name = ranks_name(domain)
        if not digests and not self.folder.exists(name):
            return None  # nothing needs it yet
        try:
            ranks = read_ranks(self.folder, domain, self.spec.vocab_size)
        except (DdkError, OSError) as problem:
            return blame(self.folder, problem)
        if digests and ranks_digest(ranks) not in digests:
            return f"{self.folder.name}/{name}: not the table that the shards of {domain} were coded with"
        return None

    def _extra_files(self, names: list[str]) -> dict[Shard, list[str]]:
        """Files in the groups of committed shards that their records do not know."""
        groups = {group_of(shard, record): shard for shard, record in self.records.items()}
        extra: dict[Shard, list[str]] = {}
        for name in names:
            group = group_in(name)
            shard = groups.get(group)
            if shard is not None and name.removeprefix(f"{group}/") not in self.records[shard].files:
                extra.setdefault(shard, []).append(name)
        return extra

    def _outcomes(self, shards: list[Shard]) -> Iterator[tuple[Shard, ShardFacts | str | None]]:
        if isinstance(self.folder, LocalFolder):
            yield from ((shard, self._outcome(shard)) for shard in shards)
            return
        pool = ThreadPoolExecutor(STORE_THREADS)
        try:
            yield from zip(shards, pool.map(self._outcome, shards), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C or an error not another shard is begun

    def _outcome(self, shard: Shard) -> ShardFacts | str | None:
        """A shard's facts, its problem, or None if it is not committed any more."""
        try:
            return verify_shard(self.folder, shard, self.spec, self.codecs)
        except (DdkError, OSError) as problem:
            if not self.folder.exists(shard.record):
                return None
            return blame(self.folder, problem)

    def _judge(self, shard: Shard, outcome: ShardFacts | str | None, extra: list[str]) -> None:
        if isinstance(outcome, str) and extra and self.repair:  # perhaps nothing else is wrong
            for name in extra:
                self._remove(name)
            outcome = self._outcome(shard)
        if outcome is None:
            self.report.missing.append(shard.name)
        elif isinstance(outcome, str):
            self._bad(shard, outcome)
        else:
            self.sound.add(shard)
            self.report.splits[f"{shard.domain}/{shard.split}"].add(shard, self.records[shard], outcome)

    def _bad(self, shard: Shard, problem: str) -> None:
        self.report.bad[shard.name] = problem
        if self.repair:
            self._drop(shard)

    def _drop(self, shard: Shard) -> None:
        """The record first: a group without a record is nothing, a record without its group an error."""
        record = self.records.get(shard)
        if self._now(shard) != record:
            return  # made again by somebody meanwhile
        self._remove(shard.record)
        if record is not None:
            self._remove(group_of(shard, record))

    def _now(self, shard: Shard) -> ShardRecord | None:
        """The commit record as it stands now, None if it cannot be read."""
        try:
            return read_record(self.folder, shard, self.spec)
        except (DdkError, OSError) as problem:
            blame(self.folder, problem)
            return None

    def _remove(self, name: str) -> None:
        there = self.folder.names(name)
        self.folder.remove(name)
        if there:
            self.report.removed.append(name)

    def leftovers(self, names: list[str]) -> None:
        """Sort what is no part of the cache, and remove what may go."""
        groups, foreign = sort_names(names, self.spec)
        self.report.foreign += foreign
        for group, shard in groups.items():
            self._leftover_group(group, shard)
        if isinstance(self.folder, LocalFolder):
            for partial in partials(self.folder):
                self.report.leftovers.append(partial)
                if self.repair and partial.removable:
                    self.folder.remove(partial.name)
                    self.report.removed.append(partial.name)

    def _leftover_group(self, group: str, shard: Shard) -> None:
        """A group may go only where another one of the same shard is sound; what a record names is no leftover."""
        record = self.records.get(shard)
        if record is not None and group == group_of(shard, record):
            return
        if record is None or shard not in self.sound:
            why = "no record names it yet; `cache-teacher` removes it when it commits its shard"
            self.report.leftovers.append(Leftover(group, why, removable=False))
            return
        why = "its shard is committed, in another group"
        self.report.leftovers.append(Leftover(group, why, removable=True))
        if self.repair and self._now(shard) == record:
            self._remove(group)
