"""`ddk-pipe distill`: train a student from the cache, mixing domains by the gap to the teacher.

One process, or those of `torchrun --nproc-per-node N --no-python ddk-pipe distill`. Rerunning the same command
continues a run that was stopped or killed, on the same number of processes to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.stages.common import alone, say
from ddk_pipe.stages.distill.identity import Asked, Identity, asked_for, begin, finished_run
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.world import join_world
from ddk_pipe.stages.prepare import prepare


def distill(project: Project, is_bad: Callable[[int], bool] | None = None) -> dict[str, Any]:
    """Train, validate and save one student; returns the run's summary. A finished run is not repeated.

    `is_bad` is asked at each step that ended in a validation and a checkpoint, but for the last: true raises
    StoppedEarly. Run again, the run is asked about that step again and goes on from there. Raises DdkError if the
    run's folder holds another run (settings, cache, teacher, what the student starts from), naming what differs, or
    if another process trains in it.
    """
    with join_world() as world, ExitStack() as lock:
        summary = world.of_leader(lambda: finished_run(project))
        if summary is None:
            asked = world.of_leader(lambda: _asked_for(project))
            world.of_leader(lambda: lock.enter_context(_alone(project)))
            # asked again: another process may have finished it meanwhile
            found = world.of_leader(lambda: finished_run(project) or begin(project, asked))
            if isinstance(found, Identity):
                return Run(Parts(project, world, prove=True), found, is_bad).go()
            summary = found
        say(f"distill: nothing to do, {project.run} is finished")
        return dict(summary)


def _alone(project: Project) -> AbstractContextManager[None]:
    hint = "wait for it, or set another distill.name"
    return alone(project.run, what="trains in this folder", hint=hint)


def _asked_for(project: Project) -> Asked:
    if project.manifest.distill.targets == "online":
        prepare(project)
    return asked_for(project)
