"""`ddk-pipe prepare`: the domains' text -> packed windows of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Domain, Project
from ddk_pipe.pipeline.text import (
    SPLITS,
    TOKENS_VERSION,
    TRAIN,
    VALIDATION,
    Encoder,
    Split,
    find_files,
    open_split,
)
from ddk_pipe.stages.common import check_engine, say
from ddk_pipe.stages.prepare.crews import Crew, open_crew
from ddk_pipe.stages.prepare.fingerprints import content_of, source_fingerprints
from ddk_pipe.stages.prepare.packing import pack_domain
from ddk_pipe.stages.prepare.parts import remove_parts
from ddk_pipe.stages.prepare.rules import CHAT_RULES, WORDS, rules_now

CHANGES = {
    "version": "the version of prepared tokens",
    **WORDS,
    "prepare": "settings in prepare",
    "fields": "names of fields",
    "shard_tokens": "the size of a shard",
    "attention": "attention",
    "packing": "packing",
}


def prepare(
    project: Project, *, engine: str = "local", workers: int | None = None
) -> dict[str, dict[str, Split]]:
    """Tokenise and pack every domain that is not prepared yet; returns the opened splits by domain.

    Parts of the text are tokenised by `workers` processes (engine: local; none: here) or actors on Ray (engine: ray); the
    tokens are the same. Raises DdkError for a mistake in the sources.
    """
    _check_crew(engine, workers)
    for name, domain in project.manifest.domains.items():  # all paths first: a typo costs nothing
        _check_sources(project, name, domain)
    encoder, rules = rules_now(project)
    with ExitStack() as stack:

        @functools.cache
        def crew() -> Crew:  # called where there is something to do
            return stack.enter_context(open_crew(project, encoder, engine=engine, workers=workers))

        return {
            name: _domain(project, name, domain, encoder, rules, crew)
            for name, domain in project.manifest.domains.items()
        }


def _check_crew(engine: str, workers: int | None) -> None:
    check_engine(engine)
    if workers is not None and workers < 1:
        raise DdkError(f"--workers {workers}: must be at least 1", hint="leave it out for this process alone")


def _check_sources(project: Project, name: str, domain: Domain) -> None:
    find_files(project, domain.train, field=f"domains.{name}.train")
    find_files(project, domain.validation or [], field=f"domains.{name}.validation")


def _domain(
    project: Project,
    name: str,
    domain: Domain,
    encoder: Encoder,
    rules: dict[str, str],
    crew: Callable[[], Crew],
) -> dict[str, Split]:
    folder = project.tokens / name
    known = _known(folder)
    record = {
        "version": TOKENS_VERSION,
        **rules,
        **_layout(project, domain),
        "seq_len": project.manifest.seq_len,
        "prepare": project.manifest.prepare.model_dump(exclude={"chat_template", "date"}),  # in CHAT_RULES
        "fields": [domain.text_field, domain.messages_field, domain.tools_field],
        "shard_tokens": project.manifest.cache.shard_windows * project.manifest.seq_len,
        "sources": {
            split: source_fingerprints(project, sources, known, field=f"domains.{name}.{split}")
            for split, sources in ((TRAIN, domain.train), (VALIDATION, domain.validation or []))
        },
    }
    if known and CHAT_RULES not in known:  # it holds no chats, so no template matters
        record.pop(CHAT_RULES)
    changed = _changed(known, record)
    if known and not changed:
        say(f"prepare {name}: already done")
        remove_parts(folder)  # of a run that was killed right before it did
        return {split: open_split(folder / split) for split in SPLITS}
    if known:
        say(f"prepare {name}: made again, for what it was made with changed: {', '.join(changed)}")
        record = {**record, **rules}
    return pack_domain(project, name, domain, encoder, record, crew())


def _layout(project: Project, domain: Domain) -> dict[str, str]:
    """How documents lie in windows, as far as it is not what all tokens had before there was a choice."""
    islands = {"attention": "document"} if project.manifest.attention == "document" else {}
    return {**islands, **({"packing": domain.packing} if domain.packing else {})}


def _known(folder: Path) -> dict[str, Any]:
    """The record both splits were made with, or nothing."""
    try:
        records = [open_split(folder / split).record for split in SPLITS]
    except (DdkError, KeyError, ValueError, TypeError):  # missing, cut short, or by another version
        return {}
    return records[0] if records[0] == records[1] else {}


def _changed(known: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What differs between two records, in words."""
    one, other = (content_of(item) if item else {} for item in (known, record))
    return [CHANGES.get(name, name) for name in {**record, **known} if one.get(name) != other.get(name)]
