"""JSON -> records: an object a line, or whole files of arrays and of objects over several lines."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, reason
from ddk_pipe.pipeline.manifest import Domain
from ddk_pipe.pipeline.text.sources.opening import text_lines, whole_text
from ddk_pipe.pipeline.text.sources.records import Document, listed, read_record

INK = re.compile(r"[^ \t\r\n\v\f]")


def read_json_lines(
    path: Path, domain: Domain, first: int = 0, last: int | None = None, *, before: int = 0
) -> Iterator[Document]:
    """One object a line; blank lines are passed over. A stretch of the file as `text_lines` has it."""
    hint = "one JSON object a line; mend or drop it"
    for number, line in text_lines(path, first, last, before=before):
        start = INK.search(line)
        if start is None:
            continue
        value, end = _value(line, start.start(), path, number, hint)
        extra = INK.search(line, end)
        if extra:
            column = extra.start() + 1
            raise DdkError(f"{path}:{number}: not JSON (Extra data, column {column})", hint=hint)
        yield read_record(value, domain, f"{path}:{number}")


def read_json_values(path: Path, domain: Domain) -> Iterator[Document]:
    """An array of objects, or objects one after the other over any lines. The whole file is held in memory."""
    hint = "an array of objects, or one JSON object a line; mend it there"
    text = whole_text(path)
    count = itertools.count(1)
    end = 0
    while True:
        start = INK.search(text, end)
        if start is None:
            return
        value, end = _value(text, start.start(), path, 1, hint)
        for record in value if isinstance(value, list) else [value]:
            yield read_record(record, domain, f"{path}: record {next(count)}")


def _value(text: str, start: int, path: Path, line: int, hint: str) -> tuple[Any, int]:
    """The JSON value that starts there, and where it ends; `line` is the number of the text's first line."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as problem:
        where = f"{path}:{line + problem.lineno - 1}"
        raise DdkError(f"{where}: not JSON ({problem.msg}, column {problem.colno})", hint=hint) from None
    except RecursionError:
        what = "JSON that nests too deep"
    except _Twice as problem:
        what = f"a JSON object with a key twice ({listed(problem.args)})"
    except ValueError as problem:  # a number of thousands of digits
        what = f"not JSON that can be read ({reason(problem)[:80]})"
    raise DdkError(f"{path}:{line + text.count(chr(10), 0, start)}: {what}", hint=hint)


class _Twice(Exception):
    """A key that an object has twice: JSON says nothing of which one counts."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
