"""What a file holds: by its first bytes, then by its name without regard to case, then by its first line."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text.sources.opening import BOM, HEAD, compression_of, open_unpacked, whole_text

PARQUET, CSV, TSV = "parquet", "csv", "tsv"
JSON_LINES = "json lines"  # one JSON object a line
JSON_VALUES = "json"  # an array of objects, or objects over several lines
TEXT = "text"  # the whole file is one document

NAMED = {
    ".jsonl": JSON_LINES,
    ".jsonlines": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON_VALUES,
    ".parquet": PARQUET,
    ".pq": PARQUET,
    ".csv": CSV,
    ".tsv": TSV,
}
PACKED = re.compile(r"\.(?:gz|gzip|zst|zstd|bz2|xz|lz4)$")
PIECE = re.compile(r"(?:[-_.](?:part[-_]?)?\d+(?:[-_]of[-_]\d+)?|\.(?:bak|old|orig|tmp|txt)|~)$")
HEADER = re.compile(r'"?[\w .-]{1,64}"?(?:[,;\t|]"?[\w .-]{1,64}"?)+')

REFUSED = (  # what no reader takes, and its first bytes; the words end in what to do
    ("a Git LFS pointer, not the file itself", rb"version https://git-lfs", "fetch it with `git lfs pull`"),
    ("an Arrow IPC (Feather) file", rb"ARROW1|FEA1\x00|\xff\xff\xff\xff[^\xff]", "write it as Parquet"),
    ("encrypted Parquet", rb"PARE", "write it without encryption"),
    ("a ZIP archive (or an office document)", rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "unpack it"),
    ("a tar archive", rb"(?s).{257}ustar", "unpack it"),
    ("a 7z archive", rb"7z\xbc\xaf\x27\x1c", "unpack it"),
    ("a RAR archive", rb"Rar!\x1a\x07", "unpack it"),
    ("a PDF", rb"%PDF-", "extract its text"),
    ("an image", rb"\x89PNG|\xff\xd8\xff|GIF8[79]a[^\n]*\x00|(?s:RIFF.{4}WEBP)", "leave it out"),
    ("safetensors", rb"(?s).{6}\x00\x00\{", "leave it out"),
    ("a GGUF model", rb"GGUF[\x00-\x09]\x00", "leave it out"),
    ("a NumPy array", rb"\x93NUMPY", "leave it out"),
    ("an HDF5 file", rb"\x89HDF", "write it as Parquet"),
    ("an Avro file", rb"Obj\x01", "write it as Parquet"),
    ("an SQLite database", rb"SQLite format 3\x00", "write it as Parquet"),
    ("a Python pickle", rb"\x80[\x02-\x05][\x00-\x7f\x80-\xff]", "write it as Parquet"),
    ("UTF-32 text", rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "save the file as UTF-8"),
    ("UTF-16 text", rb"\xff\xfe|\xfe\xff", "save the file as UTF-8"),
)
_REFUSED = [(name, re.compile(first), hint) for name, first, hint in REFUSED]


def kind_by_name(path: Path) -> str:
    """What the name alone says: packing, numbers of pieces and marks of copies aside, its last suffix."""
    name = path.name.lower()
    while True:
        shorter = PACKED.sub("", PIECE.sub("", name))
        if shorter == name or Path(name).suffix in NAMED:
            return NAMED.get(Path(name).suffix, TEXT)
        name = shorter


def recognise(path: Path, *, text_field: str) -> str:
    """The kind of the file. Raises DdkError, naming what it is, for one that holds neither text nor records."""
    with open_unpacked(path) as stream:
        head = stream.read(HEAD)
    named = kind_by_name(path)
    if head.startswith(b"PAR1"):
        return _seekable_parquet(path)
    packed_again = compression_of(head)
    if packed_again:
        raise DdkError(f"{path}: {packed_again} inside another compression", hint="unpack it once")
    for name, first, hint in _REFUSED:
        if first.match(head):
            raise DdkError(f"{path}: {name}, neither text nor records", hint=hint)
    if named == PARQUET:
        raise DdkError(f"{path}: not Parquet (it does not begin with PAR1)", hint="write it again")
    ink = head.removeprefix(BOM).lstrip()
    if ink and not ink.startswith((b"{", b"[")):
        if named == TEXT:
            _refuse_unnamed_table(path, head, text_field)
        return JSON_LINES if named == JSON_VALUES else named
    return _json_or(named, path)


def _seekable_parquet(path: Path) -> str:
    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            raise DdkError(f"{path}: Parquet inside another compression", hint="unpack it")
    return PARQUET


def _json_or(named: str, path: Path) -> str:
    """The kind of a file that begins with a brace or a bracket, or with many blank lines."""
    with open_unpacked(path) as stream:
        first = next((line for line in stream if line.removeprefix(BOM).strip()), b"").removeprefix(BOM)
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        if named == JSON_LINES and first.strip() not in (b"{", b"[", b"[{"):
            return JSON_LINES  # whose first line is broken: to be said by its reader
        return JSON_VALUES if named in (JSON_LINES, JSON_VALUES) else _values_or(named, path)
    if isinstance(value, dict):
        return JSON_LINES
    if isinstance(value, list) and (named == JSON_VALUES or (value and isinstance(value[0], dict))):
        return JSON_VALUES
    return JSON_LINES if named == JSON_VALUES else named


def _values_or(named: str, path: Path) -> str:
    """JSON if objects, or an array of them, stand over several lines at the beginning of the file; else as named."""
    try:
        value, _ = json.JSONDecoder().raw_decode(whole_text(path).lstrip())
    except (ValueError, RecursionError):
        return named
    records = value if isinstance(value, list) else [value]
    return JSON_VALUES if records and isinstance(records[0], dict) else named


def _refuse_unnamed_table(path: Path, head: bytes, text_field: str) -> None:
    first = head.removeprefix(BOM).lstrip().split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    columns = [name.strip('"') for name in re.split(r"[,;\t|]", first)]
    if HEADER.fullmatch(first) and text_field in columns:
        raise DdkError(
            f"{path}: begins like a table with the columns {', '.join(columns)}, and is not called one",
            hint="end its name in .csv or .tsv, or take that line away",
        )
