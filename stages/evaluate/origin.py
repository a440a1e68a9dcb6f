"""Whether a student is evaluated by the cache that it was trained from: told, since its figures say so nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.cache import CacheSpec
from ddk_pipe.stages.common import say

ONLINE = "online"  # in place of a fingerprint: no cache was read


def say_if_another(place: Path, record: dict[str, Any] | None, spec: CacheSpec, cache: str) -> None:
    """One line if `record` (ddk_pipe.json of a student; None: nothing is known) names another cache or teacher."""
    if record is None or record["cache_fingerprint"] == spec.fingerprint:
        return
    mine, theirs = record["teacher_weights"], spec.teacher.get("weights_digest")
    if mine is not None and mine == theirs and record["cache_fingerprint"] == ONLINE:
        return
    if mine is None or theirs is None or mine == theirs:
        say(f"evaluate: {place} was trained from other targets than those of the cache at {cache}")
        return
    say(
        f"evaluate: {place} was trained on another teacher than that of the cache at {cache}"
        f" (teacher weights {mine[:8]}, there {str(theirs)[:8]})"
    )
