from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from caches import (
    RANKS,
    SEQ_LEN,
    SIZES,
    VOCAB,
    fill,
    group_path,
    groups,
    make_plan,
    make_spec,
    numbers,
    open_writer,
    read_all,
    resealed,
    verify_all,
    window,
    write_shard,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3 import together

from ddk_pipe.pipeline.cache import (
    CacheReader,
    CacheWriter,
    Shard,
    ShardRecord,
    SplitSize,
    all_shards,
    committed,
    group_of,
    read_spec,
    shards_of,
)
from ddk_pipe.pipeline.cache import reader as cache_module
from ddk_pipe.pipeline.cache.ranks import Codecs, read_ranks
from ddk_pipe.pipeline.cache.record import read_record
from ddk_pipe.pipeline.cache.soundness import check_shard, verify_shard
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, LocalFolder, ObjectFolder, open_folder
from ddk_pipe.pipeline.targets import NO_LABEL, Context, Plan, Ranks, encode_log, select_logits
from ddk_pipe.pipeline.text import TRAIN, labels_of


@pytest.fixture
def tmp_path(ram: Path) -> Path:
    """In memory: these tests write hundreds of files, each with an fsync."""
    return Path(tempfile.mkdtemp(dir=ram))


@pytest.fixture(scope="module")
def filled(ram: Path) -> Path:
    folder = LocalFolder(ram / "filled")
    fill(folder)
    return folder.path


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> LocalFolder:
    """A complete cache, the test's own."""
    shutil.copytree(filled, tmp_path / "cache")
    return LocalFolder(tmp_path / "cache")


@pytest.fixture(scope="module", params=["pps", "threshold", "topk", "random"])
def written(request: pytest.FixtureRequest, ram: Path) -> LocalFolder:
    """A complete cache of one domain, for each scheme."""
    folder = LocalFolder(ram / f"written-{request.param}")
    fill(folder, make_spec(make_plan(request.param), domains={"code": SIZES}))
    return folder


FIRST, SECOND = Shard("code", TRAIN, 0, 0, 4), Shard("code", TRAIN, 1, 4, 4)


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
            assert np.nanmax(np.abs(got.label_logprobs - known)) <= 1 / 4096 + 1e-6
            slot = int(temperature != 1.0)
            codec, _ = Codecs(written, reader.spec).of("code", slot)
            codes = encode_log(selected.label_logprobs.numpy())
            context = Context(labels_of(tokens, mask, no_label=NO_LABEL), codes, shard.key(number))
            wanted = codec.decode(codec.encode(selected.targets[slot], context), context)
            assert got.targets.ids.equal(wanted.ids) and got.targets.logprobs.equal(wanted.logprobs)


def test_plain_zarr_reads_the_arrays_and_thirty_lines_of_numpy_decode_them(folder: LocalFolder) -> None:
    """The recipe of docs/cache-format.md, as it stands there, with nothing of ours."""
    text = (Path(__file__).parents[3] / "docs" / "cache-format.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```python\n(def decode.*?)```", text, re.DOTALL)
    assert len(recipe.splitlines()) <= 36
    names: dict[str, Any] = {}
    exec(recipe, {"np": np}, names)  # noqa: S102 (our own documentation)
    group: Any = zarr.open_group(group_path(folder, SECOND), mode="r")
    id_of = np.load(folder.path / "code" / "ranks.npy", allow_pickle=False)
    positions = names["decode"](group, 2, id_of, 0.02)
    got = CacheReader(folder, 1.0).read("code", TRAIN, 6).targets
    assert len(positions) == got.positions
    for position, expected in enumerate(positions):
        kept = got.ids[position] >= 0
        found = dict(
            zip(got.ids[position][kept].tolist(), got.logprobs[position][kept].exp().tolist(), strict=True)
        )
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk", "random"])
def test_positions_without_label_cost_no_entries(tmp_path: Path, scheme: str) -> None:
    plan = make_plan(scheme, temperatures=(1.0,))
    writer = open_writer(
        LocalFolder(tmp_path), make_spec(plan, domains={"code": {TRAIN: SplitSize(1, 4, "x")}})
    )
    (shard,) = writer.pending()
    tokens = np.zeros((1, SEQ_LEN), np.int64)
    nothing = select_logits(
        torch.randn(SEQ_LEN, VOCAB),
        torch.full((SEQ_LEN,), NO_LABEL),
        plan,
        torch.from_numpy(plan.uniforms("k", SEQ_LEN)),
    )
    record = writer.write(shard, tokens, np.zeros((1, SEQ_LEN), np.uint8), [nothing], {})
    assert (record.entries, record.positions) == (0, 0)
    assert not (CacheReader(writer.folder, 1.0).read("code", TRAIN, 0).targets.ids >= 0).any()


def test_shards_cover_every_window_once() -> None:
    shards = shards_of("d", TRAIN, SplitSize(10, 4, "x"))
    assert [(shard.first_window, shard.windows) for shard in shards] == [(0, 4), (4, 4), (8, 2)]


def test_computing_a_shard_twice_gives_the_same_bytes(folder: LocalFolder, tmp_path: Path) -> None:
    again = LocalFolder(tmp_path / "again")
    write_shard(open_writer(again, make_spec(make_plan())), FIRST)
    one, other = (group_path(cache, FIRST) for cache in (folder, again))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


# --- commit protocol ------------------------------------------------------------------------------


def test_a_crash_before_the_record_leaves_the_shard_pending_and_is_cleaned_up(place: Folder) -> None:
    writer = open_writer(place, make_spec(make_plan()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_shard(writer, FIRST)
    assert FIRST in writer.pending() and len(groups(place, FIRST)) == 1
    reader = CacheReader(place, 1.0)
    with pytest.raises(DdkError, match="not committed"):
        reader.read("code", TRAIN, 0)
    record = write_shard(open_writer(place, make_spec(make_plan())), FIRST)
    assert FIRST not in writer.pending() and groups(place, FIRST) == {record.group}
    assert reader.read("code", TRAIN, 0).tokens.shape == (SEQ_LEN,)


@pytest.mark.slow
def test_of_two_writers_of_one_shard_one_wins_and_nothing_of_the_other_stays(place: Folder) -> None:
    writers = [open_writer(place, make_spec(make_plan())) for _ in range(3)]
    for shard in (FIRST, SECOND):
        records = together(
            *(lambda writer=writer, shard=shard: write_shard(writer, shard) for writer in writers)
        )
        assert all(isinstance(record, ShardRecord) for record in records), records
        (group,) = {record.group for record in records if isinstance(record, ShardRecord)}
        assert groups(place, shard) == {group}
        verify_shard(place, shard, writers[0].spec, Codecs(place, writers[0].spec))
    assert not any("partial" in name for name in place.names())


def test_a_writer_whose_own_commit_is_reported_as_someone_elses(place: Folder) -> None:
    """A store may lose the answer to a put and refuse the second try: the record is ours all the same."""
    writer = open_writer(place, make_spec(make_plan()))
    create = place.create

    def twice(name: str, content: bytes) -> None:
        create(name, content)
        create(name, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "create", twice)
        record = write_shard(writer, FIRST)
    assert groups(place, FIRST) == {record.group}
    verify_shard(place, FIRST, writer.spec, Codecs(place, writer.spec))


def test_the_first_of_two_writers_gives_a_domain_its_rank_table(tmp_path: Path) -> None:
    place = LocalFolder(tmp_path)
    open_writer(place, make_spec(make_plan()))
    two = CacheWriter(place, make_spec(make_plan()))
    assert two.has_ranks("code")
    two.add_ranks("code", Ranks.of(RANKS.id_of[::-1].copy()))
    assert np.array_equal(read_ranks(place, "code", VOCAB).id_of, RANKS.id_of)


def test_a_domain_without_a_rank_table_is_named(tmp_path: Path) -> None:
    writer = CacheWriter(LocalFolder(tmp_path), make_spec(make_plan()))
    with pytest.raises(DdkError, match=r"code/ranks\.npy: missing"):
        write_shard(writer, FIRST)


def test_a_label_the_teacher_thinks_impossible_stays_a_label(tmp_path: Path) -> None:
    writer = open_writer(LocalFolder(tmp_path), make_spec(make_plan()))
    tokens, masks, selected = zip(*(window(FIRST, n, writer.spec) for n in range(4)), strict=True)
    impossible = selected[1].label_logprobs.clone()
    at = int((~impossible.isnan()).nonzero()[0, 0])
    impossible[at] = float("-inf")
    changed = [selected[0], replace(selected[1], label_logprobs=impossible), *selected[2:]]
    writer.write(FIRST, np.stack(tokens), np.stack(masks), changed, {})
    got = CacheReader(writer.folder, 1.0).read("code", TRAIN, 1)
    assert np.array_equal(got.labels, labels_of(tokens[1], masks[1], no_label=NO_LABEL))
    assert got.label_logprobs[at] < -31
    with pytest.raises(ValueError, match="not those of the labels"):
        writer.write(FIRST, np.stack(tokens), np.ones_like(np.stack(masks)), changed, {})


def test_incomplete_caches_are_named(place: Folder) -> None:
    writer = open_writer(place, make_spec(make_plan()))
    write_shard(writer, FIRST)
    with pytest.raises(DdkError, match="2 of 3 shards of code/train are not there yet"):
        CacheReader(place, 1.0).require_complete(["code"])


def test_many_threads_read_one_reader(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 2)
    folder = LocalFolder(folder.path)
    folder._open_files._limit = 3  # files are closed while others still read them
    reader = CacheReader(folder, 1.0)
    wanted = [reader.read("code", TRAIN, number).tokens for number in range(10)]

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, 10, 60)
        return all(np.array_equal(reader.read("code", TRAIN, int(n)).tokens, wanted[n]) for n in order)

    assert together(*(lambda seed=seed: read(seed) for seed in range(6))) == [True] * 6


def test_a_new_domain_joins_and_nothing_else_may_change(folder: LocalFolder) -> None:
    more = {"new": {TRAIN: SplitSize(2, 4, "n")}}
    writer = open_writer(folder, make_spec(make_plan(), domains=more))
    assert [shard.name for shard in writer.pending()] == ["new/train/00000"]
    assert set(read_spec(folder).domains) == {"code", "plays", "new"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher": {"weights_digest": "other", "dtype": "float32"}}, "weights_digest w there, other here"),
        ({"tokenizer_digest": "other"}, "another tokenizer_digest"),
        ({"seq_len": 99}, "another seq_len"),
        ({"plan": make_plan(tau=0.05)}, "tau 0.02 there, 0.05 here"),
        (
            {"domains": {"code": {TRAIN: SplitSize(10, 4, "edited text")}}},
            "code/train was cached from other tokens",
        ),
    ]
    for changes, expected in cases:
        with pytest.raises(DdkError, match=expected):
            open_writer(folder, make_spec(changes.pop("plan", make_plan()), **changes))


def test_one_temperature_more_is_another_cache(folder: LocalFolder) -> None:
    with pytest.raises(DdkError, match="temperatures"):
        open_writer(folder, make_spec(make_plan(temperatures=(1.0, 2.0, 4.0))))
    with pytest.raises(DdkError, match=r"temperature 4.0 is not in the cache \(it has 1.0, 2.0\)"):
        CacheReader(folder, 4.0)


# --- damage: every case is an error that names the file -------------------------------------------


@pytest.mark.slow
def test_verifying_finds_the_statistics_of_the_record(place: Folder) -> None:
    writer = open_writer(place, make_spec(make_plan()))
    for shard in (FIRST, SECOND):
        write_shard(writer, shard)
    for shard, record in committed(place, writer.spec):
        facts = verify_shard(place, shard, writer.spec, Codecs(place, writer.spec))
        assert (facts.positions, facts.entries) == (record.positions, record.entries)
        assert facts.label_nats == record.label_nats
    assert [shard for shard, _ in committed(place, writer.spec)] == [FIRST, SECOND]


def test_any_flipped_byte_of_a_shard_is_noticed(folder: LocalFolder) -> None:
    """Verifying finds all of them; reading finds those it meets, and never returns other values."""
    group = group_path(folder, FIRST)
    rng = np.random.default_rng(3)
    right = [CacheReader(folder, 1.0).read("code", TRAIN, number) for number in range(4)]
    for path in sorted(path for path in group.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for at in rng.integers(0, len(content), 3):
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(DdkError, match=r"not what was committed; run `ddk-pipe verify .* --repair`"):
                check_shard(folder, FIRST, read_spec(folder))
            found = 0
            for number in range(4):
                try:
                    got = CacheReader(folder, 1.0).read("code", TRAIN, number)
                except DdkError as problem:
                    assert group.name in str(problem) and "verify" in problem.hint
                    found += 1
                else:
                    assert np.array_equal(got.tokens, right[number].tokens)
                    assert np.array_equal(got.labels, right[number].labels)
                    assert got.targets.logprobs.equal(right[number].targets.logprobs)
            assert found >= (0 if "t1" in path.parts else 1)
        path.write_bytes(content)
    read_all(folder)
    verify_all(folder)


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


def test_a_record_that_names_the_group_of_another_shard(folder: LocalFolder) -> None:
    path = folder.path / FIRST.record
    record = read_record(folder, SECOND, read_spec(folder))
    assert record is not None
    path.write_bytes(record.model_copy(update=vars(FIRST)).sealed())
    with pytest.raises(DdkError, match="names the group of another shard"):
        read_all(folder)
    shutil.copy(folder.path / SECOND.record, path)
    with pytest.raises(DdkError, match="commit record of another shard"):
        read_all(folder)


def test_window_number_inside_the_data_is_compared(folder: LocalFolder) -> None:
    """Even under a record that was made up for it, a window never passes for another."""
    record = read_record(folder, SECOND, read_spec(folder))
    assert record is not None
    group = group_path(folder, SECOND)
    group.rename(group.with_name("00000.01234567.zarr"))
    made_up = record.model_copy(update={**vars(FIRST), "group": "00000.01234567.zarr"})
    (folder.path / FIRST.record).write_bytes(made_up.sealed())
    with pytest.raises(DdkError, match="window 0 holds another window"):
        CacheReader(folder, 1.0).read("code", TRAIN, 0)


def test_files_that_were_never_committed(folder: LocalFolder) -> None:
    (group_path(folder, FIRST) / "extra").write_text("x")
    with pytest.raises(DdkError, match="was never committed"):
        verify_all(folder)


@pytest.mark.parametrize("edit", ["positions", "seal", "cut", "files"])
def test_edited_commit_records(folder: LocalFolder, edit: str) -> None:
    path = folder.path / FIRST.record
    record = json.loads(path.read_text())
    if edit == "cut":
        path.write_text(path.read_text()[:-20])
    else:
        record[edit] = {"../../../../etc/passwd": {"bytes": 1, "blake2b": "0"}} if edit == "files" else 1
        path.write_text(json.dumps(record))
    with pytest.raises(DdkError, match=r"00000\.json: damaged commit record.*verify"):
        read_all(folder)


def reseal(folder: LocalFolder, **changes: Any) -> None:
    """What a stranger can do to a record: any values, and a seal that fits."""
    path = folder.path / FIRST.record
    path.write_bytes(resealed({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"files": {"../../../secret": {"bytes": 1, "blake2b": "0"}}}, "leads outside"),
        ({"files": {"/etc/passwd": {"bytes": 1, "blake2b": "0"}}}, "leads outside"),
        ({"files": {}}, "lacks 'zarr.json'"),
        ({"checks": {}}, "lacks 'tokens'"),
        ({"group": "../../../../tmp"}, "names the group of another shard"),
        ({"group": "00001.01234567.zarr"}, "names the group of another shard"),
        ({"group": "00000.01234567.zarr"}, "committed but missing"),
        ({"positions": "12"}, "damaged commit record"),
        ({"positions": -1}, "damaged commit record"),
        ({"entries": 10**15}, "impossible numbers"),
        ({"windows": 2}, "another shard"),
        ({"label_nats": None}, "damaged commit record"),
    ],
)
def test_a_sealed_record_of_a_stranger(folder: LocalFolder, changes: dict[str, Any], expected: str) -> None:
    reseal(folder, **changes)
    with pytest.raises(DdkError, match=expected):
        CacheReader(folder, 1.0).read("code", TRAIN, 0)
    with pytest.raises(DdkError):
        verify_all(folder)


def test_checks_of_another_length(folder: LocalFolder) -> None:
    record = json.loads((folder.path / FIRST.record).read_text())
    reseal(folder, checks={**record["checks"], "tokens": "00"})
    with pytest.raises(DdkError, match="checksum for every window"):
        read_all(folder)


@pytest.mark.parametrize("field", ["positions", "entries", "label_nats"])
def test_statistics_that_are_not_those_of_the_windows(folder: LocalFolder, field: str) -> None:
    reseal(folder, **{field: 1})
    with pytest.raises(DdkError, match=f"{field} is .*, its commit record says 1"):
        verify_all(folder)


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


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("schema_version", 1, "schema version 1, this program reads 2"),
        ("vocab_size", 91, "damaged or edited"),
        ("seq_len", 3, "damaged or edited"),
        ("seq_len", "12", "damaged or edited"),
        ("domains", {"../x": {}}, "damaged or edited"),
        ("domains", {"code": {"test": {}}}, "damaged or edited"),
        (
            "domains",
            {"code": {"train": {"windows": 2**50, "shard_windows": 1, "tokens_digest": ""}}},
            "damaged",
        ),
        ("teacher", "gone", "damaged or edited"),
        ("plan", {"scheme": "pps", "tau": "0.02"}, "damaged or edited"),
        ("fingerprint", "other", "damaged or edited"),
    ],
)
def test_edited_cache_json(folder: LocalFolder, field: str, value: Any, expected: str) -> None:
    path = folder.path / "cache.json"
    values = {**json.loads(path.read_text()), field: value}
    for content in (resealed(values), json.dumps(values).encode()):
        path.write_bytes(content)
        with pytest.raises(DdkError, match=expected):
            CacheReader(folder, 1.0)


