"""What a run writes while it trains: the rows of its record, which the trackers are shown too, and its checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ddk_pipe.pipeline.metrics import Record
from ddk_pipe.stages.distill.checkpoints import Checkpoints
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.trackers import Trackers


class Journal:
    """One run's; every process of its world makes every call, and the first one writes."""

    def __init__(self, record: Record, trackers: Trackers, checkpoints: Checkpoints) -> None:
        self._record, self._trackers, self._checkpoints = record, trackers, checkpoints

    def step(self, row: dict[str, Any]) -> None:
        """A step was taken."""
        self._record.add("steps", row)
        self._trackers.add(row["step"], row)

    def validation(self, step: int, domain: str, row: dict[str, Any]) -> None:
        """A domain was measured after `step` steps."""
        self._record.add("validation", {"step": step, "domain": domain, **row})
        self._trackers.add(step, {f"{domain}/{key}": value for key, value in row.items()})

    def checkpoint(self, position: Position) -> None:
        """Begin a checkpoint (`Checkpoints.save`)."""
        self._record.sync()  # rows before the checkpoint they belong to
        self._checkpoints.save(asdict(position))

    def publish(self) -> None:
        """Put the record's tables in their place, as far as it has come."""
        self._record.publish()

    def close(self) -> None:
        """On the way out of a run, also of a failed one, whose own error is what counts."""
        self._checkpoints.settle_quietly()
        self.publish()
