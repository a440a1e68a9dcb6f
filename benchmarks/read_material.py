"""Caches for cache_read.py, made without a teacher: a few real shards, and copies of them under other numbers.

The targets are drawn, not predicted: Zipf-like softmaxes whose entropy spreads as a language model's does (a few
sure positions, a few wide open). CacheWriter writes the first shards; a copy has its own files, its own window numbers
in the `labels` array, its own attributes and its own sealed record, so that a reader takes it for what it is.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache import (
    CacheSpec,
    CacheWriter,
    Shard,
    ShardRecord,
    SplitSize,
    group_of,
    require_record,
    shards_of,
)
from ddk_pipe.pipeline.cache.arrays import ShardReader
from ddk_pipe.pipeline.cache.layout import STAMP_WORDS, input_arrays
from ddk_pipe.pipeline.cache.record import FileFacts, checks_text
from ddk_pipe.pipeline.storage import Folder, LocalFolder, durable
from ddk_pipe.pipeline.targets import Plan, Ranks, Selected, join, select_logits

VOCAB, SEQ_LEN = 49_152, 2_048
PLAN = Plan("pps", 0.02, 64, 1000, 50, (1.0,), 0)
DOMAIN, SPLIT = "drawn", "train"
BLOCK = 256  # positions whose softmax exists at once
DISTINCT = 8  # windows; copies repeat them


def spec_of(windows: int, shard_windows: int) -> CacheSpec:
    size = SplitSize(windows, shard_windows, "drawn")
    return CacheSpec(
        teacher={"weights_digest": "drawn", "dtype": "float32"},
        tokenizer_digest="drawn",
        vocab_size=VOCAB,
        seq_len=SEQ_LEN,
        plan=PLAN,
        domains={DOMAIN: {SPLIT: size}},
    )


def draw_window(number: int) -> tuple[NDArray[np.int64], Selected]:
    """Tokens of one window, and what the cache keeps of their drawn distributions."""
    generator = torch.Generator().manual_seed(number)
    zipf = -torch.log(torch.arange(VOCAB) + 10.0)
    uniforms = torch.from_numpy(PLAN.uniforms(str(number), SEQ_LEN))
    tokens, parts = torch.zeros(SEQ_LEN, dtype=torch.int64), []
    for start in range(0, SEQ_LEN, BLOCK):
        noise = torch.randn(BLOCK, VOCAB, generator=generator)
        sharpness = torch.exp(0.6 * torch.randn(BLOCK, 1, generator=generator))
        logits = (zipf + 1.6 * noise) * 2.6 * sharpness
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        if start + BLOCK == SEQ_LEN:
            labels[-1] = -100
        tokens[start + 1 : start + BLOCK + 1] = labels[: SEQ_LEN - start - 1]
        parts.append(select_logits(logits, labels, PLAN, uniforms[:, start : start + BLOCK]))
    return tokens.numpy(), join(parts)


def make_cache(folder: LocalFolder, shards: int, shard_windows: int, *, link: bool = False) -> None:
    """A complete cache; with `link` the files of copies that do not differ are hard links (no disk space)."""
    writer = CacheWriter(folder, spec_of(shards * shard_windows, shard_windows))
    writer.add_ranks(DOMAIN, Ranks.fit(-np.arange(VOCAB)))
    drawn = [draw_window(number) for number in range(DISTINCT)]
    originals = shards_of(DOMAIN, SPLIT, writer.spec.domains[DOMAIN][SPLIT])
    firsts = originals[: max(1, DISTINCT // shard_windows)]
    for shard in firsts:
        chosen = [drawn[n % DISTINCT] for n in range(shard.first_window, shard.first_window + shard.windows)]
        tokens = np.stack([tokens for tokens, _ in chosen])
        writer.write(shard, tokens, np.ones(tokens.shape, np.uint8), [window for _, window in chosen], {})
    for shard in originals[len(firsts) :]:
        _copy(folder, writer.spec, firsts[shard.number % len(firsts)], shard, link)


def _copy(folder: LocalFolder, spec: CacheSpec, source: Shard, target: Shard, link: bool) -> None:
    record = require_record(folder, source, spec)
    old, group = folder.path / group_of(source, record), f"{target.number:05d}.00000000.zarr"
    new = folder.path / target.domain / target.split / group
    shutil.copytree(old, new, copy_function=os.link if link else shutil.copyfile)
    changed = {"zarr.json": _attributes(old / "zarr.json", target.number)}
    changed["labels/c/0/0"], checks, place = _labels(folder, spec, source, target, record)
    files = dict(record.files)
    for name, content in changed.items():
        (new / name).unlink()
        (new / name).write_bytes(content)
        files[name] = FileFacts(bytes=len(content), blake2b=durable.digest(content))
    values = {
        **record.model_dump(),
        **vars(target),
        "group": group,
        "files": {name: facts.model_dump() for name, facts in files.items()},
        "checks": {**record.checks, "labels": checks_text(checks)},
        "places": {**record.places, "labels": checks_text(place)},
    }
    (folder.path / target.record).write_bytes(ShardRecord.model_validate(values).sealed())


def _attributes(file: Path, number: int) -> bytes:
    values = json.loads(file.read_bytes())
    values["attributes"]["shard"] = number
    return json.dumps(values).encode()


def _labels(
    folder: Folder, spec: CacheSpec, source: Shard, target: Shard, record: ShardRecord
) -> tuple[bytes, NDArray[np.uint32], NDArray[np.uint32]]:
    """The shard file of the `labels` array with the target's window numbers, its checksums, its place in the record."""
    wanted = {"labels": input_arrays(spec)["labels"]}
    reader = ShardReader(
        folder, group_of(source, record), windows=source.windows, files=record.sizes, expected=wanted
    )
    packer = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE, typesize=2)
    chunks = []
    for row in range(target.windows):
        values = reader.read(row)["labels"]
        values[:STAMP_WORDS] = np.array([target.first_window + row], "<u8").view("<u2")
        chunks.append(_checked(packer.encode(values)))
    lengths = np.array([len(chunk) for chunk in chunks], "<u8")
    index = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    checks = np.array([int.from_bytes(chunk[-4:], "little") for chunk in chunks], np.uint32)
    place = np.array([wanted["labels"].most, *lengths], np.uint32)
    return b"".join([*chunks, _checked(index.tobytes())]), checks, place


def _checked(content: bytes) -> bytes:
    return content + int(google_crc32c.value(content)).to_bytes(4, "little")
