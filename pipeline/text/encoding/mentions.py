"""Control tokens that the messages of a chat merely mention, kept apart from those that its template writes.

Before rendering, a mention is written as one private-use character; what is a control token's string in the rendering
is then the template's own.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

from ddk_pipe.pipeline.text.encoding.controls import Controls

PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
PRIVATE_FIRST, PRIVATE_LAST, STEP = 0xF0000, 0x10F000, 0x1000


def free_characters(texts: Iterable[str], count: int) -> int | None:
    """The first of `count` private-use characters in a row that none of the texts has; None if there are none."""
    used = sorted({ord(character) for text in texts for character in PRIVATE.findall(text)})
    for first in range(PRIVATE_FIRST, PRIVATE_LAST - count, STEP):
        at = bisect.bisect_left(used, first)
        if at == len(used) or used[at] >= first + count:
            return first
    return None


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def change_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The JSON value with `change` applied to every string of it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): change_strings(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [change_strings(item, change) for item in value]
    return value


class Mentions:
    """How one chat's mentions are written: each as a private-use character, or by its letters and a mark behind.

    The second way is for templates that look for a control token in the contents (`content.split('</think>')`).
    """

    def __init__(self, controls: Controls, first: int, *, by_mark: bool) -> None:
        self.controls, self.by_mark = controls, by_mark
        self._mark = chr(first)
        self._characters = {control: chr(first + 1 + place) for place, control in enumerate(controls.ids)}
        self._letters = {character: control for control, character in self._characters.items()}
        self._marked = re.compile(f"({controls.pattern.pattern}){self._mark}")
        self._own = re.compile(f"{controls.pattern.pattern}|[{''.join(self._letters)}]")

    def protect(self, value: Any) -> Any:
        """The JSON value with its mentions written for the template."""
        return change_strings(value, self._write)

    def _write(self, text: str) -> str:
        if self.by_mark:
            return self.controls.pattern.sub(lambda match: match[0] + self._mark, text)
        return self.controls.pattern.sub(lambda match: self._characters[match[0]], text)

    def settle(self, rendered: str) -> str:
        """What the template made of it, each mention now one private-use character."""
        if self.by_mark:
            rendered = self._marked.sub(lambda match: self._characters[match[1]], rendered)
        return rendered.replace(self._mark, "")

    def restore(self, settled: str) -> str:
        """The rendering with its mentions in letters, as it is without any care for them."""
        return "".join(self._letters.get(character, character) for character in settled)

    def spell(self, settled: str) -> tuple[str, Callable[[int], int], list[int]]:
        """The text for `Controls.letters`, where a character of `settled` went, and the template's control ids."""
        pieces, breaks, own, at = [], [0], [], 0
        for match in self._own.finditer(settled):
            pieces.append(settled[at : match.start()])
            if match[0] in self._letters:
                pieces.append(self._letters[match[0]])
            else:
                pieces.append(self.controls.spell(match[0]))
                own.append(self.controls.ids[match[0]])
            at = match.end()
            breaks += [match.start(), at]
        pieces.append(settled[at:])
        ends = [0, *accumulate(len(piece) for piece in pieces)]

        def moved(position: int) -> int:
            piece = bisect.bisect_right(breaks, position) - 1
            return min(ends[piece] + position - breaks[piece], ends[piece + 1])

        return "".join(pieces), moved, own
