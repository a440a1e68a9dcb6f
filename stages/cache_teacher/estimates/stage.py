"""`ddk-pipe estimate`: the teacher looks at a few windows of each domain, once for every setting that is tried."""

from __future__ import annotations

import json
from dataclasses import asdict

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.stages.cache_teacher.estimates.figures import Estimate, figures_of
from ddk_pipe.stages.cache_teacher.estimates.settings import ladder, name_of
from ddk_pipe.stages.cache_teacher.estimates.show import show_estimate
from ddk_pipe.stages.cache_teacher.estimates.trial import samples_of, try_plan
from ddk_pipe.stages.cache_teacher.maker import Job
from ddk_pipe.stages.cache_teacher.plan import plan_job
from ddk_pipe.stages.common import say, track
from ddk_pipe.stages.teachers import Teacher


def estimate(project: Project, *, windows: int | None = None, as_json: bool = False) -> Estimate:
    """Prepare the text if need be, run the teacher over `windows` of each domain (default: about 4k tokens), print.

    Raises DdkError for what cache-teacher would refuse. Writes nothing beside the prepared text.
    """
    if windows is not None and windows < 2:
        raise DdkError(
            f"--windows {windows}: at least 2", hint="one half is coded with a table from the other"
        )
    job = plan_job(project)
    plans = ladder(project, job)
    samples = samples_of(project, job.spec, windows)
    positions = sum(len(sample.windows) for sample in samples.values()) * job.spec.seq_len * len(plans)
    say(f"estimate: loading {job.model} with {job.backend}")
    teacher = _open(job)
    try:
        with track("estimate", positions, "positions") as advance:
            measured = []
            for plan in plans:
                measured.append(try_plan(job, plan, teacher, list(samples.values())))
                advance(positions / len(plans), name_of(plan))
    finally:
        teacher.close()
    found = figures_of(job.spec, plans, measured, list(samples.values()))
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show_estimate(found)
    return found


def _open(job: Job) -> Teacher:
    teacher = job.opener(
        job.model,
        job.manifest.teacher,
        backend=job.backend,
        seq_len=job.spec.seq_len,
        vocab_size=job.spec.vocab_size,
    )
    if teacher.vocab_size != job.spec.vocab_size:
        teacher.close()
        raise DdkError(
            f"the teacher predicts {teacher.vocab_size:,} tokens, its configuration and the tokenizer say {job.spec.vocab_size:,}",
            hint="mend vocab_size in its config.json",
        )
    return teacher
