"""Last hidden states of windows whose documents do not see each other.

transformers lets several documents stand in one row: from position ids that start anew with each it makes a mask that
keeps them apart, for sdpa and eager attention alike. It finds the documents by looking at those ids, and so has the host
wait for the device in every forward pass; here it is told. A model that has no such mask, because it is recurrent or
older than that, gets its documents in rows of their own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ddk_pipe.pipeline.models.starts import Starts, documents_from, positions_from, spans_from

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Span = tuple[int, int, int]  # a window, its document's first token and end
LOOKS = "find_packed_sequence_indices"  # how transformers finds them


@dataclass(frozen=True)
class Documents:
    """Where documents lie in some windows.

    positions  int64 [windows, seq_len], the place of each token in its document
    numbers    int64 [windows, seq_len], the number of its document in its window
    spans      of each, on the host
    """

    positions: Tensor
    numbers: Tensor
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, starts: Starts | None) -> Documents | None:
        """Of starts bool [windows, seq_len]; None where no window holds more than one."""
        import torch

        if starts is None or not starts[:, 1:].any():
            return None
        spans = [(row, span.start, span.stop) for row, each in enumerate(starts) for span in spans_from(each)]
        return cls(
            torch.from_numpy(positions_from(starts)), torch.from_numpy(documents_from(starts)), tuple(spans)
        )

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Documents:
        """The same on another device."""
        positions, numbers = (
            each.to(device, non_blocking=non_blocking) for each in (self.positions, self.numbers)
        )
        return replace(self, positions=positions, numbers=numbers)

    def pin_memory(self) -> Documents:
        """The same in memory that a GPU reads by itself."""
        return replace(self, positions=self.positions.pin_memory(), numbers=self.numbers.pin_memory())


def hidden_states(
    decoder: Any, tokens: Tensor, documents: Documents | None = None, *, apart: bool = False
) -> Tensor:
    """The decoder's last hidden states [windows, seq_len, d] of tokens int64 [windows, seq_len] (of a whole model: its
    logits); each document sees itself alone.

    `apart`: in rows of their own, for a decoder that does not keep documents of one row apart. It is then called as
    often as it takes, with at most as many tokens as there are, but for the filling of shorter rows.
    """
    if documents is None:
        with _told(None):
            return _states(decoder(input_ids=tokens, use_cache=False))
    if apart:
        return _in_rows_of_their_own(decoder, tokens, documents)
    with _told(documents.numbers):
        return _states(decoder(input_ids=tokens, position_ids=documents.positions, use_cache=False))


def takes_positions(decoder: Any) -> bool:
    """True if the decoder's forward has an argument for position ids."""
    return "position_ids" in inspect.signature(type(decoder).forward).parameters


def _states(out: Any) -> Tensor:
    states: Tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
    return states


def _in_rows_of_their_own(decoder: Any, tokens: Tensor, documents: Documents) -> Tensor:
    """Rows are filled up behind their document, where a causal model's document sees nothing of it."""
    import torch

    found: dict[Span, Tensor] = {}
    for together in _of_like_length(documents.spans, tokens.numel()):
        longest = max(end - start for _, start, end in together)
        rows = [tokens[row, start:end] for row, start, end in together]
        filled = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
        with _told(None):
            states = _states(decoder(input_ids=filled, use_cache=False))
        found |= {span: each[: span[2] - span[1]] for span, each in zip(together, states, strict=True)}
    whole = torch.cat([found[span] for span in documents.spans])
    return whole.view(*tokens.shape, -1)


def _of_like_length(spans: tuple[Span, ...], most: int) -> Iterator[list[Span]]:
    """The spans in groups that come to at most `most` tokens when each is as long as its group's longest."""
    rest = sorted(spans, key=lambda span: span[1] - span[2])
    while rest:
        count = max(1, most // (rest[0][2] - rest[0][1]))
        yield rest[:count]
        rest = rest[count:]


_known = threading.local()  # the teacher may be asked in another thread meanwhile


@contextmanager
def _told(numbers: Tensor | None) -> Iterator[None]:
    """Inside, and in this thread, transformers is told which document each token belongs to; None: one to a row."""
    _answer_for_transformers()
    before = getattr(_known, "answer", ())
    _known.answer = (numbers,)
    try:
        yield
    finally:
        _known.answer = before


def _answer_for_transformers() -> None:
    """Once: what is known is not looked for. Where another version looks in another way, it looks."""
    from transformers import masking_utils

    looks = getattr(masking_utils, LOOKS, None)
    if looks is None or getattr(looks, "knows", False):
        return

    def answer(position_ids: Tensor) -> Tensor | None:
        known: tuple[Tensor | None, ...] = getattr(_known, "answer", ())
        return known[0] if known else looks(position_ids)

    answer.knows = True  # type: ignore[attr-defined]
    setattr(masking_utils, LOOKS, answer)
