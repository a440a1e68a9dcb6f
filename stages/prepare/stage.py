"""`ddk-pipe prepare`: the domains' text -> packed windows of tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import DatasetSource, Domain, Project, Source
from ddk_pipe.pipeline.text import (
    SPLITS,
    TOKENS_VERSION,
    TRAIN,
    VALIDATION,
    Encoder,
    Split,
    chat_rules,
    find_files,
    open_split,
    project_tokenizer,
    text_rules,
    tokenizer_digest,
)
from ddk_pipe.stages.common import say
from ddk_pipe.stages.prepare.packing import CHAT_RULES, pack_domain

CHANGES = {
    "version": "the version of prepared tokens",
    "tokenizer_digest": "the tokenizer's ids",
    "text_rules": "how the tokenizer turns text into ids",
    CHAT_RULES: "the chat template",
    "prepare": "settings in prepare",
    "fields": "names of fields",
    "shard_tokens": "the size of a shard",
}


def prepare(project: Project) -> dict[str, dict[str, Split]]:
    """Tokenise and pack every domain that is not prepared yet; returns the opened splits by domain."""
    for name, domain in project.manifest.domains.items():  # all paths first: a typo costs nothing
        _check_sources(project, name, domain)
    tokenizer = project_tokenizer(project)
    encoder = Encoder(tokenizer, name=project.tokenizer, date=project.manifest.prepare.date)
    rules = {
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "text_rules": text_rules(encoder),
        CHAT_RULES: chat_rules(encoder),
    }
    return {
        name: _domain(project, name, domain, encoder, rules)
        for name, domain in project.manifest.domains.items()
    }


def _check_sources(project: Project, name: str, domain: Domain) -> None:
    find_files(project, domain.train, field=f"domains.{name}.train")
    find_files(project, domain.validation or [], field=f"domains.{name}.validation")


def _domain(
    project: Project, name: str, domain: Domain, encoder: Encoder, rules: dict[str, str]
) -> dict[str, Split]:
    folder = project.tokens / name
    known = _known(folder)
    record = {
        "version": TOKENS_VERSION,
        **rules,
        "seq_len": project.manifest.seq_len,
        "prepare": project.manifest.prepare.model_dump(exclude={"chat_template", "date"}),  # in CHAT_RULES
        "fields": [domain.text_field, domain.messages_field, domain.tools_field],
        "shard_tokens": project.manifest.cache.shard_windows * project.manifest.seq_len,
        "sources": {
            split: _fingerprints(project, sources, known, field=f"domains.{name}.{split}")
            for split, sources in ((TRAIN, domain.train), (VALIDATION, domain.validation or []))
        },
    }
    if known and CHAT_RULES not in known:  # it holds no chats, so no template matters
        record.pop(CHAT_RULES)
    changed = _changed(known, record)
    if known and not changed:
        say(f"prepare {name}: already done")
        return {split: open_split(folder / split) for split in SPLITS}
    if known:
        say(f"prepare {name}: made again, for what it was made with changed: {', '.join(changed)}")
        record = {**record, **rules}
    return pack_domain(project, name, domain, encoder, record)


def _known(folder: Path) -> dict[str, Any]:
    """The record both splits were made with, or nothing."""
    try:
        records = [open_split(folder / split).record for split in SPLITS]
    except (DdkError, KeyError, ValueError, TypeError):  # missing, cut short, or by another version
        return {}
    return records[0] if records[0] == records[1] else {}


def _changed(known: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What differs between two records, in words."""
    one, other = (_content(item) if item else {} for item in (known, record))
    return [CHANGES.get(name, name) for name in record if one.get(name) != other[name]]


def _content(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what may differ between equal files: where they lie and when they were touched."""
    sources = {
        split: [item.get("sha256") or item for item in items] for split, items in record["sources"].items()
    }
    return {**record, "sources": sources}


def _fingerprints(
    project: Project, sources: list[Source], known: dict[str, Any], *, field: str
) -> list[dict[str, Any]]:
    """What identifies each source; a file is hashed only if its size or time changed since `known`."""
    before = {
        item.get("path"): item
        for items in known.get("sources", {}).values()
        for item in items
        if "path" in item
    }
    out: list[dict[str, Any]] = []
    for source in sources:
        if isinstance(source, DatasetSource):
            out.append({"dataset": source.model_dump()})
            continue
        for path in find_files(project, [source], field=field):
            facts = path.stat()
            seen = before.get(str(path), {})
            unchanged = (seen.get("bytes"), seen.get("mtime_ns")) == (facts.st_size, facts.st_mtime_ns)
            sha256 = seen["sha256"] if unchanged else _sha256(path)
            out.append(
                {"path": str(path), "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns, "sha256": sha256}
            )
    return out


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:
        raise DdkError(f"{path}: no permission to read it", hint="change its mode or owner") from None
