"""Control tokens: which ids they are, where their strings stand in a text, and text that only mentions them.

A tokenizer reads "<|im_end|>" in a text as the control token, whoever wrote it. `Controls.letters` is the same
tokenizer with its control tokens spelt in private-use characters, in its list of added tokens and in its model alike
(ids, merges and rules are the same ones): text encoded by it becomes the ids of its letters, and a control token
stands only where `spell` put one.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError

OPEN, CLOSE, FIRST = "\U0010f8fe", "\U0010f8ff", 0x10F000  # around and inside a private spelling


class Controls:
    """The control tokens of one tokenizer: its special tokens, and those of `written` that it has as added tokens."""

    def __init__(self, tokenizer: Any, written: Iterable[str] = ()) -> None:
        added = {
            token.content: (index, token.special) for index, token in tokenizer.added_tokens_decoder.items()
        }
        wanted = set(written)
        self.ids = {
            text: index for text, (index, special) in added.items() if text and (special or text in wanted)
        }
        self._tokenizer = tokenizer
        self._added = list(added)
        self._unknown = tokenizer.unk_token_id
        size = max(tokenizer.get_vocab().values(), default=0) + 1
        self._is_control = np.zeros(size, bool)
        self._is_control[list(self.ids.values())] = True
        if self._unknown is not None:  # what letters without a token of their own become: no mention
            self._is_control[self._unknown] = False

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the strings of control tokens, the longest first, as tokenizers do."""
        return re.compile(any_of(self.ids))

    @functools.cached_property
    def added(self) -> re.Pattern[str]:
        """Matches the strings of all added tokens: a position inside one lies inside a token."""
        return re.compile(any_of(self._added))

    def found(self, ids: NDArray[np.int64]) -> list[int]:
        """The control tokens among `ids` in order, the one for unknown letters left out."""
        return [int(index) for index in ids[self._is_control[ids]]]

    def may_mention(self, ids: NDArray[np.int64], text: str, expected: list[int]) -> bool:
        """Whether `text`, encoded to `ids`, may have been read as more control tokens than those `expected`."""
        if self.found(ids) != expected:
            return True
        unknown = self._unknown is not None and self._unknown in ids
        return unknown and next(name for name, index in self.ids.items() if index == self._unknown) in text

    def spell(self, control: str) -> str:
        """The private spelling that `letters` reads as this control token."""
        return f"{OPEN}{chr(FIRST + self._places[control])}{CLOSE}"

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {control: place for place, control in enumerate(sorted(self.ids))}

    @functools.cached_property
    def letters(self) -> Any:
        """The tokenizer (of the tokenizers library) that reads control tokens only where they are spelt privately.

        Raises DdkError if this tokenizer cannot be told so.
        """
        from tokenizers import Tokenizer

        values = json.loads(self._tokenizer.backend_tokenizer.to_str())
        names = {control: self.spell(control) for control in self.ids}
        values["truncation"] = values["padding"] = None
        for token in values["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        rename(values["model"], names)
        letters = Tokenizer.from_str(json.dumps(values))
        if any(letters.token_to_id(names[control]) != index for control, index in self.ids.items()):
            raise DdkError(
                "tokenizer: its control tokens cannot be told from text that mentions them",
                hint="leave such documents out, or report the tokenizer",
            )
        return letters


def rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give pieces of a tokenizer's model (its JSON) other names in place; merges that spell them out are dropped."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    else:  # Unigram: [piece, score]
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]


def shared_length(one: str, other: str) -> int:
    """How many characters the two begin with alike."""
    different = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def any_of(strings: Iterable[str]) -> str:
    """A regular expression for any of the strings, the longest that fits; beginnings that they share are tried once."""
    by_first: dict[str, list[str]] = {}
    for string in sorted(filter(None, strings)):
        by_first.setdefault(string[0], []).append(string)
    return "|".join(_branch(group) for group in by_first.values()) or r"(?!)"


def _branch(group: list[str]) -> str:
    length = shared_length(group[0], group[-1])  # they are sorted
    shared, rests = group[0][:length], [string[length:] for string in group]
    if len(rests) == 1:
        return re.escape(shared)
    longer = any_of(rests)
    return f"{re.escape(shared)}(?:{longer}){'?' if '' in rests else ''}"
