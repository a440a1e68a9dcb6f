"""Where a run stands, and which of its settings must not change before it goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.storage import durable

# what a run may change between start and resume, because its results do not depend on it
FREE = {
    "name",
    "device",
    "checkpoint_steps",
    "log_steps",
    "keep_last",
    "keep_best",
    "trackers",
    "parallel",
    "activation_checkpointing",
}


BEGINNING = ("weights", "shares", "sampler", "student_ce")  # of an interval


@dataclass
class Position:
    """Where a run stands: enough, with the weights of model and optimizer, to go on as if never stopped."""

    step: int  # optimizer steps done
    seconds: float  # of training so far
    weights: list[float]  # state of the mixing rule, as of the current interval
    shares: list[float]  # what the current interval is drawn by
    sampler: dict[str, Any]  # before the current interval was drawn
    settings: str  # digest of what the manifest said that must not change between start and resume
    gap: float | None = None  # mean validation gap, nats per token, where it was measured at this very step
    finished: bool = False  # every gap was below stop_gap_nats
    student_ce: list[float] = field(default_factory=list)  # [domains], nats, at the last weight update
    warnings: list[str] = field(default_factory=list)  # what the user was told once, for the record
    made_of: str = ""  # digest of what the run reads and starts from
    cut: dict[str, Any] | None = None  # of a last interval that the end cut short: what it began with

    def cut_short(self, steps: int, interval_steps: int) -> None:
        """To be called where an interval ends: notes its beginning if the end of the run cut it."""
        if self.step == steps and self.step % interval_steps:
            self.cut = {name: getattr(self, name) for name in BEGINNING}

    def going_on_to(self, steps: int) -> Position:
        """This position; of a run that ended here and is to go on to `steps`, as if it had not ended."""
        if self.cut is None or self.step >= steps:
            return self
        return replace(self, **self.cut, gap=None, finished=False, cut=None)


def settings_in(project: Project) -> dict[str, Any]:
    """What must not change in a manifest between start and resume, as JSON has it."""
    manifest = project.manifest
    settings: dict[str, Any] = {
        "distill": manifest.distill.model_dump(exclude=FREE),
        "student": manifest.student.model_dump() if manifest.student else None,
        "domains": sorted(manifest.domains),
        "seq_len": manifest.seq_len,
    }
    if manifest.attention != "window":  # else none: as runs had it before there was a choice
        settings["attention"] = manifest.attention
    return dict(json.loads(durable.to_json(settings)))


def settings_of(project: Project) -> str:
    """Its digest."""
    return durable.digest(durable.to_json(settings_in(project)))
