"""A chat -> its text, the assistant's answers in it, and the control tokens that the template itself wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text.encoding.controls import Controls
from ddk_pipe.pipeline.text.encoding.mentions import Mentions, free_characters, strings
from ddk_pipe.pipeline.text.encoding.spans import Span, added_spans, generation_spans, marked_spans
from ddk_pipe.pipeline.text.encoding.template import GENERATION, Messages, Template
from ddk_pipe.pipeline.text.sources import Document

OTHER_TEMPLATE = "name another template: prepare.chat_template"


@dataclass(frozen=True)
class Rendered:
    """The text of a chat; `spelt`: it is for `Controls.letters`, and these are the control ids it must give."""

    text: str
    spans: list[Span]
    spelt: list[int] | None = None


@dataclass(frozen=True)
class _Chat:
    """The messages and tools as the template gets them, and what becomes of its rendering."""

    messages: Messages
    tools: list[Any] | None
    settle: Callable[[str], str]

    def show(self, template: Template, messages: Messages, *, prompt: bool = False) -> str | None:
        """The settled rendering of these messages with the chat's tools; None if the template refuses them."""
        rendered = template.attempt(messages, self.tools, prompt=prompt)
        return None if rendered is None else self.settle(rendered)


def render_chat(document: Document, template: Template, controls: Controls) -> Rendered:
    """Raises DdkError, naming file and row, for a chat that the template refuses or whose answers cannot be told."""
    try:
        return _render(document, template, controls)
    except DdkError:
        raise
    except Exception as problem:  # noqa: BLE001 - whatever the template's author raises in Jinja
        reason = str(problem).split("\n")[0]
        raise DdkError(
            f"{document.where}: the chat template refuses it ({reason})", hint="mend the messages"
        ) from None


def _render(document: Document, template: Template, controls: Controls) -> Rendered:
    source = template.source(document.tools)
    if document.tools and "tools" not in source:
        raise DdkError(
            f"{document.where}: a chat with tools, but the chat template has no place for them",
            hint=f"{OTHER_TEMPLATE}; or set the domain's tools_field to null to leave them out",
        )
    messages, plain = _first_taken(document, template)
    texts = list(strings([messages, document.tools]))
    if controls.pattern.search("\0".join(texts)):
        chat, mentions = _protected(document, messages, plain, texts, template, controls)
    else:
        chat, mentions = _Chat(messages, document.tools, lambda text: text), None

    whole = chat.settle(template.render(chat.messages, chat.tools))
    spans = _spans(document, chat, whole, template, controls)
    if mentions is None:
        return Rendered(whole, spans)
    text, moved, own = mentions.spell(whole)
    return Rendered(text, [span.moved(moved) for span in spans], own)


def _first_taken(document: Document, template: Template) -> tuple[Messages, str]:
    """The messages in the first form that the template takes, and their text: content that is null absent, or ""."""
    messages = document.messages or []
    forms = [messages]
    if any("content" not in message for message in messages):
        forms.append([{"content": "", **message} for message in messages])
    for form in forms[:-1]:
        text = template.attempt(form, document.tools)
        if text is not None:
            return form, text
    return forms[-1], template.render(forms[-1], document.tools)  # its refusal is the one that is told


def _protected(
    document: Document,
    messages: Messages,
    plain: str,
    texts: list[str],
    template: Template,
    controls: Controls,
) -> tuple[_Chat, Mentions]:
    """The chat with its mentions of control tokens written so that the rendering is the same but for them."""
    first = free_characters([plain, *texts], 1 + len(controls.ids))
    for by_mark in (False, True) if first is not None else ():
        mentions = Mentions(controls, first or 0, by_mark=by_mark)
        chat = _Chat(mentions.protect(messages), mentions.protect(document.tools), mentions.settle)
        whole = chat.show(template, chat.messages)
        if whole is not None and mentions.restore(whole) == plain:
            return chat, mentions
    raise DdkError(
        f"{document.where}: its text mentions control tokens, which the chat template reads or rewrites",
        hint=f"leave it out, or {OTHER_TEMPLATE}",
    )


def _spans(document: Document, chat: _Chat, whole: str, template: Template, controls: Controls) -> list[Span]:
    """The assistant's answers in `whole`."""
    if GENERATION.search(template.source(chat.tools)):
        text, places = template.render_marked(chat.messages, chat.tools)
        settled = [(len(chat.settle(text[:first])), len(chat.settle(text[:last]))) for first, last in places]
        return generation_spans(whole, settled, controls)

    def show(messages: Messages, *, prompt: bool = False) -> str | None:
        return chat.show(template, messages, prompt=prompt)

    spans = marked_spans(chat.messages, whole, show, controls)
    if spans is not None:
        return spans
    added = added_spans(chat.messages, whole, show, controls)
    if isinstance(added, int):
        raise DdkError(
            f"{document.where}: the chat template rewrites earlier turns, so turn {added + 1} cannot be found",
            hint="put {% generation %} and {% endgeneration %} around the answers in a copy of the template, and name"
            " it: prepare.chat_template",
        )
    return added
