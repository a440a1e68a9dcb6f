"""A cache made by an enemy, every digest and seal in order: it runs no code, reads nothing outside, and stays small.

Each attack is read and verified in a process of its own that may take 1 GB more memory than it has when idle.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zstandard
from caches import fill, group_path, resealed
from faults import (
    FIRST,
    GIGABYTE,
    SECOND,
    giant,
    reading,
    rechunk,
    reseal_checks,
    reseal_record,
    run_measured,
    small_spec,
    unpacking,
    verifying,
)

from ddk_pipe.pipeline.cache import verify
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import LocalFolder

HARMLESS = (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev/null", "/dev/urandom", "/etc/localtime")
SOURCES = str(Path(__file__).parents[2])


class Enemy:
    """A cache to spoil, a file that only code in it would make, and a folder outside that nobody may touch."""

    def __init__(self, folder: LocalFolder) -> None:
        self.folder, self.path = folder, folder.path
        self.group = group_path(folder, FIRST)
        self.canary = folder.path.parent / "canary"
        self.outside = folder.path.parent / "outside"
        shutil.copytree(self.group.parent, self.outside / "train")
        (self.outside / "secret").write_bytes((self.path / "code" / "ranks.npy").read_bytes())

    def bomb(self) -> bytes:
        """A pickle that makes the canary."""
        command = f"touch {self.canary}"

        class Payload:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, (command,)

        return pickle.dumps(Payload())

    def edit(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change a zarr.json of the first shard; the record vouches for it."""
        path = self.group / name
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        reseal_record(self.folder, FIRST)

    def edit_cache(self, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.path / "cache.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_bytes(resealed(values))

    def attack(self, *, read_anyway: bool = False, verified_anyway: bool = False) -> str:
        """The error of reading, after checking all that may not happen; without a word if reading may succeed."""
        before = tree(self.outside)
        read, memory, opened = run_measured(reading, str(self.path))
        self.check(memory, opened)
        verified, memory, opened = run_measured(verifying, str(self.path))
        self.check(memory, opened)
        assert tree(self.outside) == before, "something outside of the cache was changed"
        assert read.startswith("returned" if read_anyway else "DdkError: "), read
        assert verified.startswith(("DdkError: ", "returned unsound")) or verified_anyway, verified
        assert "\n" not in read
        return read

    def check(self, memory: int, opened: list[str]) -> None:
        assert not self.canary.exists(), "code of the cache was run"
        assert memory < GIGABYTE
        own = (os.path.realpath(self.path), SOURCES, *HARMLESS)
        paths = [os.path.realpath(path) for path in opened if path.startswith("/")]
        assert paths and not [path for path in paths if not path.startswith(own)], paths


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def enemy(folder: LocalFolder) -> Enemy:
    return Enemy(folder)


def pickled(array: dict[str, Any]) -> None:
    array["codecs"][0]["configuration"]["codecs"][1] = {"name": "numcodecs.pickle", "configuration": {}}


def test_a_pickle_codec_in_the_metadata(enemy: Enemy) -> None:
    rechunk(enemy.folder, FIRST, "tokens", lambda bodies: [enemy.bomb() for _ in bodies])
    reseal_checks(enemy.folder, FIRST)
    enemy.edit("tokens/zarr.json", pickled)
    assert "tokens/zarr.json: not the metadata" in enemy.attack()


def test_a_python_class_as_codec(enemy: Enemy) -> None:
    evil = {"name": "os.system", "configuration": {"command": f"touch {enemy.canary}"}}
    enemy.edit("tokens/zarr.json", lambda array: array["codecs"].append(evil))
    assert "codecs not as this program writes it" in enemy.attack()


def test_an_object_dtype_in_the_metadata(enemy: Enemy) -> None:
    rechunk(enemy.folder, FIRST, "tokens", lambda bodies: [enemy.bomb() for _ in bodies])
    reseal_checks(enemy.folder, FIRST)
    enemy.edit("tokens/zarr.json", lambda array: array.update(data_type="object"))
    assert "data_type not as this program writes it" in enemy.attack()


def test_an_old_zarr_array_of_objects(enemy: Enemy) -> None:
    """Zarr v2 metadata beside the new: plain zarr could be led to it, we never look there."""
    about = {"zarr_format": 2, "shape": [2], "chunks": [2], "dtype": "|O", "order": "C", "fill_value": None}
    filters = {"filters": [{"id": "pickle"}], "compressor": None}
    (enemy.group / "tokens" / ".zarray").write_text(json.dumps({**about, **filters}))
    (enemy.group / "tokens" / "0").write_bytes(enemy.bomb())
    (enemy.group / "tokens" / "zarr.json").unlink()
    reseal_record(enemy.folder, FIRST)
    assert "lacks 'tokens/zarr.json'" in enemy.attack()


def test_a_rank_table_of_pickled_objects(enemy: Enemy) -> None:
    header = io.BytesIO()
    about = {"descr": "|O", "fortran_order": False, "shape": (90,)}
    np.lib.format.write_array_header_1_0(header, about)  # type: ignore[no-untyped-call]
    (enemy.path / "code" / "ranks.npy").write_bytes(header.getvalue() + enemy.bomb())
    assert "ranks.npy: not the table" in enemy.attack()


def test_a_rank_table_whose_header_is_code(enemy: Enemy) -> None:
    text = f"{{'descr': __import__('os').system('touch {enemy.canary}'), 'shape': (90,)}}\n".encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    (enemy.path / "code" / "ranks.npy").write_bytes(content.ljust(488, b"\0"))
    assert "ranks.npy: not the table" in enemy.attack()


def test_a_rank_table_that_declares_terabytes(enemy: Enemy) -> None:
    header = io.BytesIO()
    about = {"descr": "<i4", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(header, about)  # type: ignore[no-untyped-call]
    (enemy.path / "code" / "ranks.npy").write_bytes(header.getvalue())
    assert "ranks.npy: not the table" in enemy.attack()


@pytest.mark.parametrize("name", ["../../../outside/secret", "/etc/passwd", "t0/../../../../outside/secret"])
def test_a_record_that_names_files_outside(enemy: Enemy, name: str) -> None:
    values = json.loads((enemy.path / FIRST.record).read_text())
    reseal_record(enemy.folder, FIRST, files={**values["files"], name: {"bytes": 488, "blake2b": "00" * 16}})
    assert "commit record that leads outside" in enemy.attack()


@pytest.mark.parametrize(
    "group", ["../../../outside/train", "00000.01234567.zarr/../../../outside/train", "/", "..", "", "\0"]
)
def test_a_record_whose_group_leads_outside(enemy: Enemy, group: str) -> None:
    path = enemy.path / FIRST.record
    path.write_bytes(resealed({**json.loads(path.read_text()), "group": group}))
    assert "names the group of another shard" in enemy.attack()


def test_links_out_of_the_cache_in_every_place(enemy: Enemy) -> None:
    """A file, an array, a temperature, a group, a split, a domain, the rank table, the record, cache.json."""
    places = ["tokens/c/0/0", "tokens/zarr.json", "tokens", "t0", ""]
    inside = [enemy.group / place for place in places]
    whole = [
        enemy.path / name for name in ("code/train", "code", "code/ranks.npy", FIRST.record, "cache.json")
    ]
    for number, path in enumerate([*inside, *whole]):
        aside = enemy.outside / str(number)
        path.rename(aside)
        path.symlink_to(aside)
        assert "leads outside of it" in enemy.attack()
        restore(enemy)
    assert enemy.attack(read_anyway=True, verified_anyway=True)


@pytest.mark.parametrize("place", ["code/train", "code", "cache.json"])
def test_links_out_of_the_cache_when_it_is_written(enemy: Enemy, place: str) -> None:
    """A cache from a stranger that is continued: nothing is written, or removed, where a link leads to."""
    target = enemy.outside / "moved"
    (enemy.path / place).rename(target)
    (enemy.path / place).symlink_to(target)
    (enemy.path / SECOND.record).unlink()
    before = tree(enemy.outside)
    with pytest.raises(DdkError, match="leads outside of it"):
        fill(enemy.folder, small_spec())
        verify(enemy.folder, repair=True)
    assert tree(enemy.outside) == before


def restore(enemy: Enemy) -> None:
    """Undo what a repair removed: the cache as it was before the attack."""
    undisturbed = enemy.path.parent.parent / "undisturbed"
    shutil.rmtree(enemy.path)
    shutil.copytree(undisturbed, enemy.path)


@pytest.mark.parametrize("width", [0, -1, 1 << 40, 1 << 24, 10**40, 2.5, True, None, "7"])
def test_declared_shapes(enemy: Enemy, width: Any) -> None:
    def change(array: dict[str, Any]) -> None:
        array["shape"][1] = width
        array["chunk_grid"]["configuration"]["chunk_shape"][1] = width
        array["codecs"][0]["configuration"]["chunk_shape"][1] = width

    enemy.edit("t0/octaves/zarr.json", change)
    assert "t0/octaves" in enemy.attack()


def test_a_chunk_that_claims_gigabytes(enemy: Enemy) -> None:
    def claim(bodies: list[bytes]) -> list[bytes]:
        return [body[:4] + struct.pack("<II", 0x7FFFFFF0, 0x7FFFFFF0) + body[12:] for body in bodies]

    rechunk(enemy.folder, FIRST, "tokens", claim)
    reseal_checks(enemy.folder, FIRST)
    assert "unpacks to 2147483632 bytes, expected 24" in enemy.attack()


def test_a_chunk_that_unpacks_to_more_than_it_says(enemy: Enemy) -> None:
    """An honest blosc header, and inside it a zstd stream of a gigabyte."""
    stream = zstandard.ZstdCompressor(level=1).compress(bytes(GIGABYTE))

    def explode(bodies: list[bytes]) -> list[bytes]:
        width = struct.unpack_from("<I", bodies[0], 4)[0]
        frame = struct.pack("<II", 20, len(stream)) + stream  # where the one block starts, its bytes
        head = struct.pack("<BBBBIII", 2, 1, 0x91, 2, width, width, 16 + len(frame))
        return [head + frame for _ in bodies]

    rechunk(enemy.folder, FIRST, "tokens", explode)
    reseal_checks(enemy.folder, FIRST)
    assert "tokens" in enemy.attack()


def test_an_array_that_really_unpacks_to_a_gigabyte(enemy: Enemy) -> None:
    """Zeros as zarr itself writes them: some kB on disk, more than a window of this cache can justify."""
    shutil.rmtree(enemy.group / "t0" / "octaves")
    group: Any = zarr.open_group(enemy.group, mode="r+")
    codecs = [zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=1)]
    shape, chunk = (2, 1 << 28), (1, 1 << 28)
    array = group.create_array(
        "t0/octaves",
        shape=shape,
        dtype="u1",
        chunks=chunk,
        shards=shape,
        compressors=[*codecs, zarr.codecs.Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[...] = np.zeros(shape, "u1")
    reseal_checks(enemy.folder, FIRST)
    assert "t0/octaves/zarr.json: 268435456 values a window, expected 1 to 1080" in enemy.attack()


@pytest.mark.slow
def test_random_changes_inside_compressed_chunks(enemy: Enemy, tmp_path: Path) -> None:
    """What blosc and zstd make of 20,000 broken frames with a right checksum: a refusal or 4096 values, no crash."""
    import numcodecs.blosc

    rng = np.random.default_rng(0)
    values = (rng.integers(0, 50, 4096) * (rng.random(4096) < 0.3)).astype("<u2")
    body = numcodecs.blosc.compress(values.tobytes(), b"zstd", 1, 1, 0, 2)
    (tmp_path / "chunk").write_bytes(body)
    outcome, memory, _ = run_measured(unpacking, str(tmp_path / "chunk"), 20_000)
    assert outcome.startswith("returned refused") and int(outcome.split()[-1]) > 1000
    assert memory < GIGABYTE


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["pps", "topk"])
def test_windows_as_large_as_can_be(tmp_path: Path, scheme: str) -> None:
    """A million positions of eight entries, all sizes in order: that is read, within 1 GB."""
    giant(tmp_path / "cache", 1 << 20, dict.fromkeys(range(1 << 20), 8), scheme=scheme)
    outcome, memory, _ = run_measured(reading, str(tmp_path / "cache"))
    assert outcome == "returned torch.Size([1048576, 8])"
    assert 200e6 < memory < GIGABYTE


def test_one_long_row_that_would_widen_a_million_others(tmp_path: Path) -> None:
    """65 kB of entries that would be padded to half a terabyte."""
    giant(tmp_path / "cache", 1 << 20, {0: 65535})
    outcome, memory, _ = run_measured(reading, str(tmp_path / "cache"))
    assert outcome.startswith("DdkError: ") and "1,048,576 positions of up to 65,536 entries" in outcome
    assert memory < GIGABYTE


def test_windows_larger_than_can_be(enemy: Enemy) -> None:
    """Sixteen million positions compress to nothing and would take gigabytes to decode."""
    spec = small_spec(seq_len=1 << 24)
    (enemy.path / "cache.json").write_bytes(spec.to_json())
    assert "cache.json: damaged or edited" in enemy.attack()


@pytest.mark.parametrize("name", ["zarr.json", "tokens/zarr.json"])
@pytest.mark.parametrize("content", [b"[" * 60_000, b'{"a":' * 12_000, b"9" * 60_000, b"\xff" * 9, b"null"])
def test_metadata_that_is_deep_huge_or_nothing(enemy: Enemy, name: str, content: bytes) -> None:
    (enemy.group / name).write_bytes(content)
    reseal_record(enemy.folder, FIRST)
    if name == "zarr.json":  # for plain zarr; ours reads no more of it than its digest
        enemy.attack(read_anyway=True, verified_anyway=True)
    else:
        assert "tokens/zarr.json: not the metadata" in enemy.attack()


def test_metadata_of_megabytes(enemy: Enemy) -> None:
    enemy.edit("tokens/zarr.json", lambda array: array.update(attributes={"a": "x" * (1 << 20)}))
    assert "at most 65,536 make sense" in enemy.attack()


@pytest.mark.parametrize("deep", ["[" * 7_000_000, '{"a":' * 3_000_000])
@pytest.mark.parametrize("name", ["cache.json", FIRST.record])
def test_json_nested_a_million_deep(enemy: Enemy, name: str, deep: str) -> None:
    (enemy.path / name).write_text(deep)
    assert name in enemy.attack()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cache.json", FIRST.record])
def test_json_that_grows_when_it_is_parsed(enemy: Enemy, name: str) -> None:
    """15 MB of the smallest values there are, in a file that is else in order."""
    path = enemy.path / name
    field = "about" if name == "cache.json" else "teacher"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: {"x": [[]] * 3_700_000}}))
    read, memory, _ = run_measured(reading, str(enemy.path))
    assert read.startswith("DdkError: ") and name in read
    assert 200e6 < memory < GIGABYTE


