"""The settings that are tried: the manifest's own and a ladder of tau."""

from __future__ import annotations

from dataclasses import replace

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.targets import Plan
from ddk_pipe.stages.cache_teacher.maker import Job
from ddk_pipe.stages.cache_teacher.plan import check_plan

TAUS = (0.05, 0.03, 0.02, 0.01, 0.005)


def ladder(project: Project, job: Job) -> list[Plan]:
    """The manifest's own plan, then `pps` at several tau where the backend can serve it.

    Each has a seed of its own, so that their draws are independent of each other.
    """
    own = job.spec.plan
    plans = [own]
    for tau in TAUS:
        plan = replace(own, scheme="pps", tau=tau)
        try:
            check_plan(project, plan, job.backend)
        except DdkError:
            continue
        if plan != own:
            plans.append(plan)
    return [replace(plan, seed=own.seed + number) for number, plan in enumerate(plans)]


def name_of(plan: Plan) -> str:
    """The scheme and what it depends on."""
    return ", ".join([plan.scheme, *(f"{name} {value:g}" for name, value in knobs(plan).items())])


def knobs(plan: Plan) -> dict[str, float]:
    """The numbers that the scheme depends on, by their names in the manifest."""
    settings = plan.settings()
    return {name: settings[name] for name in ("tau", "cap", "k", "draws") if name in settings}


def draw_weight(plan: Plan) -> float:
    """Weight of one draw, at most: the smaller, the less noise."""
    return 1.0 / plan.draws if plan.scheme == "random" else plan.tau
