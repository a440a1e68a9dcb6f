from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from caches import FIRST, RANKS, SEQ_LEN, VOCAB, make_plan, make_spec, open_writer, write_shard

from ddk_pipe.pipeline.cache import CacheReader, CacheWriter, read_spec
from ddk_pipe.pipeline.cache import ranks as ranks_module
from ddk_pipe.pipeline.cache.ranks import Codecs, read_ranks
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, LocalFolder
from ddk_pipe.pipeline.targets import Ranks
from ddk_pipe.pipeline.text import TRAIN


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


def test_tables_are_shared_by_temperatures_and_those_used_last_are_kept(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(place: Folder, domain: str, vocab_size: int) -> Ranks:
        read.append(domain)
        return read_ranks(place, domain, vocab_size)

    monkeypatch.setattr(ranks_module, "read_ranks", counted)
    codecs = Codecs(folder, read_spec(folder))
    assert codecs.of("code", 0)[0].ranks is codecs.of("code", 1)[0].ranks
    assert codecs.of("plays", 0)[0] is codecs.of("plays", 0)[0]
    codecs.of("code", 0)
    assert read == ["code", "plays"]
    monkeypatch.setattr(ranks_module, "KEPT_BYTES", 4 * VOCAB)  # of one
    few = Codecs(folder, read_spec(folder))
    for domain in ("code", "plays", "plays", "code"):
        few.of(domain, 0)
    assert read[2:] == ["code", "plays", "code"]


def test_a_table_that_is_replaced_while_it_is_forgotten(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards that were opened with the first one would decode to other ids."""
    monkeypatch.setattr(ranks_module, "KEPT_BYTES", 1)
    reader = CacheReader(folder, 1.0)
    reader.read("code", TRAIN, 0)
    reader.read("plays", TRAIN, 0)
    np.save(folder.path / "code" / "ranks.npy", RANKS.id_of[::-1].copy())
    with pytest.raises(DdkError, match=r"code/ranks\.npy: another table than a moment ago"):
        reader.read("code", TRAIN, 0)