@pytest.mark.parametrize("number", ["9" * 5000, "1e999", "-1e999", "NaN", "1e308", "18446744073709551616"])
@pytest.mark.parametrize("field", ["positions", "label_nats", "number", "windows"])
def test_huge_numbers_in_a_record(enemy: Enemy, field: str, number: str) -> None:
    path = enemy.path / FIRST.record
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, field: "HERE"}).replace('"HERE"', number))
    assert "damaged commit record" in enemy.attack()


@pytest.mark.parametrize("windows", [10**9, 2**62, 10**4000, 2**36])
def test_a_billion_shards(enemy: Enemy, windows: int) -> None:
    text = (enemy.path / "cache.json").read_text().replace('"windows": 8', f'"windows": {windows}')
    values = json.loads(text.replace('"shard_windows": 2', '"shard_windows": 1'))
    (enemy.path / "cache.json").write_bytes(resealed(values))
    assert "cache.json: damaged or edited" in enemy.attack()


@pytest.mark.slow
def test_as_many_shards_as_there_can_be(enemy: Enemy) -> None:
    """A million shards, of which five are there: the others are missing, in bounded memory."""
    enemy.edit_cache(lambda values: values["domains"]["code"]["train"].update(windows=2 * ((1 << 20) - 1)))
    enemy.attack(read_anyway=True)


