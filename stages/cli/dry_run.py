"""`ddk-pipe distill --dry-run`: what a manifest would do, and whether it can, without network, cache or a model."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import (
    Distill,
    Project,
    Schedule,
    Student,
    check_tail,
    windows_per_domain,
    windows_per_step,
)
from ddk_pipe.pipeline.mixing import mixing_rule

TAIL_SCHEMES = ("threshold", "topk")


def describe(project: Project) -> list[str]:
    """One line per part of the plan. Raises DdkError for what distill would refuse for the manifest's own sake."""
    check(project)
    return list(_lines(project))


def check(project: Project) -> None:
    """Every contradiction that the manifest alone shows; the sizes of the domains are not known yet."""
    manifest, options = project.manifest, project.manifest.distill
    if manifest.student is None:
        raise DdkError(
            "student: missing", hint="add student: {keep_layers: [...]}, {model: ...} or {config: ...}"
        )
    if options.targets == "cache":
        _check_targets(project)
    windows_per_step(options, manifest.seq_len, int(os.environ.get("WORLD_SIZE", "1")))
    domains = list(manifest.domains)
    mixing_rule(options, domains, [1] * len(domains))


def _check_targets(project: Project) -> None:
    cache, options = project.manifest.cache, project.manifest.distill
    if options.temperature not in cache.temperatures:
        listed = ", ".join(map(str, cache.temperatures))
        raise DdkError(
            f"distill.temperature: {options.temperature} is not in cache.temperatures ({listed})",
            hint="use one of those, or add it there before caching",
        )
    check_tail(options, cache.scheme, has_tail=cache.scheme in TAIL_SCHEMES)


def _lines(project: Project) -> Iterator[str]:
    manifest, options = project.manifest, project.manifest.distill
    windows = windows_per_step(options, manifest.seq_len)
    step_tokens, domains = windows * manifest.seq_len, list(manifest.domains)
    total = options.steps * step_tokens
    assert manifest.student is not None
    yield f"would train {_student(manifest.student)} from {manifest.teacher.model}, in {project.run}"
    yield f"domains: {', '.join(domains)}"
    yield (
        f"data: {windows:,} windows of {manifest.seq_len:,} tokens = {step_tokens:,} tokens a step, {options.steps:,}"
        f" steps, {total:,} tokens"
    )
    yield f"loss: {_loss(options)}"
    yield from _mixing(options, len(domains), total)
    yield f"learning rate: {_rate(options.schedule, options)}"
    count = windows_per_domain(options, manifest.seq_len, len(domains))
    share = count * len(domains) / (options.interval_steps * windows)
    yield (
        f"validation: at most {count:,} windows a domain every {options.interval_steps:,} steps,"
        f" {share:.1%} of the tokens trained meanwhile"
    )
    yield f"targets: {_targets(project)}"


def _student(student: Student) -> str:
    if student.model is not None:
        return student.model
    if student.keep_layers is not None:
        return f"{len(student.keep_layers)} of the teacher's layers"
    return "fresh weights of student.config"


def _loss(options: Distill) -> str:
    if options.gamma == 0:
        return "cross-entropy alone (continued pre-training)"
    order = "teacher || student" if options.direction == "forward" else "student || teacher"
    return f"CE + {options.gamma:g} KL({order}) at T = {options.temperature:g}"


def _mixing(options: Distill, domains: int, total: int) -> Iterator[str]:
    updates = (options.steps - 1) // options.interval_steps
    first = options.initial or "the rule's own"
    yield f"mixing: {options.mixing}, {updates:,} updates, first interval {first}"
    if options.mixing == "ddk" and options.prior == "uniform":
        floor = (1 - options.alpha) / domains
        most = options.alpha + floor
        yield (
            f"weights after an update: {floor:.1%} to {most:.1%} a domain (Eq. 2); at most {most * total:,.0f} tokens"
            " of one domain in all, or it wraps around"
        )


def _rate(schedule: Schedule, options: Distill) -> str:
    peak, warmup = options.optimizer.learning_rate, round(schedule.warmup_fraction * options.steps)
    end = "" if schedule.name == "constant" else f" to {peak * schedule.final_ratio:g}"
    return f"warm-up of {warmup:,} steps to {peak:g}, then {schedule.name}{end}"


def _targets(project: Project) -> str:
    if project.manifest.distill.targets == "online":
        return "the teacher in memory at every step; no cache"
    named = project.manifest.cache.path or str(project.output / "cache")
    there = ""
    if "://" not in named and not (project.path(named, field="cache.path") / "cache.json").exists():
        there = " (not there yet: run `ddk-pipe cache-teacher`)"
    return f"the cache at {named}{there}"
