"""Where a run stands, and which of its settings must not change before it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.storage import durable

# what a run may change between start and resume, because its results do not depend on it
FREE = {
    "name",
    "device",
    "checkpoint_steps",
    "keep_last",
    "keep_best",
    "trackers",
    "parallel",
    "activation_checkpointing",
}


@dataclass
class Position:
    """Where a run stands: enough, with the weights of model and optimizer, to go on as if never stopped."""

    step: int  # optimizer steps done
    seconds: float  # of training so far
    weights: list[float]  # state of the mixing rule, as of the current interval
    shares: list[float]  # what the current interval is drawn by
    sampler: dict[str, Any]  # before the current interval was drawn
    settings: str  # digest of everything that must not change between start and resume
    gap: float | None = None  # mean validation gap, nats per token, where it was measured at this very step
    finished: bool = False  # every gap was below stop_gap_nats
    student_ce: list[float] = field(default_factory=list)  # [domains], nats, at the last weight update
    warnings: list[str] = field(default_factory=list)  # what the user was told once, for the record


def settings_of(project: Project) -> str:
    """Digest of what must not change in a manifest between start and resume."""
    manifest = project.manifest
    student = manifest.student.model_dump() if manifest.student else None
    settings = {
        "distill": manifest.distill.model_dump(exclude=FREE),
        "student": student,
        "domains": sorted(manifest.domains),
        "seq_len": manifest.seq_len,
    }
    return durable.digest(durable.to_json(settings))


def other_settings(project: Project) -> DdkError:
    """The refusal to go on with a run that was begun with other settings."""
    return DdkError(
        f"{project.run}: holds a run with other settings",
        hint="set another distill.name, or delete that folder",
    )
