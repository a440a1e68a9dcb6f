"""How the run that a folder holds stands to the one that is asked for: the same and finished, to be gone on with, another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.cache import read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, recorded_manifest
from ddk_pipe.stages.common import load_run, say
from ddk_pipe.stages.distill.identity.comparing import differences, other_run
from ddk_pipe.stages.distill.identity.digests import Digests
from ddk_pipe.stages.distill.identity.extending import begin_to_extend, is_longer
from ddk_pipe.stages.distill.identity.made_of import made_of
from ddk_pipe.stages.distill.identity.record import Identity, read_identity, write_identity
from ddk_pipe.stages.distill.position import settings_in, settings_of

Asked = tuple[Identity, dict[str, dict[str, str]]]
PARTS = {  # that a finished run may have lost, and in words
    "cache": "the cache",
    "tokens": "the tokens",
    "teacher": "the teacher",
    "tokenizer": "the tokenizer",
    "student": "what the student started from",
}


def finished_run(project: Project) -> dict[str, Any] | None:
    """The summary of the run if it is finished and what is asked for; None for one to begin, go on with or extend.

    Writes nothing. Raises DdkError, naming what differs, if the folder holds another finished run.
    """
    if not (project.run / "run.json").exists():
        return None
    summary = load_run(project.run).summary or {}
    recorded, known = read_identity(project.run)
    now = made_of(project, Digests(known), finished=True)
    if recorded is None:
        _compare_older(project, summary, now)
        return summary
    found = _differences(recorded, Identity(settings_in(project), now))
    gone = [word for name, word in PARTS.items() if name in now and now[name] is None]
    found = {name: values for name, values in found.items() if name not in PARTS or now[name] is not None}
    if is_longer(found):
        return None
    if found:
        raise other_run(project.run, found)
    if gone:
        say(f"distill: not there any more, so not compared: {', '.join(dict.fromkeys(gone))}")
    # another digest: a longer run was begun in its place, and ended before it wrote its own
    return summary if summary.get("settings") == settings_of(project) else None


def asked_for(project: Project) -> Asked:
    """What the run is to be, and the digests that were found for it; writes nothing.

    Raises DdkError if what it reads or starts from is not there.
    """
    digests = Digests(read_identity(project.run)[1])
    return Identity(settings_in(project), made_of(project, digests, finished=False)), digests.known


def begin(project: Project, asked: Asked) -> Identity:
    """What the run is, noted in its folder; to be called by one process, before the run's first step or its next.

    Raises DdkError, naming what differs, if the folder holds another run, or one that does not say what it is.
    """
    identity, known = asked
    recorded, _ = read_identity(project.run)
    if _holds_work(project.run):
        if recorded is None:
            raise DdkError(
                f"{project.run}: holds a run that does not say what it was made of (identity.json is not there)",
                hint="set another distill.name, or delete that folder",
            )
        found = _differences(recorded, identity)
        identity = Identity(identity.settings, identity.made_of, recorded.extends)
        if is_longer(found):
            identity = begin_to_extend(project, recorded, identity, known)
        elif found:
            raise other_run(project.run, found)
    write_identity(project.run, identity, known)
    return identity


def _holds_work(run: Path) -> bool:
    return (run / "run.json").exists() or any((run / "checkpoints").glob("step-*"))


def _differences(before: Identity, now: Identity) -> dict[str, tuple[Any, Any]]:
    return differences(
        {"settings": before.settings, **before.made_of}, {"settings": now.settings, **now.made_of}
    )


def _compare_older(project: Project, summary: dict[str, Any], now: dict[str, Any]) -> None:
    """A finished run from before runs had identities: its settings, and what run.json says of its cache.

    Raises DdkError for others.
    """
    if summary.get("settings") != settings_of(project):
        before = _settings_then(project, summary)
        found = differences({"settings": before}, {"settings": settings_in(project)})
        raise other_run(project.run, found or {"settings": (summary.get("settings"), settings_of(project))})
    then, here = summary.get("cache_fingerprint"), _fingerprint(project, now)
    if here is not None and then is not None and then != here:
        raise other_run(project.run, {"cache.fingerprint": (then, here)})
    compared = "its cache alone was compared" if here and then else "it was not compared"
    say(f"distill: {project.run} was made before runs kept what they were made of: {compared}")


def _fingerprint(project: Project, now: dict[str, Any]) -> str | None:
    return read_spec(project.cache).fingerprint if now.get("cache") is not None else None


def _settings_then(project: Project, summary: dict[str, Any]) -> dict[str, Any]:
    try:
        return settings_in(Project(recorded_manifest(summary["manifest"]), project.root))
    except (KeyError, ValueError):
        return {}
