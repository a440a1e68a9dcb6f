"""Files -> bytes and lines of text, unpacked on the way: a compression is told by its first bytes, never by the name."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddk_pipe.pipeline.errors import DdkError, reason

HEAD = 1 << 12  # bytes that tell what a file is
BUFFER = 1 << 20
BOM = b"\xef\xbb\xbf"  # of UTF-8: no part of the text
COMPRESSIONS = (  # name of pyarrow (xz: of the standard library), first bytes
    ("gzip", re.compile(rb"\x1f\x8b\x08")),
    ("zstd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
    ("bz2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")),
    ("lz4", re.compile(rb"\x04\x22\x4d\x18")),
    ("xz", re.compile(rb"\xfd7zXZ\x00")),
)


def compression_of(head: bytes) -> str | None:
    """The compression that a file with these first bytes is in, or None."""
    return next((name for name, first in COMPRESSIONS if first.match(head)), None)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Inside, what a file that nobody may read raises, a damaged one, or one cut short, becomes a DdkError."""
    try:
        yield
    except PermissionError:
        raise DdkError(f"{path}: no permission to read it", hint="change its mode or owner") from None
    except _unreadable() as problem:
        raise DdkError(
            f"{path}: cannot be read ({reason(problem)})", hint="is it complete, and what it says it is?"
        ) from None


def _unreadable() -> tuple[type[Exception], ...]:
    import lzma

    import pyarrow as pa

    return (OSError, EOFError, lzma.LZMAError, pa.ArrowException)


def compression_of_file(path: Path) -> str | None:
    """The compression that a file is in, or None."""
    with open(path, "rb") as file:
        return compression_of(file.read(HEAD))


def open_unpacked(path: Path) -> io.BufferedIOBase:
    """The file's bytes as a stream, unpacked."""
    import pyarrow as pa

    compression = compression_of_file(path)
    if compression == "xz":
        import lzma

        return lzma.open(path)
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), BUFFER)


def text_lines(
    path: Path, first: int = 0, last: int | None = None, *, before: int = 0
) -> Iterator[tuple[int, str]]:
    """Every line with its number from 1 and its line end. Raises DdkError for what is not UTF-8.

    Of a file that is not packed also from the line that begins at byte `first`, the one after `before` others, to the
    one that ends at byte `last`.
    """
    with open_unpacked(path) if last is None else open(path, "rb") as stream:
        if first:
            stream.seek(first)
        at = first
        for number, line in enumerate(stream, before + 1):
            yield number, decode(line.removeprefix(BOM), path, number)
            at += len(line)
            if at == last:
                return


def whole_text(path: Path) -> str:
    """All of a file's text. Raises DdkError for what is not UTF-8, or not text at all."""
    with open_unpacked(path) as stream:
        return decode(stream.read().removeprefix(BOM), path, 1)


def decode(content: bytes, path: Path, line: int) -> str:
    """UTF-8 as text; `line` is the number of its first line. Raises DdkError naming the line of what is wrong."""
    nul = content.find(0)
    if nul >= 0:
        at = line + content.count(b"\n", 0, nul)
        raise DdkError(
            f"{path}:{at}: a NUL byte, so not text", hint="save the file as UTF-8, or leave it out"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        at = line + content.count(b"\n", 0, problem.start)
        byte = problem.start - (content.rfind(b"\n", 0, problem.start) + 1)
        raise DdkError(f"{path}:{at}: not UTF-8 (byte {byte})", hint="save the file as UTF-8") from None
