"""What `cache-teacher` says while it runs: a line per shard for people, a JSON object per event for programs."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddk_pipe.stages.cache_teacher.maker import ShardReport
from ddk_pipe.stages.common import clock, say

WAIT_SHARE = 0.05  # of the teacher's time: waits shorter than this are not worth a word


class StatusStream:
    """JSON lines appended to a file: {"time": ISO 8601 in UTC, "event": ..., ...}; nothing without a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    def send(self, event: str, **facts: Any) -> None:
        """Append one object; raises OSError if the file cannot be written."""
        if not self.path:
            return
        line = json.dumps(
            {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        )
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


class ShardProgress:
    """Counts shards and positions of a cache; rate and time to go are those of this run, with all its workers."""

    def __init__(self, stream: StatusStream, *, done: int, total: int, positions_left: int) -> None:
        self.stream, self.done, self.total = stream, done, total
        self.positions_left = positions_left  # of the whole cache
        self.positions = 0  # predicted by this run
        self.shards = 0
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.began, 1e-9)

    def shard(self, report: ShardReport, size: int) -> None:
        """One shard of `size` positions is committed."""
        self.done += 1
        self.positions_left -= size
        self.positions += report.positions
        self.shards += bool(report.positions)
        rate = self.positions / self.seconds
        facts = {
            "shard": report.shard.name,
            "positions_per_second": round(report.positions / max(report.teacher_seconds, 1e-9), 1),
            "bytes_per_position": round(report.target_bytes / max(report.labels, 1), 2),
            "teacher_waited_seconds": round(report.waited_seconds, 3),
            "eta_seconds": round(self.positions_left / rate, 1) if rate else None,
        }
        self.send("shard" if report.positions else "committed_elsewhere", **facts)
        if report.positions:
            say(self._line(report, facts))

    def _line(self, report: ShardReport, facts: dict[str, Any]) -> str:
        left = "" if facts["eta_seconds"] is None else f", ETA {clock(facts['eta_seconds'])}"
        share = report.waited_seconds / max(report.waited_seconds + report.teacher_seconds, 1e-9)
        waited = f", the teacher waited {100 * share:.0f}% for the disk" if share > WAIT_SHARE else ""
        return (
            f"cache-teacher: {report.shard.name}: {facts['positions_per_second']:,.0f} positions/s,"
            f" {facts['bytes_per_position']:.1f} bytes/position, {self.done:,} of {self.total:,} shards{left}{waited}"
        )

    def send(self, event: str, **facts: Any) -> None:
        """An event with how far the cache is."""
        self.stream.send(event, done=self.done, total=self.total, **facts)