def test_a_size_in_cache_json_that_was_changed_without_its_seal(folder: LocalFolder) -> None:
    """The fingerprint does not cover sizes; two windows fewer would be silence."""
    path = folder.path / "cache.json"
    path.write_text(path.read_text().replace('"windows": 10', '"windows": 8', 1))
    with pytest.raises(DdkError, match="damaged or edited"):
        CacheReader(folder, 1.0)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"{}", b"[]", b"null"])
def test_cache_json_that_is_something_else(folder: LocalFolder, content: bytes) -> None:
    for name in ("cache.json", FIRST.record):
        good = (folder.path / name).read_bytes()
        (folder.path / name).write_bytes(content)
        with pytest.raises(DdkError, match=name):
            read_all(folder)
        (folder.path / name).write_bytes(good)


def test_a_json_file_too_large_to_be_one(folder: LocalFolder) -> None:
    for name in ("cache.json", FIRST.record):
        good = (folder.path / name).read_bytes()
        os.truncate(folder.path / name, 1 << 40)  # a hole: costs nothing to make
        with pytest.raises(DdkError, match="at most 16,777,216 make sense"):
            read_all(folder)
        (folder.path / name).write_bytes(good)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cache_json_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    values = json.loads(make_spec(make_plan()).to_json())
    name = data.draw(st.sampled_from(sorted(set(values) - {"seal"})))
    values[name] = data.draw(JSON)
    (tmp_path / "cache.json").write_bytes(resealed(values))
    try:
        read_spec(LocalFolder(tmp_path))
    except DdkError:
        return
    same = resealed(values) == make_spec(make_plan()).to_json()
    assert name in ("plan", "about", "domains") or same
    assert name != "plan" or Plan.from_dict(values["plan"]).settings() == make_plan().settings()


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sealed_record_is_read_or_refused(data: st.DataObject, folder: LocalFolder) -> None:
    path = folder.path / FIRST.record
    content = path.read_bytes()
    name = data.draw(st.sampled_from(sorted(set(json.loads(content)) - {"seal"})))
    reseal(folder, **{name: data.draw(JSON)})
    try:
        reader = CacheReader(folder, 1.0)
        reader.read("code", TRAIN, 0)
        verify_shard(folder, FIRST, reader.spec, Codecs(folder, reader.spec))
    except DdkError:
        pass
    finally:
        path.write_bytes(content)


def test_foreign_rank_table(folder: LocalFolder) -> None:
    path = folder.path / "code" / "ranks.npy"
    np.save(path, RANKS.id_of[::-1].copy())
    with pytest.raises(DdkError, match=r"ranks\.npy: not the table that code/train/00000 was coded with"):
        CacheReader(folder, 1.0).read("code", TRAIN, 0)
    assert CacheReader(folder, 1.0).read("plays", TRAIN, 0).tokens.shape == (SEQ_LEN,)  # has its own
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DdkError, match=r"ranks\.npy"):
        CacheReader(folder, 1.0).read("code", TRAIN, 0)
    path.write_bytes(b"")
    with pytest.raises(DdkError, match=r"ranks\.npy"):
        CacheReader(folder, 1.0).read("code", TRAIN, 0)


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
