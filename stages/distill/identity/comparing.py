"""What differs between the run that a folder holds and the one that is asked for, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError

NAMED = 3  # differences
SHOWN = 32  # characters of a value
HEX = 8  # of a digest
KINDS = {  # in this order: the first that differs is named
    "settings": "holds a run with other settings",
    "domains": "holds a run with its domains in another order",
    "cache": "holds a run from another cache",
    "teacher": "holds a run beside another teacher",
    "teacher_dtype": "holds a run beside a teacher of another dtype",
    "tokenizer": "holds a run with another tokenizer",
    "tokens": "holds a run on other tokens",
    "student": "holds a run from other first weights",
}
WORDS = {
    "cache.teacher.weights_digest": "teacher weights",
    "cache.teacher.dtype": "the teacher's dtype",
    "cache.teacher.logits": "the teacher's logits",
    "cache.tokenizer_digest": "tokenizer",
    "teacher": "teacher weights",
    "teacher_dtype": "teacher.dtype",
    "student": "what the student starts from",
}
ABSENT = object()
WITHOUT = {"settings.attention": "window", "cache.attention": "window"}  # what none of it says


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted name: (value before, value now)} of what is not equal."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*before, *(name for name in now if name not in before)]:
        absent = WITHOUT.get(f"{prefix}{name}", ABSENT)
        one, other = before.get(name, absent), now.get(name, absent)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differences(one, other, f"{prefix}{name}.")
        elif one != other:
            found[f"{prefix}{name}"] = one, other
    return found


def other_run(run: Path, found: dict[str, tuple[Any, Any]]) -> DdkError:
    """The refusal to go on with, or take for its own, the run of a folder; `found` is not empty.

    Names begin with the kind of what differs (KINDS).
    """
    kinds = {_kind(name) for name in found}
    kind = next((kind for kind in KINDS if kind in kinds), min(kinds))
    mine = [(name, *values) for name, values in found.items() if _kind(name) == kind]
    told = ", ".join(f"{_word(name)} {_short(one)}, now {_short(other)}" for name, one, other in mine[:NAMED])
    more = f", and {len(mine) - NAMED} more" if len(mine) > NAMED else ""
    return DdkError(
        f"{run}: {KINDS.get(kind, 'holds a run of another kind')} ({told}{more})",
        hint="set another distill.name, or delete that folder",
    )


def _kind(name: str) -> str:
    return name.partition(".")[0]


def _word(name: str) -> str:
    return WORDS.get(name) or name.removeprefix("settings.").removeprefix("cache.")


def _short(value: Any) -> str:
    if value is ABSENT or value is None:
        return "none"
    text = str(value)
    if len(text) >= 2 * HEX and all(letter in "0123456789abcdef" for letter in text):
        return text[:HEX]
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
