"""The teacher cache on disk: Zarr v3 shards, written once, read by any number of students.

    cache.json                       what made it: teacher, tokenizer, scheme, ... and its fingerprint
    ranks.npy                        frequency-rank table of the token ids, int32 [vocab_size]
    <domain>/<split>/<shard>.zarr    one group per shard, readable by plain zarr.open:
        tokens     u16 or u32 [windows, seq_len]      loss_mask u8 [windows, seq_len]
        labels     u16 [windows, 4 + seq_len]         window number (4 words, low first), label log-probability codes
        t<i>/counts u16 [windows, seq_len, 2]   t<i>/gaps u16 or u32 [windows, widest]
        t<i>/codes  u8  [windows, widest]       t<i>/tails u16 [windows, seq_len] (schemes with a tail only)
    <domain>/<split>/<shard>.json    the commit record: digest of every file, window range, fingerprint

`t<i>` is the i-th temperature. Chunk = one window, one shard file per array, stock codecs that end in crc32c.
A shard is written under another name, fsynced and renamed; the commit record is linked last, exclusively. Only
committed shards exist for readers. A reader compares every file with its digest when it opens a shard and the
window number at every read, so damage is an error that names the file and the repair, never a wrong value.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline import durable
from ddk_pipe.pipeline.codec import Codec, Planes, Ranks, decode_log, encode_log
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import DOMAIN_NAME
from ddk_pipe.pipeline.selection import Plan, Selected
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets
from ddk_pipe.pipeline.tokens import SPLITS, Split, labels_of

SCHEMA_VERSION = 1
STAMP_WORDS = 4  # u16 words that hold the window number
OPEN_SHARDS = 64  # shards a reader keeps open
REPAIR = "delete that shard's .json and .zarr and run `ddk-pipe cache-teacher` again"


@dataclass(frozen=True)
class SplitSize:
    """How one split is cut: `windows` in shards of `shard_windows`; `tokens_digest` fixes their content."""

    windows: int
    shard_windows: int
    tokens_digest: str

    @property
    def shards(self) -> int:
        return -(-self.windows // self.shard_windows)


@dataclass(frozen=True)
class CacheSpec:
    """What cache.json says. Two specs with one fingerprint hold interchangeable targets."""

    teacher: dict[str, Any]  # weights digest and dtype
    tokenizer_digest: str
    vocab_size: int
    seq_len: int
    plan: Plan
    ranks_digest: str
    domains: dict[str, dict[str, SplitSize]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # for people: the model's name, versions

    def identity(self) -> dict[str, Any]:
        """Everything that decides what a shard holds, without the list of domains (which may grow)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "teacher": self.teacher,
            "tokenizer_digest": self.tokenizer_digest,
            "vocab_size": self.vocab_size,
            "seq_len": self.seq_len,
            "selection": self.plan.settings(),
            "quantiser": "u8, uniform in p^(1/4) from tau (pps, threshold) or 0 to 1; log codes 1/2048 nat",
            "ranks_digest": self.ranks_digest,
        }

    @property
    def fingerprint(self) -> str:
        return durable.digest(durable.to_json(self.identity()))

    def to_json(self) -> bytes:
        domains = {
            name: {split: vars(size) for split, size in splits.items()}
            for name, splits in self.domains.items()
        }
        body = {**self.identity(), "plan": self.plan.to_dict(), "domains": domains, "about": self.about}
        return durable.to_json({**body, "fingerprint": self.fingerprint})


def read_spec(folder: Path) -> CacheSpec:
    """Raises DdkError if `folder` holds no cache, one of another schema version, or an edited cache.json."""
    path = folder / "cache.json"
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DdkError(f"{folder}: no teacher cache", hint="run `ddk-pipe cache-teacher`") from None
    except ValueError:
        raise DdkError(f"{path}: not JSON", hint="restore it, or make the cache again") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise DdkError(
            f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}",
            hint="use the ddk-pipe that wrote it, or make the cache again",
        )
    try:
        domains = {
            _domain_name(name): {_split_name(split): SplitSize(**size) for split, size in splits.items()}
            for name, splits in values["domains"].items()
        }
        spec = CacheSpec(
            teacher=values["teacher"],
            tokenizer_digest=values["tokenizer_digest"],
            vocab_size=int(values["vocab_size"]),
            seq_len=int(values["seq_len"]),
            plan=Plan.from_dict(values["plan"]),
            ranks_digest=values["ranks_digest"],
            domains=domains,
            about=values["about"],
        )
        intact = bool(json.loads(spec.to_json()) == values)
    except (KeyError, TypeError, ValueError, AttributeError):
        intact = False
    if not intact:
        raise DdkError(f"{path}: damaged or edited by hand", hint="restore it, or make the cache again")
    return spec


