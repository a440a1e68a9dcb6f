from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline import cache as cache_module
from ddk_pipe.pipeline import durable
from ddk_pipe.pipeline.cache import (
    CacheReader,
    CacheSpec,
    CacheWriter,
    Shard,
    SplitSize,
    all_shards,
    check_shard,
    ranks_digest,
    read_spec,
    shards_of,
)
from ddk_pipe.pipeline.codec import Ranks
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.selection import Plan, Selected, select_logits
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.pipeline.tokens import TRAIN, VALIDATION, labels_of

VOCAB, SEQ_LEN = 90, 12
SIZES = {TRAIN: SplitSize(10, 4, "train-digest"), VALIDATION: SplitSize(3, 4, "validation-digest")}


def make_spec(plan: Plan, ranks: Ranks, **changes: Any) -> CacheSpec:
    values: dict[str, Any] = {
        "teacher": {"weights_digest": "w", "dtype": "float32"},
        "tokenizer_digest": "t",
        "vocab_size": VOCAB,
        "seq_len": SEQ_LEN,
        "plan": plan,
        "ranks_digest": ranks_digest(ranks),
        "domains": {"code": SIZES, "plays": SIZES},
        **changes,
    }
    return CacheSpec(**values)


def window(
    shard: Shard, number: int, plan: Plan
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Selected]:
    """Tokens, loss mask and selection of a window: a pure function of its name."""
    seed = int(durable.digest(shard.key(number).encode())[:8], 16)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, SEQ_LEN)
    mask = (rng.random(SEQ_LEN) < 0.8).astype(np.uint8)
    logits = torch.randn(SEQ_LEN, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    labels = torch.from_numpy(labels_of(tokens, mask, no_label=NO_LABEL))
    uniforms = torch.from_numpy(plan.uniforms(shard.key(number), SEQ_LEN))
    return tokens, mask, select_logits(logits, labels, plan, uniforms)


def write_shard(writer: CacheWriter, shard: Shard) -> dict[str, Any]:
    numbers = range(shard.first_window, shard.first_window + shard.windows)
    tokens, masks, selected = zip(*(window(shard, n, writer.spec.plan) for n in numbers), strict=True)
    return writer.write(shard, np.stack(tokens), np.stack(masks), list(selected), {"seconds": 1.0})


def make_plan(scheme: str = "pps", **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "tau": 0.02,
        "k": 5,
        "cap": 8,
        "draws": 20,
        "temperatures": (1.0, 2.0),
        "seed": 0,
    }
    return Plan(scheme=scheme, **{**values, **changes})


RANKS = Ranks.fit(np.random.default_rng(0).integers(0, 50, VOCAB))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete cache of two domains."""
    writer = CacheWriter(tmp_path / "cache", make_spec(make_plan(), RANKS), RANKS)
    for shard in writer.pending():
        write_shard(writer, shard)
    return tmp_path / "cache"


FIRST = Shard("code", TRAIN, 0, 0, 4)


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk", "random"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_read_is_what_was_written(tmp_path: Path, scheme: str, temperature: float) -> None:
    writer = CacheWriter(tmp_path, make_spec(make_plan(scheme), RANKS), RANKS)
    for shard in writer.pending():
        write_shard(writer, shard)
    reader = CacheReader(tmp_path, temperature)
    reader.require_complete(["code", "plays"])
    for shard in all_shards(writer.spec):
        for number in range(shard.first_window, shard.first_window + shard.windows):
            tokens, mask, selected = window(shard, number, writer.spec.plan)
            got = reader.read(shard.domain, shard.split, number)
            assert np.array_equal(got.tokens, tokens)
            assert np.array_equal(got.labels, labels_of(tokens, mask, no_label=NO_LABEL))
            known = selected.label_logprobs.numpy()
            assert np.array_equal(np.isnan(got.label_logprobs), np.isnan(known))
            assert np.nanmax(np.abs(got.label_logprobs - known)) <= 1 / 4096 + 1e-6
            wanted = writer.codec.decode(writer.codec.encode(selected.targets[int(temperature != 1.0)]))
            assert got.targets.ids.equal(wanted.ids) and got.targets.logprobs.equal(wanted.logprobs)


def test_plain_zarr_reads_the_arrays_and_thirty_lines_of_numpy_decode_them(folder: Path) -> None:
    """The recipe of docs/cache-format.md, with nothing of ours."""
    group: Any = zarr.open_group(folder / "code" / TRAIN / "00001.zarr", mode="r")
    id_of = np.load(folder / "ranks.npy", allow_pickle=False)
    tau, row = 0.02, 2
    counts = group["t0/counts"][row].astype(int)
    explicit, implied = counts.sum(0)
    gaps = group["t0/gaps"][row][: explicit + implied].astype(int)
    codes = group["t0/codes"][row][:explicit].astype(float)
    floor = tau**0.25
    weights = (floor + (1 - floor) / 255 * codes) ** 4
    positions = []
    at_explicit, at_implied = 0, explicit
    for n_explicit, n_implied in counts:
        ids: list[int] = []
        values: list[float | None] = []
        for start, n, kind in ((at_explicit, n_explicit, "explicit"), (at_implied, n_implied, "implied")):
            ranks = np.cumsum(gaps[start : start + n] + 1) - 1
            ids += id_of[ranks].tolist()
            values += weights[start : start + n].tolist() if kind == "explicit" else [None] * n
        known = sum(value for value in values if value is not None)
        share = (1 - known) / max(n_implied, 1)
        full = [share if value is None else value for value in values]
        positions.append(dict(zip(ids, np.array(full) / (sum(full) or 1), strict=True)))
        at_explicit, at_implied = at_explicit + n_explicit, at_implied + n_implied
    got = CacheReader(folder, 1.0).read("code", TRAIN, 6).targets
    for position, expected in enumerate(positions):
        kept = got.ids[position] >= 0
        found = dict(
            zip(got.ids[position][kept].tolist(), got.logprobs[position][kept].exp().tolist(), strict=True)
        )
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk", "random"])
def test_positions_without_label_cost_no_entries(tmp_path: Path, scheme: str) -> None:
    plan = make_plan(scheme, temperatures=(1.0,))
    writer = CacheWriter(
        tmp_path, make_spec(plan, RANKS, domains={"code": {TRAIN: SplitSize(1, 4, "x")}}), RANKS
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
    assert (record["entries"], record["positions"]) == (0, 0)
    assert not (CacheReader(tmp_path, 1.0).read("code", TRAIN, 0).targets.ids >= 0).any()


def test_shards_cover_every_window_once() -> None:
    shards = shards_of("d", TRAIN, SplitSize(10, 4, "x"))
    assert [(shard.first_window, shard.windows) for shard in shards] == [(0, 4), (4, 4), (8, 2)]


def test_computing_a_shard_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "again", make_spec(make_plan(), RANKS), RANKS)
    write_shard(writer, FIRST)
    one, other = (base / "code" / TRAIN / "00000.zarr" for base in (folder, tmp_path / "again"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


# --- commit protocol ------------------------------------------------------------------------------


def test_a_crash_before_the_record_leaves_the_shard_pending_and_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CacheWriter(tmp_path, make_spec(make_plan(), RANKS), RANKS)
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_shard(writer, FIRST)
    assert FIRST in writer.pending()
    reader = CacheReader(tmp_path, 1.0)
    with pytest.raises(DdkError, match="not committed"):
        reader.read("code", TRAIN, 0)
    write_shard(CacheWriter(tmp_path, make_spec(make_plan(), RANKS), RANKS), FIRST)
    assert FIRST not in writer.pending()
    assert reader.read("code", TRAIN, 0).tokens.shape == (SEQ_LEN,)


def test_incomplete_caches_are_named(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, make_spec(make_plan(), RANKS), RANKS)
    write_shard(writer, FIRST)
    with pytest.raises(DdkError, match="2 of 3 shards of code/train are not there yet"):
        CacheReader(tmp_path, 1.0).require_complete(["code"])


def test_a_new_domain_joins_and_nothing_else_may_change(folder: Path) -> None:
    more = {"new": {TRAIN: SplitSize(2, 4, "n")}}
    writer = CacheWriter(folder, make_spec(make_plan(), RANKS, domains=more), RANKS)
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
            CacheWriter(folder, make_spec(changes.pop("plan", make_plan()), RANKS, **changes), RANKS)


def test_one_temperature_more_is_another_cache(folder: Path) -> None:
    with pytest.raises(DdkError, match="temperatures"):
        CacheWriter(folder, make_spec(make_plan(temperatures=(1.0, 2.0, 4.0)), RANKS), RANKS)
    with pytest.raises(DdkError, match=r"temperature 4.0 is not in the cache \(it has 1.0, 2.0\)"):
        CacheReader(folder, 4.0)


# --- damage: every case is an error that names the file -------------------------------------------


def read_all(folder: Path) -> None:
    reader = CacheReader(folder, 1.0)
    for shard in all_shards(reader.spec):
        for number in range(shard.first_window, shard.first_window + shard.windows):
            reader.read(shard.domain, shard.split, number)


def test_any_flipped_byte_of_a_shard_is_noticed(folder: Path) -> None:
    group = folder / "code" / TRAIN / "00000.zarr"
    rng = np.random.default_rng(3)
    for path in sorted(path for path in group.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for at in rng.integers(0, len(content), 3):
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(DdkError, match="not what was committed"):
                CacheReader(folder, 1.0).read("code", TRAIN, 0)
        path.write_bytes(content)
    read_all(folder)


@pytest.mark.parametrize("target", ["gaps", "labels", "tokens"])
def test_missing_and_truncated_files(folder: Path, target: str) -> None:
    group = folder / "code" / TRAIN / "00000.zarr"
    path = next(path for path in sorted(group.rglob(f"{target}/c/**/*")) if path.is_file())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DdkError, match="not what was committed"):
        read_all(folder)
    path.unlink()
    with pytest.raises(DdkError, match=r"committed but missing.*cache-teacher"):
        read_all(folder)


def test_swapped_shards(folder: Path) -> None:
    base = folder / "code" / TRAIN
    base.joinpath("00000.zarr").rename(base / "x")
    base.joinpath("00001.zarr").rename(base / "00000.zarr")
    (base / "x").rename(base / "00001.zarr")
    with pytest.raises(DdkError, match="not what was committed"):
        read_all(folder)


def test_shard_and_record_copied_over_another(folder: Path) -> None:
    base = folder / "code" / TRAIN
    shutil.rmtree(base / "00001.zarr")
    shutil.copytree(base / "00000.zarr", base / "00001.zarr")
    shutil.copy(base / "00000.json", base / "00001.json")
    with pytest.raises(DdkError, match="commit record of another shard"):
        read_all(folder)


def test_window_number_inside_the_data_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if digests were fooled, a window never passes for another."""
    base = folder / "code" / TRAIN
    shutil.rmtree(base / "00001.zarr")
    shutil.copytree(base / "00000.zarr", base / "00001.zarr")
    monkeypatch.setattr(cache_module, "check_shard", lambda *_: {})
    with pytest.raises(DdkError, match="window 4 holds another window"):
        CacheReader(folder, 1.0).read("code", TRAIN, 4)


def test_files_that_were_never_committed(folder: Path) -> None:
    (folder / "code" / TRAIN / "00000.zarr" / "extra").write_text("x")
    with pytest.raises(DdkError, match="was never committed"):
        read_all(folder)


@pytest.mark.parametrize("edit", ["positions", "seal", "cut", "files"])
def test_edited_commit_records(folder: Path, edit: str) -> None:
    path = folder / "code" / TRAIN / "00000.json"
    record = json.loads(path.read_text())
    if edit == "cut":
        path.write_text(path.read_text()[:-20])
    else:
        if edit == "files":
            record["files"] = {"../../../../etc/passwd": {"bytes": 1, "blake2b": "0"}}
        else:
            record[edit] = 1
        path.write_text(json.dumps(record))
    with pytest.raises(DdkError, match=r"00000\.json: damaged commit record"):
        read_all(folder)


def test_a_sealed_record_cannot_lead_outside(folder: Path, tmp_path: Path) -> None:
    """A stranger can seal a record; it still names files inside its shard only."""
    path = folder / "code" / TRAIN / "00000.json"
    record = json.loads(path.read_text())
    del record["seal"]
    secret = tmp_path / "secret"
    secret.write_text("x")
    record["files"]["../../../../secret"] = {"bytes": 1, "blake2b": durable.file_digest(secret)}
    path.write_bytes(cache_module._sealed(record))
    with pytest.raises(DdkError, match="committed but missing"):
        check_shard(folder, FIRST, read_spec(folder))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("schema_version", 99, "schema version 99, this program reads 1"),
        ("vocab_size", 91, "damaged or edited"),
        ("seq_len", 3, "damaged or edited"),
        ("domains", {"../x": {}}, "damaged or edited"),
        ("domains", {"code": {"test": {}}}, "damaged or edited"),
        ("teacher", "gone", "damaged or edited"),
        ("fingerprint", "other", "damaged or edited"),
    ],
)
def test_edited_cache_json(folder: Path, field: str, value: Any, expected: str) -> None:
    path = folder / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(DdkError, match=expected):
        CacheReader(folder, 1.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cache_json_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    values = json.loads(make_spec(make_plan(), RANKS).to_json())
    name = data.draw(st.sampled_from(sorted(values)))
    values[name] = data.draw(JSON)
    (tmp_path / "cache.json").write_text(json.dumps(values))
    try:
        read_spec(tmp_path)
    except DdkError:
        return
    assert (
        name in ("plan", "about", "domains") or json.loads(make_spec(make_plan(), RANKS).to_json()) == values
    )
    assert name != "plan" or Plan.from_dict(values["plan"]).settings() == make_plan().settings()


def test_foreign_rank_table(folder: Path) -> None:
    np.save(folder / "ranks.npy", RANKS.id_of[::-1].copy())
    with pytest.raises(DdkError, match="not the table of this cache"):
        CacheReader(folder, 1.0)
    np.save(folder / "ranks.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DdkError, match=r"ranks\.npy"):
        CacheReader(folder, 1.0)


def test_reading_past_the_end(folder: Path) -> None:
    reader = CacheReader(folder, 1.0)
    with pytest.raises(IndexError):
        reader.read("code", TRAIN, 10)
    with pytest.raises(IndexError):
        reader.read("code", TRAIN, -1)
    with pytest.raises(DdkError, match="no nothing/train in the cache"):
        reader.read("nothing", TRAIN, 0)
