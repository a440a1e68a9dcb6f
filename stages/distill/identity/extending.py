"""A run that is to have more steps: from which of its checkpoints it goes on as if it had been so long from the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Distill, Project
from ddk_pipe.stages.common import say
from ddk_pipe.stages.distill.checkpoints import remove_checkpoint
from ddk_pipe.stages.distill.identity.record import Identity, write_identity
from ddk_pipe.stages.distill.schedules import stable_steps, steps_alike, warmup_steps

STEPS = "settings.distill.steps"
MAY_CHANGE = ("settings.distill.schedule.", "settings.distill.gamma_schedule.")  # along with the steps


def is_longer(found: dict[str, tuple[Any, Any]]) -> bool:
    """True if what differs comes to more steps, and to schedules that were fitted to them."""
    before, now = found.get(STEPS, (0, 0))
    if not (isinstance(before, int) and isinstance(now, int) and before < now):
        return False
    return all(name == STEPS or name.startswith(MAY_CHANGE) for name in found)


def begin_to_extend(
    project: Project, recorded: Identity, longer: Identity, known: dict[str, dict[str, str]]
) -> Identity:
    """Take from the folder what a shorter run left and the longer one would not have; returns the longer run's identity.

    What is left is the latest checkpoint up to which both take the same steps, and those before it. Raises DdkError
    with the reason if there is none, and leaves all as it is then.
    """
    try:
        before = Distill.model_validate(recorded.settings["distill"])
    except (KeyError, ValueError):
        raise _refused(project, "identity.json does not say how") from None
    now = project.manifest.distill
    alike = steps_alike(before, now)
    there = _checkpoints(project.run)
    usable = [step for step in there if step <= alike]
    if not usable:
        raise _refused(project, *_why(before, now, alike))
    for step in [step for step in there if step > alike]:
        remove_checkpoint(there[step])
    longer = replace(longer, extends=[*recorded.extends, recorded.settings_digest])
    write_identity(project.run, longer, known)
    (project.run / "run.json").unlink(missing_ok=True)
    say(f"distill: {project.run} goes on from step {max(usable):,}, to {now.steps:,} steps")
    return longer


def _checkpoints(run: Path) -> dict[int, Path]:
    """By step. None where a link would make us remove outside of the run's folder."""
    folder = run / "checkpoints"
    found = [] if folder.is_symlink() else sorted(folder.glob("step-*"))
    return {
        int(path.name[5:]): path
        for path in found
        if path.name[5:].isdecimal() and path.is_dir() and not path.is_symlink()
    }


def _why(before: Distill, now: Distill, alike: int) -> tuple[str, str]:
    """Why it cannot go on, and what to do about it."""
    warmup, longer = warmup_steps(before), warmup_steps(now)
    if before.gamma_schedule.name != "constant":
        return f"its gamma_schedule ({before.gamma_schedule.name}) was made for {before.steps:,} steps", ""
    if before.schedule.name not in ("constant", "wsd"):
        return f"its {before.schedule.name} schedule was made for {before.steps:,} steps", ""
    if warmup != longer:
        fraction = f"{warmup / now.steps:.6g}"
        return (
            f"its warm-up took {warmup:,} steps, and that of {now.steps:,} steps takes {longer:,}",
            f"set distill.schedule.warmup_fraction to {fraction}",
        )
    if alike < stable_steps(before):
        return f"the learning rates or gammas of its {before.steps:,} steps would have been others", ""
    return f"it has no checkpoint left of the {alike:,} steps that a longer run takes alike", ""


def _refused(project: Project, why: str, hint: str = "") -> DdkError:
    return DdkError(
        f"{project.run}: cannot go on to {project.manifest.distill.steps:,} steps: {why}",
        hint=f"{hint}{', ' if hint else ''}set another distill.name, or delete that folder",
    )
