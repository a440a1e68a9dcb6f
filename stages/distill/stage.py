"""`ddk-pipe distill`: train a student from the cache, mixing domains by the gap to the teacher.

One process, or those of `torchrun --nproc-per-node N --no-python ddk-pipe distill`. Rerunning the same command
continues a run that was stopped or killed, on the same number of processes to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.stages.common import load_run, say
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import other_settings, settings_of
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.world import join_world


def distill(project: Project, is_bad: Callable[[int], bool] | None = None) -> dict[str, Any]:
    """Train, validate and save one student; returns the run's summary. A finished run is not repeated.

    `is_bad` is asked at each step that ended in a validation and a checkpoint, but for the last: true raises
    StoppedEarly. Run again, the run is asked about that step again and goes on from there.
    """
    with join_world() as world:
        done = project.run / "run.json"
        settings = settings_of(project)
        there = done.exists()
        world.wait()  # or a process that comes late would see what the first has finished meanwhile
        if not there:
            return Run(Parts(project, world), settings, is_bad).go()
        summary = load_run(project.run).summary or {}
        if summary.get("settings") != settings:
            raise other_settings(project)
        say(f"distill: nothing to do, {project.run} is finished")
        return dict(summary)
