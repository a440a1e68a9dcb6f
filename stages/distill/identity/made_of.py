"""What a run reads and starts from, as names and digests. Of a finished run, as far as it is still on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.cache import CacheSpec, read_spec, require_attention
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.models import model_folder, model_here
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.text import SPLITS, open_split, project_tokenizer, tokenizer_digest
from ddk_pipe.stages.common import say
from ddk_pipe.stages.distill.identity.digests import Digests
from ddk_pipe.stages.prepare import check_rules

Facts = dict[str, Any]


def made_of(project: Project, digests: Digests, *, finished: bool) -> Facts:
    """{"cache": ..., "tokens": ..., "student": ..., ...}, as JSON has it; what decides a run besides its settings.

    A part that a `finished` run needs no more and that is gone is None; for another run that is a DdkError.
    Raises DdkError too for a cache that is not of the manifest's teacher.
    """
    if project.manifest.distill.targets == "online":
        read = _online(project, digests, finished=finished)
    else:
        spec = _spec(project, finished=finished)
        if spec is not None:
            require_attention(project.cache, spec, project.manifest.attention)
            _same_teacher(project, spec, digests, finished=finished)
            _same_rules(project, spec, finished=finished)
        read = _cached(project, spec)
    facts = {
        "domains": list(project.manifest.domains),  # weights and cursors are kept in this order
        **read,
        "student": _student(project, digests, finished=finished),
    }
    return dict(json.loads(durable.to_json(facts)))


def _spec(project: Project, *, finished: bool) -> CacheSpec | None:
    if finished and not project.cache.exists("cache.json"):
        return None
    return read_spec(project.cache)


def _cached(project: Project, spec: CacheSpec | None) -> Facts:
    """The cache by what its own fingerprint is of, and the tokens of the domains that the run reads.

    Where it lies, its other domains, and how it is cut into shards decide nothing.
    """
    if spec is None:
        return {"cache": None, "tokens": None}
    return {"cache": spec.identity(), "tokens": _tokens_of(spec, project)}


def _tokens_of(spec: CacheSpec, project: Project) -> Facts:
    return {
        f"{name}/{split}": {"windows": size.windows, "digest": size.tokens_digest}
        for name in project.manifest.domains
        for split, size in spec.domains.get(name, {}).items()
    }


def _online(project: Project, digests: Digests, *, finished: bool) -> Facts:
    return {
        "teacher": _teacher(project, digests, finished=finished),
        "teacher_dtype": project.manifest.teacher.dtype,
        "tokenizer": _tokenizer(project, finished=finished),
        "tokens": _prepared(project, finished=finished),
    }


def _tokenizer(project: Project, *, finished: bool) -> str | None:
    try:
        return tokenizer_digest(project_tokenizer(project))
    except DdkError:
        if finished:
            return None
        raise


def _prepared(project: Project, *, finished: bool) -> Facts | None:
    found: Facts = {}
    for name in project.manifest.domains:
        for split in SPLITS:
            try:
                facts = open_split(project.tokens / name / split).facts
            except DdkError:
                if finished:
                    return None
                raise
            found[f"{name}/{split}"] = {"windows": facts.windows, "digest": facts.digest}
    return found


def _teacher(project: Project, digests: Digests, *, finished: bool) -> str | None:
    revision = project.manifest.teacher.revision
    return _weights(project.teacher_model, "teacher.model", digests, revision=revision, finished=finished)


def _weights(
    name: str, field: str, digests: Digests, *, revision: str | None = None, finished: bool
) -> str | None:
    if finished:
        folder = model_here(name, revision=revision)
        return None if folder is None else digests.of(folder)
    return digests.of(model_folder(name, field=field, revision=revision))


def _student(project: Project, digests: Digests, *, finished: bool) -> str | None:
    """Digest of the weights that the student started from; of its configuration, where they are fresh."""
    student = project.manifest.student
    if student is None:
        return None
    if student.model is not None:
        name = project.model(student.model, field="student.model")
        return _weights(name, "student.model", digests, finished=finished)
    if student.keep_layers is not None:
        return _teacher(project, digests, finished=finished)
    if isinstance(student.config, str):
        return _configuration(project.path(student.config, field="student.config"))
    return durable.digest(durable.to_json(student.config))


def _configuration(path: Path) -> str | None:
    """Of its values, not of how they are written; None for one that cannot be read (the student says why)."""
    try:
        return durable.digest(durable.to_json(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecursionError):
        return None


def _same_rules(project: Project, spec: CacheSpec, *, finished: bool) -> None:
    """Raises DdkError if the tokenizer turns text or chats into other ids than when the cache was made."""
    if finished and _tokenizer(project, finished=True) is None:
        return
    check_rules(project, spec.about.get("encoding"), what=f"the cache at {project.cache}")


def _same_teacher(project: Project, spec: CacheSpec, digests: Digests, *, finished: bool) -> None:
    """Raises DdkError if the manifest names another teacher than the cache's, by its weights.

    They are read only if its name is another one, or if the student starts from its layers: who trains from a cache
    needs no teacher.
    """
    named, cached, student = project.manifest.teacher, spec.about.get("model"), project.manifest.student
    if named.model == cached and (student is None or student.keep_layers is None):
        return
    folder = model_here(project.teacher_model, revision=named.revision)
    if folder is None:
        if named.model != cached and not finished:
            say(
                f"distill: the cache at {project.cache} is of {cached}; whether that is teacher.model"
                f" ({named.model}) cannot be told, for that is not on this machine"
            )
        return
    here, there = digests.of(folder), str(spec.teacher.get("weights_digest"))
    if here != there:
        raise DdkError(
            f"teacher.model: {named.model} is not the teacher that the cache at {project.cache} was made with"
            f" (teacher weights {there[:8]} of {cached} there, {here[:8]} here)",
            hint="run `ddk-pipe cache-teacher` with another cache.path and distill.name, or name the cache's teacher",
        )