def test_a_record_for_windows_of_another_shard(enemy: Enemy) -> None:
    """Everything vouched for again, but the window numbers inside the data."""
    shutil.rmtree(enemy.group)
    shutil.copytree(group_path(enemy.folder, SECOND), enemy.group)
    reseal_checks(enemy.folder, FIRST)
    assert "window 0 holds another window" in enemy.attack()


def test_a_window_that_says_nothing_true(enemy: Enemy) -> None:
    """Bytes of a chunk changed, checksums and record made to fit: what cannot be decoded is refused."""
    rechunk(enemy.folder, FIRST, "t0/heads", lambda bodies: [stored(body, b"\xff") for body in bodies])
    reseal_checks(enemy.folder, FIRST)
    assert "a plane is too short" in enemy.attack()


def stored(body: bytes, value: bytes) -> bytes:
    """A blosc frame of the same size whose values are one byte over and over."""
    width = struct.unpack_from("<I", body, 4)[0]
    header = struct.pack("<BBBBIII", 2, 1, 0x93, 2, width, width, 16 + width)
    return header + value * int(width)


def test_pipes_and_devices_in_place_of_files(enemy: Enemy) -> None:
    path = enemy.group / "tokens" / "c" / "0" / "0"
    path.unlink()
    os.mkfifo(path)
    assert "missing" in enemy.attack()
    restore(enemy)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "leads outside" in enemy.attack()
