"""What the caches of two runs have in common."""

from __future__ import annotations

import json
from pathlib import Path


def shard_contents(cache: Path) -> dict[str, dict[str, str]]:
    """Digest of every file of every committed shard: equal for caches that hold the same bytes."""
    return {
        str(record.relative_to(cache)): {
            name: file["blake2b"] for name, file in json.loads(record.read_text())["files"].items()
        }
        for record in sorted(cache.glob("*/*/[0-9]*.json"))
    }


def groups(cache: Path) -> list[str]:
    """Folders of shards, committed or left over."""
    return sorted(str(path.relative_to(cache)) for path in cache.glob("*/*/*.zarr"))
