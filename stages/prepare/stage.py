"""`ddk-pipe prepare`: the domains' text -> packed windows of tokens."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import DatasetSource, Domain, Project, Source
from ddk_pipe.pipeline.text import (
    SPLITS,
    TOKENS_VERSION,
    TRAIN,
    VALIDATION,
    Document,
    Encoder,
    Split,
    SplitWriter,
    chat_rules,
    documents,
    find_files,
    open_split,
    pack,
    project_tokenizer,
    text_rules,
    tokenizer_digest,
    tokenizer_size,
)
from ddk_pipe.stages.common import say, track

CHAT_RULES = "chat_rules"  # in the record of domains that hold chats
CHANGES = {
    "version": "the version of prepared tokens",
    "tokenizer_digest": "the tokenizer's ids",
    "text_rules": "how the tokenizer turns text into ids",
    CHAT_RULES: "the chat template",
    "prepare": "settings in prepare",
    "fields": "names of fields",
    "shard_tokens": "the size of a shard",
}
HASH_RANGE = 1 << 32  # Document.fingerprint is below


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
    return _pack_domain(project, name, domain, encoder, record)


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


def _pack_domain(
    project: Project, name: str, domain: Domain, encoder: Encoder, record: dict[str, Any]
) -> dict[str, Split]:
    began = time.monotonic()
    threshold = int(project.manifest.prepare.validation_fraction * HASH_RANGE)
    if domain.validation is None:
        facts = _pack_with_split(project, name, domain, encoder, record, threshold)
    else:
        facts = {}
        writers = {split: _writer(project, name, encoder, split) for split in SPLITS}
        try:
            for split, sources in ((TRAIN, domain.train), (VALIDATION, domain.validation)):
                writer = writers[split]
                stream = documents(project, domain, sources, field=f"domains.{name}.{split}")
                _run(
                    project, f"prepare {name}/{split}", stream, encoder, {split: writer}, lambda _, s=split: s
                )
            facts = _finish(name, writers, record)
        finally:
            _discard(writers)
    seconds = time.monotonic() - began
    for split in SPLITS:
        say(
            f"prepare {name}/{split}: {facts[split]['documents']:,} documents, {facts[split]['tokens']:,} tokens,"
            f" {facts[split]['windows']:,} windows"
        )
    tokens = sum(facts[split]["tokens"] for split in SPLITS)
    say(f"prepare {name}: {tokens / max(seconds, 1e-9):,.0f} tokens/s")
    return {split: open_split(project.tokens / name / split) for split in SPLITS}


def _pack_with_split(
    project: Project,
    name: str,
    domain: Domain,
    encoder: Encoder,
    record: dict[str, Any],
    threshold: int,
) -> dict[str, dict[str, Any]]:
    """Set documents aside for validation by their hash; if none falls below the threshold, the lowest one."""
    lowest, count = HASH_RANGE, 0

    def side(document: Document) -> str:
        nonlocal lowest, count
        mark = document.fingerprint()
        lowest, count = min(lowest, mark), count + 1
        return VALIDATION if mark < threshold else TRAIN

    writers = {split: _writer(project, name, encoder, split) for split in SPLITS}
    try:
        stream = documents(project, domain, domain.train, field=f"domains.{name}.train")
        _run(project, f"prepare {name}", stream, encoder, writers, side)
        if count == 1:
            raise DdkError(
                f"domains.{name}: one document cannot be both training and validation text",
                hint=f"name files in domains.{name}.validation, or split the document",
            )
        if count and not writers[VALIDATION].facts.documents:
            return _pack_with_split(project, name, domain, encoder, record, lowest + 1)
        return _finish(name, writers, record)
    finally:
        _discard(writers)


def _writer(project: Project, name: str, encoder: Encoder, split: str) -> SplitWriter:
    limits = project.manifest.prepare
    return SplitWriter(
        project.tokens / name / split,
        seq_len=project.manifest.seq_len,
        vocab_size=tokenizer_size(encoder.tokenizer),
        eos=encoder.eos,
        max_windows=limits.max_train_windows if split == TRAIN else limits.max_validation_windows,
    )


def _run(
    project: Project, what: str, stream: Any, encoder: Encoder, writers: dict[str, SplitWriter], side: Any
) -> None:
    with track(what, None, "tokens") as advance:
        pack(
            stream,
            encoder,
            lambda document: writers[side(document)],
            max_tokens=project.manifest.cache.shard_windows * project.manifest.seq_len,
            finished=lambda: all(writer.full for writer in writers.values()),
            progress=advance,
        )


def _finish(name: str, writers: dict[str, SplitWriter], record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for split, writer in writers.items():
        if not writer.facts.documents:
            raise DdkError(
                f"domains.{name}: no text in its {split} sources", hint="name files that hold documents"
            )
    if not any(writer.facts.chats for writer in writers.values()):
        record = {name: value for name, value in record.items() if name != CHAT_RULES}
    facts = {split: asdict(writer.finish(record)) for split, writer in writers.items()}
    for split in SPLITS:
        if not facts[split]["labels"]:
            raise DdkError(
                f"domains.{name}: no token of its {split} text is a label",
                hint="chats need turns of the assistant",
            )
    return facts


def _discard(writers: dict[str, SplitWriter]) -> None:
    for writer in writers.values():
        writer.discard()
