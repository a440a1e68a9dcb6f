"""A tokenizer's chat template: messages -> text, on one fixed day."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

from ddk_pipe.pipeline.text.encoding.controls import any_of

Messages = list[dict[str, Any]]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE_NAMES = ("strftime_now", "date_string")  # by which templates ask for today
DATE_STRING = "%d %b %Y"  # what Llama's templates, which have the name, write


class Template:
    """The chat template of `tokenizer`; every rendering is of `date`, whatever the day."""

    def __init__(self, tokenizer: Any, date: datetime.date) -> None:
        moment = datetime.datetime.combine(date, datetime.time(12))
        self._tokenizer = tokenizer
        self._values = {
            **tokenizer.special_tokens_map,
            "strftime_now": moment.strftime,
            "date_string": moment.strftime(DATE_STRING),
        }

    def source(self, tools: list[Any] | None = None) -> str:
        """The Jinja text that a chat with these tools is rendered by; a tokenizer may have several."""
        return str(self._tokenizer.get_chat_template(None, tools))

    def render(self, messages: Messages, tools: list[Any] | None, *, prompt: bool = False) -> str:
        """The text; with `prompt` the opening of the assistant's next turn behind it. Raises what the template raises."""
        return str(self._render(messages, tools, prompt=prompt)[0][0])

    def attempt(self, messages: Messages, tools: list[Any] | None, *, prompt: bool = False) -> str | None:
        """The text, None if the template refuses the messages."""
        try:
            return self.render(messages, tools, prompt=prompt)
        except Exception:  # noqa: BLE001 - whatever its author raises in Jinja
            return None

    def render_marked(self, messages: Messages, tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        """The text and the characters [first, last) of it that the template's own generation marks enclose."""
        rendered, places = self._render(messages, tools, return_assistant_tokens_mask=True)
        return str(rendered[0]), [(int(first), int(last)) for first, last in places[0]]

    def _render(
        self, messages: Messages, tools: list[Any] | None, *, prompt: bool = False, **more: Any
    ) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template(
            conversations=[messages],
            tools=tools or None,
            chat_template=self.source(tools),
            add_generation_prompt=prompt,
            **more,
            **self._values,
        )


def sources(tokenizer: Any) -> Iterator[str]:
    """Every chat template of the tokenizer: none, one, or several by name."""
    named = getattr(tokenizer, "chat_template", None) or {}
    yield from [named] if isinstance(named, str) else named.values()


def asks_for_date(tokenizer: Any) -> bool:
    """Whether what a template writes may depend on the day."""
    return any(name in source for source in sources(tokenizer) for name in DATE_NAMES)


def turn_marks(tokenizer: Any, template: Template) -> set[str]:
    """Added tokens that stand around a turn: what opens or closes one, though it may not be flagged as special.

    DeepSeek's mark of the user is an ordinary added token, and so is "<think>", which answers hold as text: of the
    assistant's opening only its first token is taken.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    pattern = re.compile(any_of(added))
    message = [{"role": "user", "content": "x"}]
    turn, opened = template.attempt(message, None), template.attempt(message, None, prompt=True)
    if (
        turn is None or opened is None
    ):  # no template, or one that wants other messages: only special tokens then
        return set()
    opening = opened[len(turn) :] if opened.startswith(turn) else ""
    return {*pattern.findall(turn), *pattern.findall(opening)[:1]}
