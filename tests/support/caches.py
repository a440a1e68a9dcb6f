"""Small caches for tests: every window is a pure function of its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_pipe.pipeline.cache import (
    CacheReader,
    CacheSpec,
    CacheWriter,
    Shard,
    ShardRecord,
    SplitSize,
    all_shards,
    group_of,
    read_spec,
)
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.record import read_record
from ddk_pipe.pipeline.cache.soundness import verify_shard
from ddk_pipe.pipeline.storage import Folder, LocalFolder, durable
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Ranks, Selected, select_logits
from ddk_pipe.pipeline.text import TRAIN, VALIDATION, labels_of

Content = dict[str, bytes]  # of files, by name
VOCAB, SEQ_LEN = 90, 12
SIZES = {TRAIN: SplitSize(10, 4, "train-digest"), VALIDATION: SplitSize(3, 4, "validation-digest")}
FIRST, SECOND = Shard("code", TRAIN, 0, 0, 4), Shard("code", TRAIN, 1, 4, 4)
RANKS = Ranks.fit(np.random.default_rng(0).integers(0, 50, VOCAB))


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


def make_spec(plan: Plan, **changes: Any) -> CacheSpec:
    values: dict[str, Any] = {
        "teacher": {"weights_digest": "w", "dtype": "float32"},
        "tokenizer_digest": "t",
        "vocab_size": VOCAB,
        "seq_len": SEQ_LEN,
        "plan": plan,
        "domains": {"code": SIZES, "plays": SIZES},
        **changes,
    }
    return CacheSpec(**values)


def numbers(shard: Shard) -> range:
    """Its windows."""
    return range(shard.first_window, shard.first_window + shard.windows)


def window(
    shard: Shard, number: int, spec: CacheSpec, *, surer: float = 0.0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Selected]:
    """Tokens, loss mask and selection of a window: a pure function of its name. `surer` is added to the logits of labels."""
    seed = int(durable.digest(shard.key(number).encode())[:8], 16)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, spec.vocab_size, spec.seq_len)
    mask = (rng.random(spec.seq_len) < 0.8).astype(np.uint8)
    logits = torch.randn(spec.seq_len, spec.vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    labels = torch.from_numpy(labels_of(tokens, mask, no_label=NO_LABEL))
    logits[torch.arange(spec.seq_len), labels.clamp_min(0)] += surer
    uniforms = torch.from_numpy(spec.plan.uniforms(shard.key(number), spec.seq_len))
    return tokens, mask, select_logits(logits, labels, spec.plan, uniforms)


def open_writer(folder: Folder, spec: CacheSpec) -> CacheWriter:
    """A writer whose domains have rank tables."""
    writer = CacheWriter(folder, spec)
    ranks = RANKS if spec.vocab_size == VOCAB else Ranks.fit(np.arange(spec.vocab_size)[::-1])
    for domain in spec.domains:
        writer.add_ranks(domain, ranks)
    return writer


def write_shard(writer: CacheWriter, shard: Shard) -> ShardRecord:
    """Write and commit one shard of the made-up windows."""
    tokens, masks, selected = zip(*(window(shard, n, writer.spec) for n in numbers(shard)), strict=True)
    return writer.write(shard, np.stack(tokens), np.stack(masks), list(selected), {"seconds": 1.0})


def fill(folder: Folder, spec: CacheSpec | None = None) -> CacheWriter:
    """Everything that is not committed yet; without a spec a cache of two domains."""
    writer = open_writer(folder, spec or make_spec(make_plan()))
    for shard in writer.pending():
        write_shard(writer, shard)
    return writer


def groups(folder: Folder, shard: Shard) -> set[str]:
    """Names of the shard's groups, committed or not."""
    return {name.split("/")[2] for name in folder.names(f"{shard.name}.") if ".zarr/" in name}


def group_path(folder: LocalFolder, shard: Shard) -> Path:
    """Where the arrays of a committed shard are."""
    record = read_record(folder, shard, read_spec(folder))
    assert record is not None
    return folder.path / group_of(shard, record)


def read_all(folder: Folder) -> None:
    """Read every window; raises DdkError for the first that is damaged."""
    reader = CacheReader(folder, 1.0)
    for shard in all_shards(reader.spec):
        for number in numbers(shard):
            reader.read(shard.domain, shard.split, number)


def verify_all(folder: Folder) -> None:
    """Verify every shard; raises DdkError for the first that is damaged."""
    reader = CacheReader(folder, 1.0)
    for shard in all_shards(reader.spec):
        verify_shard(folder, shard, reader.spec, Codecs(folder, reader.spec))


def resealed(values: dict[str, Any]) -> bytes:
    """What a stranger can do: any values, and a seal that fits."""
    return durable.sealed({name: value for name, value in values.items() if name != "seal"})


def reseal(folder: LocalFolder, **changes: Any) -> None:
    """What a stranger can do to a record: any values, and a seal that fits."""
    path = folder.path / FIRST.record
    path.write_bytes(resealed({**json.loads(path.read_text()), **changes}))


def holds(folder: Folder) -> Content:
    return {name: folder.read(name) for name in folder.names()}


def some_shard(folder: Folder, domain: str = "code") -> tuple[Shard, str]:
    """The first shard of a domain's training windows, and its group."""
    spec = read_spec(folder)
    shard = next(s for s in all_shards(spec) if (s.domain, s.split) == (domain, "train"))
    record = read_record(folder, shard, spec)
    assert record is not None
    return shard, group_of(shard, record)


def flip(folder: Folder, name: str, at: int = -30) -> None:
    damaged = bytearray(folder.read(name))
    damaged[at] ^= 4
    folder.write(name, bytes(damaged))


def corrupt_data(folder: Folder, shard: Shard, group: str) -> None:
    flip(folder, f"{group}/t0/octaves/c/0/0")


def without(content: Content, *prefixes: str) -> Content:
    return {name: part for name, part in content.items() if not name.startswith(prefixes)}
