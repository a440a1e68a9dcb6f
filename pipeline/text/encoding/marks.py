"""Where each message of a chat stands in its rendering, found by private-use marks around its strings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddk_pipe.pipeline.text.encoding.template import Messages

NOT_SHOWN = {
    "role",
    "type",
    "id",
    "tool_call_id",
    "index",
}  # what templates look up or compare, not what they show
Show = Callable[
    ..., str | None
]  # (messages, prompt=False) -> settled rendering; None: the template refuses them
Wanted = Callable[[dict[str, Any], str], bool]  # (message, name of its field) -> whether to mark it

CHOICES: tuple[Wanted, ...] = (
    lambda message, name: True,
    lambda message, name: message["role"] == "assistant",
    lambda message, name: message["role"] == "assistant" and name == "content",
)


@dataclass
class Places:
    """Marks found in one rendering: `plain` is the rendering without them, positions are in `plain`."""

    plain: str
    marks: list[tuple[int, int]]  # (position, mark), in order
    turns: dict[int, tuple[int, int]]  # of a message: its first and its last mark, as places in `marks`
    count: int  # messages of the chat

    def in_one_piece(self, turn: int) -> bool:
        """Whether no other message stands inside this one."""
        first, last = self.turns[turn]
        return all(mark % self.count == turn for _, mark in self.marks[first : last + 1])

    def around(self, turn: int) -> tuple[int, int]:
        """Places in `marks` of the last mark before the message and of the first one behind it."""
        if turn in self.turns:
            return self.turns[turn][0] - 1, self.turns[turn][1] + 1
        before = max((last for other, (_, last) in self.turns.items() if other < turn), default=-1)
        return before, before + 1

    def position(self, place: int) -> int:
        """Where that mark stands: the text's start or end for one that is not there."""
        if place < 0:
            return 0
        return self.marks[place][0] if place < len(self.marks) else len(self.plain)

    def ends_in_content(self, turn: int) -> bool:
        """Whether the message's last string is its content, and not a tool call or a thought."""
        return turn in self.turns and self.marks[self.turns[turn][1]][1] >= 2 * self.count


class Marker:
    """Marks for the messages of one chat: three private-use characters each, from `first` on."""

    def __init__(self, messages: Messages, first: int) -> None:
        self.count, self._first = len(messages), first
        last = first + 3 * self.count - 1
        self._pattern = re.compile(f"[{chr(first)}-{chr(last)}]")

    def mark(self, messages: Messages, wanted: Wanted) -> Messages:
        """The messages with the strings of every wanted field between marks."""
        return [
            {
                name: self._value(value, turn, name)
                if name not in NOT_SHOWN and wanted(message, name)
                else value
                for name, value in message.items()
            }
            for turn, message in enumerate(messages)
        ]

    def _value(self, value: Any, turn: int, name: str) -> Any:
        if isinstance(value, str):
            return self._wrap(value, turn, 2 if name == "content" else 1)
        if isinstance(value, dict):
            return {
                key: item if key in NOT_SHOWN else self._value(item, turn, "") for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._value(item, turn, "") for item in value]
        return value

    def _wrap(self, text: str, turn: int, closing: int) -> str:
        """`text` between marks that stand inside its leading and trailing white space: templates trim it."""
        inner = text.strip()
        if not inner:
            return text
        at = text.index(inner)
        opened, closed = chr(self._first + turn), chr(self._first + closing * self.count + turn)
        return f"{text[:at]}{opened}{inner}{closed}{text[at + len(inner) :]}"

    def places(self, rendered: str) -> Places:
        """Where the marks stand."""
        marks: list[tuple[int, int]] = []
        turns: dict[int, tuple[int, int]] = {}
        for seen, match in enumerate(self._pattern.finditer(rendered)):
            mark = ord(match[0]) - self._first
            turn = mark % self.count
            turns[turn] = (turns.get(turn, (seen, seen))[0], seen)
            marks.append((match.start() - seen, mark))
        return Places(self._pattern.sub("", rendered), marks, turns, self.count)

    def tail(self, rendered: str) -> tuple[str, int]:
        """What follows the last mark, and which mark that is (-1: there is none, all follows)."""
        at = len(rendered)
        for at in range(len(rendered) - 1, -1, -1):
            if self._pattern.match(rendered[at]):
                return rendered[at + 1 :], ord(rendered[at]) - self._first
        return rendered, -1
