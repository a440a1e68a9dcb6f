from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from caches import (
    FIRST,
    SECOND,
    SIZES,
    group_path,
    make_plan,
    make_spec,
    numbers,
    open_writer,
    read_all,
    reseal,
    verify_all,
    window,
    write_shard,
)
from s3 import together

from ddk_pipe.pipeline.cache import CacheReader, all_shards, group_of
from ddk_pipe.pipeline.cache import reader as cache_module
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.record import read_record
from ddk_pipe.pipeline.cache.soundness import check_shard
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, LocalFolder, ObjectFolder, open_folder
from ddk_pipe.pipeline.targets import NO_LABEL, Context, label_codes
from ddk_pipe.pipeline.text import TRAIN, labels_of


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_read_is_what_was_written(written: LocalFolder, temperature: float) -> None:
    reader = CacheReader(written, temperature)
    reader.require_complete(["code"])
    for shard in all_shards(reader.spec):
        for number in numbers(shard):
            tokens, mask, selected = window(shard, number, reader.spec)
            got = reader.read(shard.domain, shard.split, number)
            assert np.array_equal(got.tokens, tokens)
            assert np.array_equal(got.labels, labels_of(tokens, mask, no_label=NO_LABEL))
            known = selected.label_logprobs.numpy()
            assert np.array_equal(np.isnan(got.label_logprobs), np.isnan(known))
            assert np.nanmax(np.abs(got.label_logprobs - known)) <= 1 / 2048 + 1e-6
            slot = int(temperature != 1.0)
            codec, _ = Codecs(written, reader.spec).of("code", slot)
            codes = label_codes(selected.label_logprobs.numpy(), reader.spec.plan.seed, shard.key(number))
            context = Context(labels_of(tokens, mask, no_label=NO_LABEL), codes, shard.key(number))
            wanted = codec.decode(codec.encode(selected.kept[slot], context), context)
            assert got.targets.ids.equal(wanted.ids) and got.targets.logprobs.equal(wanted.logprobs)


@pytest.mark.parametrize("surer", [0.0, 9.0, 16.0])
@pytest.mark.parametrize("tau", [0.02, 1e-3])
def test_plain_zarr_reads_the_arrays_and_thirty_lines_of_numpy_decode_them(
    tmp_path: Path, surer: float, tau: float
) -> None:
    """The recipe of docs/cache-format.md, as it stands there, with nothing of ours; of likely labels and others."""
    folder, spec = LocalFolder(tmp_path / "cache"), make_spec(make_plan(tau=tau))
    tokens, masks, chosen = zip(*(window(SECOND, n, spec, surer=surer) for n in numbers(SECOND)), strict=True)
    open_writer(folder, spec).write(SECOND, np.stack(tokens), np.stack(masks), list(chosen), {})
    text = (Path(__file__).parents[3] / "docs" / "cache-format.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```python\n(def decode.*?)```", text, re.DOTALL)
    assert len(recipe.splitlines()) <= 36
    names: dict[str, Any] = {}
    exec(recipe, {"np": np}, names)  # noqa: S102 (our own documentation)
    group: Any = zarr.open_group(group_path(folder, SECOND), mode="r")
    id_of = np.load(folder.path / "code" / "ranks.npy", allow_pickle=False)
    positions = names["decode"](group, 2, id_of, tau)
    got = CacheReader(folder, 1.0).read("code", TRAIN, 6).targets
    assert len(positions) == got.positions
    for position, expected in enumerate(positions):
        kept = got.ids[position] >= 0
        found = dict(
            zip(got.ids[position][kept].tolist(), got.logprobs[position][kept].exp().tolist(), strict=True)
        )
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_a_cache_of_schema_version_2_is_read_verified_and_not_added_to(tmp_path: Path) -> None:
    folder, spec = LocalFolder(tmp_path / "cache"), make_spec(make_plan(), schema_version=2)
    writer = open_writer(folder, spec)
    for shard in writer.pending():
        write_shard(writer, shard)
    assert json.loads(folder.read("cache.json"))["schema_version"] == 2
    verify_all(folder)
    got = CacheReader(folder, 1.0).read("code", TRAIN, 0)
    assert got.targets.ids[:, 0].tolist() == window(FIRST, 0, spec)[2].targets[0].ids[:, 0].tolist()
    before = folder.read("cache.json")
    with pytest.raises(DdkError, match="schema version 2, which is read but not added to; new caches have 3"):
        open_writer(folder, make_spec(make_plan()))
    assert folder.read("cache.json") == before


def test_incomplete_caches_are_named(place: Folder) -> None:
    writer = open_writer(place, make_spec(make_plan()))
    write_shard(writer, FIRST)
    with pytest.raises(DdkError, match="2 of 3 shards of code/train are not there yet"):
        CacheReader(place, 1.0).require_complete(["code"])


def test_many_threads_read_one_reader(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "KEPT_BYTES", 2 * cache_module.PER_SHARD)  # of one shard at a time
    folder = LocalFolder(folder.path)
    folder._open_files._limit = 3  # files are closed while others still read them
    reader = CacheReader(folder, 1.0)
    wanted = [reader.read("code", TRAIN, number).tokens for number in range(10)]

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, 10, 60)
        return all(np.array_equal(reader.read("code", TRAIN, int(n)).tokens, wanted[n]) for n in order)

    assert together(*(lambda seed=seed: read(seed) for seed in range(6))) == [True] * 6


