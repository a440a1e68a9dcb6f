"""Which characters of a rendered chat are the assistant's answers, the end marks that close them included.

Templates of reasoning models show earlier turns in other words than the last one, so an answer is not simply what a
turn adds to the text. In this order: the template's own generation marks; marks around the contents in one rendering;
what each turn adds, where earlier turns stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ddk_pipe.pipeline.text.encoding.controls import Controls, shared_length
from ddk_pipe.pipeline.text.encoding.marks import CHOICES, Marker, Places, Show
from ddk_pipe.pipeline.text.encoding.mentions import free_characters
from ddk_pipe.pipeline.text.encoding.template import Messages


@dataclass(frozen=True)
class Span:
    """Characters [first, last) of an answer. What is not `closed` is closed by the token that follows."""

    first: int
    last: int
    closed: bool

    def moved(self, moved: Callable[[int], int]) -> Span:
        return Span(moved(self.first), moved(self.last), self.closed)


def generation_spans(whole: str, places: list[tuple[int, int]], controls: Controls) -> list[Span]:
    """Spans from the template's own generation marks; one that leaves out the mark that ends it is given that."""
    spans = []
    for first, last in places:
        if first == last:
            continue
        following = controls.pattern.search(whole, last)
        if _ends_in_control(whole[first:last], controls):
            spans.append(Span(first, last, True))
        elif following and not whole[last : following.start()].strip():
            spans.append(Span(first, following.end(), True))
        else:
            spans.append(_left_open(whole, first, last))
    return spans


def marked_spans(messages: Messages, whole: str, show: Show, controls: Controls) -> list[Span] | None:
    """Spans from one rendering with marks around the messages' strings; None if the template will not have them."""
    first = free_characters([whole], 3 * len(messages))
    if first is None:
        return None
    marker = Marker(messages, first)
    for wanted in CHOICES:
        marked = marker.mark(messages, wanted)
        rendered = show(marked)
        places = None if rendered is None else marker.places(rendered)
        if places is None or places.plain != whole:
            continue
        spans = _Turns(messages, marked, marker, places, show, controls).spans()
        if spans is not None:
            return spans
    return None


def added_spans(messages: Messages, whole: str, show: Show, controls: Controls) -> list[Span] | int:
    """Spans from what each turn adds to the rendering; the index of a turn after which earlier ones changed."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = show(messages[:turn], prompt=True) if turn else ""
        after = show(messages[: turn + 1])
        if before is None or after is None or not (after.startswith(before) and whole.startswith(after)):
            return turn
        ends = _last_control(after[len(before) :], controls)
        if ends is not None:
            spans.append(Span(len(before), len(before) + ends, True))
        else:
            spans.append(_left_open(whole, len(before), len(after)))
    return spans


@dataclass
class _Turns:
    """The assistant's turns of one chat, between marks."""

    messages: Messages
    marked: Messages
    marker: Marker
    places: Places
    show: Show
    controls: Controls

    def spans(self) -> list[Span] | None:
        """None where an answer is not shown, stands in pieces, or where it starts cannot be told."""
        spans: list[Span] = []
        for turn, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            shown = turn in self.places.turns
            if not shown and self.marked[turn] != message:
                return None
            if shown and not self.places.in_one_piece(turn):
                return None
            first = self._start(turn)
            if first is None and shown:
                return None
            if first is not None and (not spans or first >= spans[-1].first):
                spans.append(self._span(turn, first))
        return spans

    def _start(self, turn: int) -> int | None:
        """Where the turn departs from the prompt that asks for it: that far the template leads, then answers begin."""
        before, _ = self.places.around(turn)
        start, own = self.places.position(before), self.places.turns.get(turn)
        text = self.places.plain
        gap = text[start : self.places.position(own[0] if own else before + 1)]
        opened = own is not None and self.places.marks[own[0]][1] < self.places.count
        tail, mark = self._tail(turn, prompt=True)
        if tail is not None and mark == (self.places.marks[before][1] if before >= 0 else -1):
            shared = self._shared(gap, tail)
            if shared == len(tail) or (own and shared == len(gap)):
                return start + shared
        if own is None:
            return None
        header = self._header(turn)
        for size in range(len(header), self._least(header) - 1, -1):
            at = gap.rfind(header[:size])
            if at >= 0:
                return start + self._outside(gap, at + size)
        return self.places.position(own[0]) if opened else None

    def _span(self, turn: int, first: int) -> Span:
        """The answer from `first` to what closes it."""
        (before, behind), own = self.places.around(turn), self.places.turns.get(turn)
        last = max(first, self.places.position(own[1])) if own else first
        after = self.places.plain[last : self.places.position(behind)]
        following = self.controls.pattern.search(after)
        if following and self.places.ends_in_content(turn) and not after[: following.start()].strip():
            return Span(first, last + following.end(), True)
        tail, _ = self._tail(turn + 1)
        tail = (tail or "")[0 if own else first - self.places.position(before) :]
        added = after[: self._shared(after, tail)]
        ends = [match.end() for match in self.controls.pattern.finditer(added)]
        if ends:  # a tool call may have control tokens of its own behind its last string
            return Span(first, last + (ends[0] if self.places.ends_in_content(turn) else ends[-1]), True)
        if following and not after[len(added) : following.start()].strip():
            return Span(first, last + following.end(), True)
        return _left_open(self.places.plain, first, last + len(added))

    def _tail(self, turns: int, *, prompt: bool = False) -> tuple[str | None, int]:
        """What the first `turns` messages alone write behind their last mark, and that mark; None if refused."""
        rendered = self.show(self.marked[:turns], prompt=prompt)
        return (None, -1) if rendered is None else self.marker.tail(rendered)

    def _header(self, turn: int) -> str:
        """What the template writes to ask for an answer to the messages before this turn."""
        with_prompt, _ = self._tail(turn, prompt=True)
        without, _ = self._tail(turn)
        if with_prompt is None or without is None or not with_prompt.startswith(without):
            return ""
        return with_prompt[len(without) :]

    def _least(self, header: str) -> int:
        """How many characters of a header tell it: through its first control token, else all but white space."""
        first = self.controls.pattern.search(header)
        return max(1, first.end() if first else len(header.rstrip()))

    def _shared(self, one: str, other: str) -> int:
        """Length of what the two begin with alike, in whole added tokens."""
        return self._outside(one, shared_length(one, other))

    def _outside(self, text: str, position: int) -> int:
        """The position, or the start of the added token that it lies inside."""
        for match in self.controls.added.finditer(text):
            if match.start() < position < match.end():
                return match.start()
        return position


def _ends_in_control(text: str, controls: Controls) -> bool:
    return _last_control(text, controls) is not None


def _last_control(text: str, controls: Controls) -> int | None:
    """Where the control token that ends the text stops, white space behind it left out; None if none ends it."""
    ends = [match.end() for match in controls.pattern.finditer(text)]
    return ends[-1] if ends and not text[ends[-1] :].strip() else None


def _left_open(whole: str, first: int, last: int) -> Span:
    """An answer without an end mark: the token behind it closes it, and our EOS if only white space follows."""
    return Span(first, last if whole[last:].strip() else len(whole), False)
