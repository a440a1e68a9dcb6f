"""One run of a sweep, wherever it is handed to: what goes in, what comes out."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddk_pipe.pipeline.cache import CacheSpec, read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, RunSpec
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.targets import Plan
from ddk_pipe.stages.common import StoppedEarly, prepare_cpu
from ddk_pipe.stages.sweep.stop import Judge

Status = Literal["finished", "failed", "stopped early", "cache changed"]


@dataclass(frozen=True)
class Job:
    """A run and what must hold while it runs. Plain values: other machines read it."""

    run: RunSpec
    manifest: Path
    cache: str | None  # digest of what the cache holds for this run, as the sweep began; none: needs no cache
    threads: int | None  # of torch on a CPU; none: torch's own choice
    log: Path | None  # where its lines go; none: to this process's standard error
    judge: Judge | None = None  # says when it is clearly bad; none: it runs to its end


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    name: str
    status: Status
    error: str = ""  # one line
    seconds: float = 0.0  # of everything, building the student included
    step: int | None = None  # at which it was stopped early


def cache_digest(project: Project) -> str | None:
    """Digest of all that decides what the run reads of its cache; none for a run that reads none.

    Raises DdkError if there is no cache, or if the manifest says other settings than the cache was made with: a
    sweep over `cache.tau` would otherwise train every student on the same targets.
    """
    if project.manifest.distill.targets == "online":
        return None
    spec = read_spec(project.cache)
    wanted, there = Plan.of(project.manifest.cache).settings(), spec.plan.settings()
    differ = [name for name in wanted if name in there and wanted[name] != there[name]]
    if differ:
        told = ", ".join(f"{name} {there[name]} there, {wanted[name]} here" for name in differ)
        raise DdkError(
            f"{project.cache.name}: made with other settings ({told})",
            hint="make a cache for each setting (`ddk-pipe cache-teacher --set cache.path=...`) and vary cache.path"
            " along with it",
        )
    return digest_of_spec(spec, list(project.manifest.domains))


def digest_of_spec(spec: CacheSpec, domains: list[str]) -> str:
    """Of the fingerprint and of the tokens of these domains."""
    sizes = {
        name: {split: vars(size) for split, size in spec.domains.get(name, {}).items()} for name in domains
    }
    return durable.digest(durable.to_json({"fingerprint": spec.fingerprint, "domains": sizes}))


def run_one(job: Job) -> Outcome:
    """Train the run's student, or see that it is trained; what goes wrong is the outcome, not an exception.

    KeyboardInterrupt (Ctrl-C, SIGTERM) passes through, after the run's checkpoint is written.
    """
    began = time.monotonic()
    try:
        _train(job)
    except StoppedEarly as stop:
        return Outcome(job.run.name, "stopped early", seconds=time.monotonic() - began, step=stop.step)
    except _CacheChanged:
        return Outcome(job.run.name, "cache changed", seconds=time.monotonic() - began)
    except DdkError as mistake:
        return Outcome(job.run.name, "failed", _line(str(mistake)), time.monotonic() - began)
    except Exception as problem:  # noqa: BLE001 - whatever it is, the other runs go on
        traceback.print_exc()
        return Outcome(
            job.run.name,
            "failed",
            _line(f"{type(problem).__name__}: {problem}"),
            time.monotonic() - began,
        )
    return Outcome(job.run.name, "finished", seconds=time.monotonic() - began)


class _CacheChanged(Exception):
    pass


def _train(job: Job) -> None:
    prepare_cpu()
    import torch

    from ddk_pipe.stages.distill import distill

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    project = job.run.project(job.manifest)
    if cache_digest(project) != job.cache:
        raise _CacheChanged
    distill(project, job.judge.is_bad if job.judge else None)


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
