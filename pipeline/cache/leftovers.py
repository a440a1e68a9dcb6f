"""What lies in a cache's folder beside its shards: groups, half-written files, files of somebody else."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ddk_pipe.pipeline.cache.ranks import ranks_name
from ddk_pipe.pipeline.cache.record import GROUP, group_in
from ddk_pipe.pipeline.cache.report import Leftover
from ddk_pipe.pipeline.cache.shards import Shard, shard_of
from ddk_pipe.pipeline.cache.spec import CacheSpec
from ddk_pipe.pipeline.storage import LocalFolder, is_inside

PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")  # a name that durable and storage write under
STALE_SECONDS = 3600.0  # a partial not written to for so long has no writer any more


def sort_names(names: list[str], spec: CacheSpec) -> tuple[dict[str, Shard], list[str]]:
    """Of the files in a cache's folder: groups, with the shard whose they are, and what no ddk-pipe would look for."""
    known = {"cache.json", *map(ranks_name, spec.domains)}
    groups: dict[str, Shard] = {}
    foreign = []
    for name in names:
        if name in known or _is_record(name, spec) or any(map(PARTIAL.fullmatch, name.split("/"))):
            continue
        shard = _shard_of_group(group_in(name), spec)
        if shard is None or name == group_in(name):
            foreign.append(name)
        else:
            groups[group_in(name)] = shard
    return groups, foreign


def _is_record(name: str, spec: CacheSpec) -> bool:
    shard = _shard(name.removesuffix(".json"), spec)
    return shard is not None and shard.record == name


def _shard_of_group(group: str, spec: CacheSpec) -> Shard | None:
    place, _, name = group.rpartition("/")
    named = GROUP.fullmatch(name)
    return _shard(f"{place}/{named[1]}", spec) if named else None


def _shard(name: str, spec: CacheSpec) -> Shard | None:
    """The shard of the cache with this name."""
    parts = name.split("/")
    if len(parts) != 3 or not re.fullmatch(r"[0-9]{5,9}", parts[2]):
        return None
    size = spec.domains.get(parts[0], {}).get(parts[1])
    if size is None or int(parts[2]) >= size.shards:
        return None
    shard = shard_of(parts[0], parts[1], size, int(parts[2]))
    return shard if shard.name == name else None


def partials(folder: LocalFolder) -> Iterator[Leftover]:
    """Scratch folders and half-written files, which only a disk has."""
    for path in sorted(_partials_below(folder.path)):
        if not is_inside(path, folder.path):
            continue
        name = path.relative_to(folder.path).as_posix()
        written = _last_written(path)
        if written is None:
            continue
        stale = time.time() - written > STALE_SECONDS
        why = "a writer that is gone left it" if stale else "a writer may be at work on it"
        yield Leftover(name, why, removable=stale)


def _partials_below(root: Path) -> Iterator[Path]:
    """Names that durable and storage write under, in the cache's folder and the two levels below it.

    os.walk passes over what a living writer moves meanwhile; glob and rglob fail there.
    """
    for place, folders, files in os.walk(root):
        yield from (Path(place, name) for name in folders + files if PARTIAL.fullmatch(name))
        deep = len(Path(place).relative_to(root).parts) >= 2
        folders[:] = [] if deep else [name for name in folders if not PARTIAL.fullmatch(name)]


def _last_written(path: Path) -> float | None:
    """Time of the last change of a file or of anything in a folder, seconds since the epoch; None if it is gone."""
    times = []
    below = [Path(place, name) for place, folders, files in os.walk(path) for name in folders + files]
    for part in [path, *below]:
        with suppress(FileNotFoundError):
            times.append(part.lstat().st_mtime)
    return max(times, default=None)
