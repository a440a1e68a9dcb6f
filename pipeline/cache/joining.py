"""A cache that is there and the one that is wanted: new domains may join it, nothing else may change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ddk_pipe.pipeline.cache.spec import MOST_SHARDS, CacheSpec, count_shards, read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder


def check_shards(folder: Folder, spec: CacheSpec) -> None:
    """Raises DdkError for more shards than a cache may have."""
    if count_shards(spec) > MOST_SHARDS:
        raise DdkError(
            f"{folder.name}: {count_shards(spec):,} shards, at most {MOST_SHARDS:,} can be",
            hint="raise cache.shard_windows",
        )


def planned(folder: Folder, spec: CacheSpec) -> CacheSpec:
    """What a CacheWriter's spec would be, writing nothing; raises DdkError for what it would refuse."""
    check_shards(folder, spec)
    return merged(folder, read_spec(folder), spec) if folder.exists("cache.json") else spec


def require_attention(folder: Folder, known: CacheSpec, wanted: str) -> None:
    """Raises DdkError for a cache of another attention than the manifest's."""
    if known.attention != wanted:
        raise DdkError(
            f"{folder.name}: made with attention: {known.attention}, and the manifest says {wanted} (the default is"
            " document)",
            hint=f"set attention: {known.attention}, or cache.path to a new folder",
        )


def merged(folder: Folder, known: CacheSpec, wanted: CacheSpec) -> CacheSpec:
    """The known cache with the wanted domains; raises DdkError where the two disagree."""
    require_attention(folder, known, wanted.attention)
    if known.schema_version != wanted.schema_version:
        raise DdkError(
            f"{folder.name}: of schema version {known.schema_version}, which is read but not added to; new caches have"
            f" {wanted.schema_version}",
            hint="set cache.path to a new folder",
        )
    ours, theirs = known.identity(), wanted.identity()
    for name, value in theirs.items():
        if ours[name] != value:
            raise DdkError(
                f"{folder.name}: made with another {name} ({_difference(ours[name], value)})",
                hint="set cache.path to a new folder, or restore the old setting",
            )
    domains = {name: dict(splits) for name, splits in known.domains.items()}
    for name, splits in wanted.domains.items():
        for split, size in splits.items():
            if domains.setdefault(name, {}).setdefault(split, size) != size:
                raise DdkError(
                    f"{folder.name}: {name}/{split} was cached from other tokens or in other shards",
                    hint="set cache.path to a new folder, or restore the text",
                )
    return replace(known, domains=domains, about=_about(known.about, wanted.about))


def _about(known: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The known cache's words, but for how text is encoded: whose tokens are the same may say so anew."""
    before, now = known.get("encoding"), wanted.get("encoding")
    if not isinstance(now, dict):
        return known
    return {**known, "encoding": {**(before if isinstance(before, dict) else {}), **now}}


def _difference(ours: Any, theirs: Any) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        changed = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        return ", ".join(f"{name} {ours.get(name)} there, {theirs.get(name)} here" for name in changed)
    return f"{ours} there, {theirs} here"
