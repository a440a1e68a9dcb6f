"""Records -> documents: which field is the text, what a chat must be, and what no tokenizer could take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Domain
from ddk_pipe.pipeline.text.sources.chats import read_chat

DEEPEST = 100  # levels of lists and objects in a chat: templates and JSON writers walk them by recursion
MOST_NAMES = 12  # fields or columns that an error lists
PLAIN_VALUES = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Document:
    """One document: plain text, or the messages of a chat; `where` is file and line or row, for errors."""

    where: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None  # that the chat's assistant may call

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name its content: equal documents have equal ones, wherever they stand.

        Salted: text that was sampled or sorted by a plain hash of its content is spread by this one all the same.
        """
        shown = [self.messages, self.tools] if self.tools else self.messages
        content = self.text if self.text is not None else json.dumps(shown, sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16, person=b"ddk-pipe text").digest()


def text_document(text: str, where: str) -> Document:
    """Plain text as a document. Raises DdkError for half a surrogate pair, which no tokenizer takes."""
    _check_letters(text, where)
    return Document(where=where, text=text)


def read_record(record: Any, domain: Domain, where: str, *, structs: bool = False) -> Document:
    """One record as a document; `structs`: from Arrow, where every field of every record is there, null or not.

    Raises DdkError, beginning with `where`, if it holds neither text nor a chat.
    """
    if not isinstance(record, dict):
        raise DdkError(f"{where}: not a JSON object", hint=f'write {{"{domain.text_field}": "..."}}')
    messages = record.get(domain.messages_field)
    if messages is not None:
        tools = record.get(domain.tools_field) if domain.tools_field else None
        check_values([messages, tools], where, field=domain.messages_field)
        messages, tools = read_chat(messages, tools, where, field=domain.messages_field, structs=structs)
        return Document(where=where, messages=messages, tools=tools)
    text = record.get(domain.text_field)
    if text is not None and not isinstance(text, str):
        raise DdkError(
            f"{where}: field {domain.text_field!r} is of type {type(text).__name__}, not text",
            hint="write text there, or set text_field or messages_field of the domain",
        )
    if text is None:
        raise DdkError(
            f"{where}: no field {domain.text_field!r} with text (fields: {listed(record)})",
            hint="set text_field or messages_field of the domain",
        )
    return text_document(text, where)


def check_values(value: Any, where: str, *, field: str) -> None:
    """Raise DdkError if a chat holds what JSON has no word for (a time, a decimal, bytes), or nests too deep."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                _check_letters(item, where)
            elif not isinstance(item, PLAIN_VALUES):
                raise DdkError(
                    f"{where}: {field} holds a value of type {type(item).__name__}, which no chat template takes",
                    hint="write it as text, or leave it out",
                )
        if not below:
            return
        level = below
    raise DdkError(f"{where}: {field} nests more than {DEEPEST} levels deep", hint="flatten it, or drop it")


def listed(names: Iterable[Any]) -> str:
    """Names of fields or columns for an error's line: the first dozen."""
    known = [repr(name)[1:-1] if isinstance(name, str) else repr(name) for name in names]
    more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
    return ", ".join(name[:60] for name in known[:MOST_NAMES]) + more or "none"


def _check_letters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise DdkError(
            f"{where}: half of a surrogate pair (\\u{ord(text[problem.start]):04x}, character {problem.start + 1}"
            " of its text), which is no character",
            hint="write both halves, or drop it",
        ) from None