def _domain_name(name: str) -> str:
    if not DOMAIN_NAME.fullmatch(name):
        raise ValueError(name)
    return name


def _split_name(name: str) -> str:
    if name not in SPLITS:
        raise ValueError(name)
    return name


@dataclass(frozen=True)
class Shard:
    """A run of windows of one domain and split: the unit of teacher work, of commit and of retry."""

    domain: str
    split: str
    number: int
    first_window: int
    windows: int

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.split}/{self.number:05d}"

    def key(self, window: int) -> str:
        """Names a window for the draws of the selection."""
        return f"{self.domain}/{self.split}/{self.number}/{window}"


def shard_of(domain: str, split: str, size: SplitSize, number: int) -> Shard:
    """Shard `number` of a split; the last may be short."""
    start = number * size.shard_windows
    return Shard(domain, split, number, start, min(size.shard_windows, size.windows - start))


def shards_of(domain: str, split: str, size: SplitSize) -> list[Shard]:
    """The shards of a split in order."""
    return [shard_of(domain, split, size, number) for number in range(size.shards)]


class CacheWriter:
    """Creates or continues the cache in `folder`; `ranks` is used only where the cache does not exist yet."""

    def __init__(self, folder: Path, spec: CacheSpec, ranks: Ranks) -> None:
        self.folder = folder
        self.spec, self.ranks = self._open(spec, ranks)
        self.codec = Codec(self.spec.plan, self.ranks)

    def _open(self, spec: CacheSpec, ranks: Ranks) -> tuple[CacheSpec, Ranks]:
        if not (self.folder / "cache.json").exists():
            buffer = io.BytesIO()
            np.save(buffer, ranks.id_of, allow_pickle=False)
            durable.write_file(self.folder / "ranks.npy", buffer.getvalue())
            durable.write_file(self.folder / "cache.json", spec.to_json())
            return spec, ranks
        known = read_spec(self.folder)
        merged = _merged(self.folder, known, spec)
        if merged.domains != known.domains:
            durable.write_file(self.folder / "cache.json", merged.to_json())
        return merged, read_ranks(self.folder, merged)

    def pending(self) -> list[Shard]:
        """Shards without a commit record, in order."""
        return [shard for shard in all_shards(self.spec) if not record_path(self.folder, shard).exists()]

    def write(
        self,
        shard: Shard,
        tokens: NDArray[np.int64],
        loss_mask: NDArray[np.uint8],
        selected: list[Selected],
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        """Write and commit one shard; returns its commit record. tokens, loss_mask [windows, seq_len].

        What an earlier writer of this shard left behind without committing is removed first. One live
        process may own a shard; a second commit raises FileExistsError.
        """
        final = shard_path(self.folder, shard)
        durable.make_folder(final.parent)
        shutil.rmtree(final, ignore_errors=True)
        partial = durable.partial_name(final)
        try:
            self._fill(partial, shard, tokens, loss_mask, selected)
            durable.publish_folder(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        record = self._record(shard, final, tokens, loss_mask, selected, facts)
        durable.write_file(record_path(self.folder, shard), _sealed(record), exclusive=True)
        return record

    def _fill(
        self,
        folder: Path,
        shard: Shard,
        tokens: NDArray[np.int64],
        loss_mask: NDArray[np.uint8],
        selected: list[Selected],
    ) -> None:
        import zarr

        group = zarr.open_group(folder, mode="w-", zarr_format=3)
        group.attrs.update(
            {
                "domain": shard.domain,
                "split": shard.split,
                "shard": shard.number,
                "fingerprint": self.spec.fingerprint,
            }
        )
        token_type = "u2" if self.spec.vocab_size <= 1 << 16 else "u4"
        _write(group, "tokens", tokens.astype(token_type))
        _write(group, "loss_mask", loss_mask)
        _write(group, "labels", self._labels(shard, selected))
        for index, temperature in enumerate(self.spec.plan.temperatures):
            planes = [self.codec.encode(window.targets[index]) for window in selected]
            below = group.create_group(f"t{index}", attributes={"temperature": temperature})
            _write(below, "counts", np.stack([part.counts for part in planes]))
            _write(below, "gaps", _rectangle([part.gaps for part in planes], self.codec.gap_dtype))
            _write(below, "codes", _rectangle([part.codes for part in planes], np.dtype("u1")))
            if self.spec.plan.has_tail:
                _write(below, "tails", np.stack([part.tails for part in planes]))

    def _labels(self, shard: Shard, selected: list[Selected]) -> NDArray[np.uint16]:
        numbers = np.arange(shard.first_window, shard.first_window + shard.windows, dtype="<u8")
        stamps = numbers.view("<u2").reshape(-1, STAMP_WORDS)
        codes = [encode_log(window.label_logprobs.cpu().numpy()) for window in selected]
        return np.concatenate([stamps, np.stack(codes)], axis=1)

    def _record(
        self,
        shard: Shard,
        folder: Path,
        tokens: NDArray[np.int64],
        loss_mask: NDArray[np.uint8],
        selected: list[Selected],
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        files = {
            str(path.relative_to(folder)): {
                "bytes": path.stat().st_size,
                "blake2b": durable.file_digest(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        inputs = ("tokens/", "loss_mask/")
        return {
            **vars(shard),
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.spec.fingerprint,
            "files": files,
            "positions": int((loss_mask[:, 1:] > 0).sum()),
            "entries": sum(
                int((targets.ids >= 0).sum()) for window in selected for targets in window.targets
            ),
            "target_bytes": sum(file["bytes"] for name, file in files.items() if not name.startswith(inputs)),
            "input_bytes": sum(file["bytes"] for name, file in files.items() if name.startswith(inputs)),
            "label_nats": float(-sum(np.nansum(window.label_logprobs.cpu().numpy()) for window in selected)),
            **facts,
        }


def _write(group: Any, name: str, values: NDArray[Any]) -> None:
    """One array: chunk = one window, one shard file, zstd with byte shuffle, then crc32c."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    compressor = BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=values.dtype.itemsize)
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(1, *values.shape[1:]),
        shards=values.shape,
        compressors=[compressor, Crc32cCodec()],
        fill_value=0,
        # without this zarr leaves out chunks that are all zeros, and a missing chunk would be silence
        config={"write_empty_chunks": True},
    )
    array[...] = values


def _rectangle(rows: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Ragged rows side by side, filled up with zeros (which compress to nothing); at least one column."""
    width = max(1, *(len(row) for row in rows))
    out = np.zeros((len(rows), width), dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def _merged(folder: Path, known: CacheSpec, wanted: CacheSpec) -> CacheSpec:
    """The known cache with the wanted domains; raises DdkError where the two disagree."""
    ours, theirs = known.identity(), wanted.identity()
    theirs["ranks_digest"] = ours["ranks_digest"]  # fitted once, when the cache was made
    for name, value in theirs.items():
        if ours[name] != value:
            raise DdkError(
                f"{folder}: made with another {name} ({_difference(ours[name], value)})",
                hint="set cache.path to a new folder, or restore the old setting",
            )
    domains = {name: dict(splits) for name, splits in known.domains.items()}
    for name, splits in wanted.domains.items():
        for split, size in splits.items():
            if domains.setdefault(name, {}).setdefault(split, size) != size:
                raise DdkError(
                    f"{folder}: {name}/{split} was cached from other tokens or in other shards",
                    hint="set cache.path to a new folder, or restore the text",
                )
    return CacheSpec(**{**vars(known), "domains": domains})


def _difference(ours: Any, theirs: Any) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        changed = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        return ", ".join(f"{name} {ours.get(name)} there, {theirs.get(name)} here" for name in changed)
    return f"{ours} there, {theirs} here"


def _sealed(record: dict[str, Any]) -> bytes:
    return durable.to_json({**record, "seal": durable.digest(durable.to_json(record))})


def shard_path(folder: Path, shard: Shard) -> Path:
    return folder / shard.domain / shard.split / f"{shard.number:05d}.zarr"


def record_path(folder: Path, shard: Shard) -> Path:
    return folder / shard.domain / shard.split / f"{shard.number:05d}.json"


def all_shards(spec: CacheSpec) -> list[Shard]:
    """Every shard that the cache should have: validation first, then the domains in turn."""
    splits = [
        shards_of(domain, split, sizes[split])
        for split in reversed(SPLITS)
        for domain, sizes in spec.domains.items()
        if split in sizes
    ]
    return [shard for shards in splits for shard in shards]


def read_record(folder: Path, shard: Shard, spec: CacheSpec) -> dict[str, Any] | None:
    """The commit record of a shard, None if it is not committed; raises DdkError if it is damaged or foreign."""
    path = record_path(folder, shard)
    try:
        record = json.loads(path.read_bytes())
        seal = record.pop("seal")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError):
        raise DdkError(f"{path}: damaged commit record", hint=REPAIR) from None
    if seal != durable.digest(durable.to_json(record)):
        raise DdkError(f"{path}: damaged commit record", hint=REPAIR)
    if record["fingerprint"] != spec.fingerprint:
        raise DdkError(f"{path}: commit record of another cache", hint=REPAIR)
    if any(record[name] != value for name, value in vars(shard).items()):
        raise DdkError(f"{path}: commit record of another shard", hint=REPAIR)
    return dict(record)


def read_ranks(folder: Path, spec: CacheSpec) -> Ranks:
    """The rank table, checked against cache.json."""
    path = folder / "ranks.npy"
    try:
        table = np.load(path, allow_pickle=False)
        ranks = Ranks.of(table)
    except FileNotFoundError:
        raise DdkError(f"{path}: missing", hint="restore it, or make the cache again") from None
    except ValueError as problem:
        raise DdkError(f"{path}: {problem}", hint="restore it, or make the cache again") from None
    if ranks_digest(ranks) != spec.ranks_digest or len(table) != spec.vocab_size:
        raise DdkError(f"{path}: not the table of this cache", hint="restore it, or make the cache again")
    return ranks


def ranks_digest(ranks: Ranks) -> str:
    return durable.digest(ranks.id_of.astype("<i4").tobytes())


@dataclass(frozen=True)
class CachedWindow:
    """One window as a student needs it: tokens, labels int64 [seq_len] (-100: none), label_logprobs float32
    [seq_len] in nats (NaN without a label), targets of seq_len positions at one temperature."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_logprobs: NDArray[np.float32]
    targets: SparseTargets


class CacheReader:
    """Reads committed windows in any order. Raises DdkError rather than return anything doubtful."""

    def __init__(self, folder: Path, temperature: float) -> None:
        self.folder = folder
        self.spec = read_spec(folder)
        temperatures = self.spec.plan.temperatures
        if temperature not in temperatures:
            listed = ", ".join(map(str, temperatures))
            raise DdkError(
                f"{folder}: temperature {temperature} is not in the cache (it has {listed})",
                hint="use one of those, or cache again with it in cache.temperatures",
            )
        self._slot = temperatures.index(temperature)
        self.codec = Codec(self.spec.plan, read_ranks(folder, self.spec))
        self._open: OrderedDict[Shard, dict[str, Any]] = OrderedDict()
        self._checked: set[Shard] = set()

    def size(self, domain: str, split: str) -> SplitSize:
        """Raises DdkError if the cache lacks the split."""
        size = self.spec.domains.get(domain, {}).get(split)
        if size is None:
            raise DdkError(
                f"{self.folder}: no {domain}/{split} in the cache", hint="run `ddk-pipe cache-teacher`"
            )
        return size

    def require_complete(self, domains: list[str]) -> None:
        """Raises DdkError unless every shard of these domains is committed."""
        for domain in domains:
            for split in SPLITS:
                shards = shards_of(domain, split, self.size(domain, split))
                missing = [shard for shard in shards if not record_path(self.folder, shard).exists()]
                if missing:
                    raise DdkError(
                        f"{self.folder}: {len(missing)} of {len(shards)} shards of {domain}/{split} are not there yet",
                        hint="run `ddk-pipe cache-teacher`, it continues where it stopped",
                    )

    def read(self, domain: str, split: str, window: int) -> CachedWindow:
        """One window; raises IndexError past the end, DdkError for damage (names the file and the repair)."""
        size = self.size(domain, split)
        if not 0 <= window < size.windows:
            raise IndexError(f"{domain}/{split} has {size.windows} windows, asked for {window}")
        shard = shard_of(domain, split, size, window // size.shard_windows)
        arrays, row = self._arrays(shard), window - shard.first_window
        labels = np.asarray(arrays["labels"][row])
        if int(labels[:STAMP_WORDS].astype("<u2").view("<u8")[0]) != window:
            raise DdkError(
                f"{shard_path(self.folder, shard)}: window {window} holds another window", hint=REPAIR
            )
        tokens = np.asarray(arrays["tokens"][row]).astype(np.int64)
        return CachedWindow(
            tokens=tokens,
            labels=labels_of(tokens, np.asarray(arrays["loss_mask"][row]), no_label=NO_LABEL),
            label_logprobs=decode_log(labels[STAMP_WORDS:], none=np.nan),
            targets=self._targets(shard, arrays, row),
        )

    def _targets(self, shard: Shard, arrays: dict[str, Any], row: int) -> SparseTargets:
        counts = np.asarray(arrays["counts"][row])
        explicit, implied = counts.astype(np.int64).sum(0)
        tails = np.asarray(arrays["tails"][row]) if "tails" in arrays else np.zeros(len(counts), np.uint16)
        planes = Planes(
            counts=counts,
            gaps=np.asarray(arrays["gaps"][row])[: explicit + implied],
            codes=np.asarray(arrays["codes"][row])[:explicit],
            tails=tails,
        )
        try:
            return self.codec.decode(planes)
        except ValueError as problem:
            raise DdkError(f"{shard_path(self.folder, shard)}: {problem}", hint=REPAIR) from None

    def _arrays(self, shard: Shard) -> dict[str, Any]:
        """Opened arrays of a shard, its files checked the first time."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if shard not in self._checked:
            check_shard(self.folder, shard, self.spec)
            self._checked.add(shard)
        import zarr

        group = zarr.open_group(shard_path(self.folder, shard), mode="r")
        arrays = {name: group[name] for name in ("tokens", "loss_mask", "labels")}
        arrays |= {name: array for name, array in group[f"t{self._slot}"].arrays()}
        self._open[shard] = arrays
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return arrays


def check_shard(folder: Path, shard: Shard, spec: CacheSpec) -> dict[str, Any]:
    """Compare every file of a shard with its commit record; returns the record. Raises DdkError."""
    record = read_record(folder, shard, spec)
    if record is None:
        raise DdkError(f"{record_path(folder, shard)}: not committed", hint="run `ddk-pipe cache-teacher`")
    group = shard_path(folder, shard)
    for name, facts in record["files"].items():
        path = group / name
        if not path.resolve().is_relative_to(group.resolve()) or not path.is_file():
            raise DdkError(f"{path}: committed but missing", hint=REPAIR)
        if path.stat().st_size != facts["bytes"] or durable.file_digest(path) != facts["blake2b"]:
            raise DdkError(f"{path}: not what was committed", hint=REPAIR)
    unexpected = {str(path.relative_to(group)) for path in group.rglob("*") if path.is_file()} - set(
        record["files"]
    )
    if unexpected:
        raise DdkError(f"{group / min(unexpected)}: was never committed", hint=REPAIR)
    return record


def committed(folder: Path, spec: CacheSpec) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """Committed shards and their records."""
    for shard in all_shards(spec):
        record = read_record(folder, shard, spec)
        if record is not None:
            yield shard, record


def split_size(split: Split, shard_windows: int) -> SplitSize:
    """How a prepared split is cut into shards."""
    return SplitSize(split.facts.windows, shard_windows, split.facts.digest)