class Counting(LocalFolder):
    """Counts the files and parts of files that are read."""

    reads = 0

    def read(self, name: str, *, most: int | None = None) -> bytes:
        self.reads += 1
        return super().read(name, most=most)

    def read_many(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        self.reads += len(parts)
        return super().read_many(parts)


@pytest.mark.parametrize(
    ("kept", "places", "opened"), [(1 << 29, True, 0), (1 << 29, False, 0), (1, True, 1), (1, False, 17)]
)
def test_what_is_known_of_a_shard_is_not_read_again(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, kept: int, places: bool, opened: int
) -> None:
    """Of 7 arrays a window; a shard that was forgotten costs its record, and if that is an old one without places 9
    zarr.json and 7 indexes too."""
    if not places:
        reseal(folder, places={})
    monkeypatch.setattr(cache_module, "KEPT_BYTES", kept)
    counting = Counting(folder.path)
    reader = CacheReader(counting, 1.0)
    for number in (0, 4, 8):  # of three shards
        reader.read("code", TRAIN, number)
    before = counting.reads
    again = reader.read("code", TRAIN, 1)
    assert counting.reads - before == 7 + opened
    fresh = CacheReader(LocalFolder(folder.path), 1.0).read("code", TRAIN, 1)
    assert np.array_equal(again.tokens, fresh.tokens) and again.targets.ids.equal(fresh.targets.ids)
    assert len(reader._known) == (3 if kept > 1 else 1)
    assert reader._known_bytes == sum(len(known) + cache_module.PER_SHARD for known in reader._known.values())


def test_a_forgotten_shard_with_another_record_is_opened_anew(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record that a shard was opened with vouches for it; another one may be a stranger's."""
    monkeypatch.setattr(cache_module, "KEPT_BYTES", 1)
    reader = CacheReader(folder, 1.0)
    reader.read("code", TRAIN, 0)
    reader.read("code", TRAIN, 4)
    values = json.loads(folder.read(FIRST.record))
    reseal(folder, places={**values["places"], "tokens": values["places"]["labels"]})
    with pytest.raises(DdkError, match=r"commit record with other places than its files have; run .*verify"):
        reader.read("code", TRAIN, 0)
    reseal(folder, places={})
    assert reader.read("code", TRAIN, 0).tokens.shape == (12,)


def test_a_flipped_bit_is_found_in_a_shard_that_is_known(folder: LocalFolder) -> None:
    reader = CacheReader(folder, 1.0)
    reader.read("code", TRAIN, 0)
    path = group_path(folder, FIRST) / "tokens" / "c" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DdkError, match=r"tokens/c/0/0: row 0 fails its checksum.*verify"):
        reader.read("code", TRAIN, 0)


def test_reading_past_the_end(folder: LocalFolder) -> None:
    reader = CacheReader(folder, 1.0)
    with pytest.raises(IndexError):
        reader.read("code", TRAIN, 10)
    with pytest.raises(IndexError):
        reader.read("code", TRAIN, -1)
    with pytest.raises(DdkError, match="no nothing/train in the cache"):
        reader.read("nothing", TRAIN, 0)
    with pytest.raises(DdkError, match=r"code/train/00000\.json: not committed"):
        folder.remove(FIRST.record)
        check_shard(folder, FIRST, reader.spec)


@pytest.mark.parametrize("target", ["octaves", "labels", "tokens"])
def test_missing_and_truncated_files(folder: LocalFolder, target: str) -> None:
    path = next(
        path for path in sorted(group_path(folder, FIRST).rglob(f"{target}/c/**/*")) if path.is_file()
    )
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DdkError, match=f"{target}/c/0/0: ends too early.*verify"):
        read_all(folder)
    path.unlink()
    with pytest.raises(DdkError, match=r"/c/0/0: committed but missing.*cache-teacher"):
        read_all(LocalFolder(folder.path))


def test_swapped_shards(folder: LocalFolder) -> None:
    one, other = group_path(folder, FIRST), group_path(folder, SECOND)
    one.rename(one.with_name("x"))
    other.rename(one)
    one.with_name("x").rename(other)
    with pytest.raises(DdkError, match="not what was committed"):
        read_all(folder)


def test_links_out_of_the_cache_are_not_followed(folder: LocalFolder, tmp_path: Path) -> None:
    path = group_path(folder, FIRST) / "tokens" / "c" / "0" / "0"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for attempt in (read_all, verify_all):
        with pytest.raises(DdkError, match="leads outside"):
            attempt(folder)


def test_a_pipe_in_place_of_a_file_does_not_hang(folder: LocalFolder) -> None:
    path = group_path(folder, FIRST) / "tokens" / "c" / "0" / "0"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DdkError, match="missing"):
        read_all(folder)


def test_damage_in_an_object_store(s3_url: str) -> None:
    place = open_folder(s3_url)
    assert isinstance(place, ObjectFolder)
    writer = open_writer(place, make_spec(make_plan(), domains={"code": {TRAIN: SIZES[TRAIN]}}))
    for shard in writer.pending():
        write_shard(writer, shard)
    record = read_record(place, FIRST, writer.spec)
    assert record is not None
    name = f"{group_of(FIRST, record)}/tokens/c/0/0"
    content = place.read(name)
    place.write(name, content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(DdkError, match=r"tokens/c/0/0: .*checksum.*ddk-pipe verify s3://"):
        read_all(place)
    place.write(name, content[:30])
    with pytest.raises(DdkError, match="tokens/c/0/0: ends too early"):
        read_all(place)
    place.remove(name)
    with pytest.raises(DdkError, match="tokens/c/0/0: committed but missing"):
        read_all(place)
