"""`ddk-pipe estimate`: what caches at several settings would cost and how noisy they would be, from a small sample.

Every figure comes from real shards: the sampled windows go through the teacher, the codec and the writer into a
temporary cache, and are read back as a student reads them. The sample of a domain is cut into two halves; each is
coded with a rank table fitted on what the teacher kept of the other.

**Added noise.** A cached target w is a random draw with E[w] = p, the teacher's distribution, so the gradient at the
logits (q - w) has the variance sum_j Var(w_j) more than the dense teacher's. The unit is what training on text has
anyway: a label drawn from p has the variance sum_j p_j (1 - p_j) = 1 - sum_j p_j^2. Reported is the ratio of the two
means over positions; Random Sampling KD with N draws has exactly 1/N, 2% at its usual N = 50. It is estimated without
bias and without the dense distribution. Targets u, v, w of one position that are drawn independently, under any
unbiased settings, have E|v - w|^2 = Var(v) + Var(w) and E[v.w] = sum_j p_j^2, hence Var(w) is the mean of
(|w - u|^2 + |w - v|^2 - |u - v|^2) / 2, and u and v are those of two other rows of the table. The rounding of the
codec is part of w and is counted. Schemes with a tail bucket add no noise but a bias, which this does not show.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape

from ddk_pipe.pipeline.cache import CacheReader, CacheSpec, CacheWriter, ShardRecord, SplitSize, all_shards
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Selected, SparseTargets, stack
from ddk_pipe.pipeline.text import SPLITS, TRAIN, Split, open_split
from ddk_pipe.stages.cache_teacher.maker import Job
from ddk_pipe.stages.cache_teacher.sample import kept_counts, ranks_of, sample_windows
from ddk_pipe.stages.cache_teacher.stage import check_plan, plan_job
from ddk_pipe.stages.common import clock, new_table, say, terminal, track
from ddk_pipe.stages.teachers import Teacher, Window

TAUS = (0.05, 0.03, 0.02, 0.01, 0.005)
SAMPLE_TOKENS = 4096  # of a domain
MOST_NOISE = 0.01  # half of what Random Sampling KD adds with its usual 50 draws


@dataclass(frozen=True)
class Sample:
    """The sampled windows of one domain, and what the whole of it will hold."""

    windows: list[Window]
    split: Split  # the training split, from which they are
    labels: int  # of both splits
    positions: int  # of both splits: windows * seq_len

    @property
    def halves(self) -> list[slice]:
        """Two runs of windows; one, where there is only one window."""
        cut, end = -(-len(self.windows) // 2), len(self.windows)
        return [slice(0, cut), slice(cut, end)] if end > 1 else [slice(0, 1)]


@dataclass(frozen=True)
class Row:
    """One setting. Per position means per position with a label; bytes of targets include the label's code."""

    name: str
    cache: dict[str, Any]  # for the manifest's section `cache`
    entries_per_position: float
    bytes_per_position: float  # tokens left out
    total_bytes: float  # of the whole cache, tokens and records included
    positions_per_second: float
    teacher_seconds: float  # for the whole text
    added_noise: float  # relative to that of a label drawn from the teacher; 0.01 is 1%


@dataclass(frozen=True)
class Estimate:
    """All rows, the manifest's own setting first; `recommended` names one of them."""

    rows: list[Row]
    recommended: str | None
    sampled_positions: int  # with a label
    labels: int  # of the whole text
    positions: int


def estimate(project: Project, *, windows: int | None = None, as_json: bool = False) -> Estimate:
    """Prepare the text if need be, run the teacher over `windows` of each domain (default: about 4k tokens), print.

    Raises DdkError for what cache-teacher would refuse. Writes nothing beside the prepared text.
    """
    if windows is not None and windows < 2:
        raise DdkError(
            f"--windows {windows}: at least 2", hint="one half is coded with a table from the other"
        )
    job = plan_job(project)
    plans = ladder(project, job)
    samples = _samples(project, job.spec, windows)
    positions = sum(len(sample.windows) for sample in samples.values()) * job.spec.seq_len * len(plans)
    say(f"estimate: loading {job.model} with {job.backend}")
    teacher = _open(job)
    try:
        with track("estimate", positions, "positions") as advance:
            measured = []
            for plan in plans:
                measured.append(_measure(job, plan, teacher, list(samples.values())))
                advance(positions / len(plans), name_of(plan))
    finally:
        teacher.close()
    found = _estimate(job.spec, plans, measured, list(samples.values()))
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _show(found)
    return found


def _open(job: Job) -> Teacher:
    teacher = job.opener(
        job.model,
        job.manifest.teacher,
        backend=job.backend,
        seq_len=job.spec.seq_len,
        vocab_size=job.spec.vocab_size,
    )
    if teacher.vocab_size != job.spec.vocab_size:
        teacher.close()
        raise DdkError(
            f"the teacher predicts {teacher.vocab_size:,} tokens, the tokenizer has {job.spec.vocab_size:,}",
            hint="mend vocab_size in its config.json",
        )
    return teacher


def ladder(project: Project, job: Job) -> list[Plan]:
    """The manifest's own plan, then `pps` at several tau where the backend can serve it.

    Each has a seed of its own, so that their draws are independent of each other.
    """
    own = job.spec.plan
    plans = [own]
    for tau in TAUS:
        plan = replace(own, scheme="pps", tau=tau)
        try:
            check_plan(project, plan, job.backend)
        except DdkError:
            continue
        if plan != own:
            plans.append(plan)
    return [replace(plan, seed=own.seed + number) for number, plan in enumerate(plans)]


def name_of(plan: Plan) -> str:
    """The scheme and what it depends on."""
    knobs = _knobs(plan)
    return ", ".join([plan.scheme, *(f"{name} {value:g}" for name, value in knobs.items())])


def _knobs(plan: Plan) -> dict[str, float]:
    settings = plan.settings()
    return {name: settings[name] for name in ("tau", "cap", "k", "draws") if name in settings}


def _samples(project: Project, spec: CacheSpec, windows: int | None) -> dict[str, Sample]:
    count = windows or max(2, SAMPLE_TOKENS // spec.seq_len)
    out = {}
    for name in project.manifest.domains:
        splits = [open_split(project.tokens / name / split) for split in SPLITS]
        facts = [split.facts for split in splits]
        train = splits[SPLITS.index(TRAIN)]
        labels, whole = sum(fact.labels for fact in facts), sum(fact.windows for fact in facts)
        out[name] = Sample(sample_windows(name, train, count), train, labels, whole * spec.seq_len)
    return out


# --- one setting ----------------------------------------------------------------------------------


@dataclass
class Sizes:
    """What the shards of one domain's sample hold."""

    labels: int = 0
    entries: int = 0
    target_bytes: int = 0  # of what grows with the windows
    input_bytes: int = 0  # of tokens
    fixed_bytes: list[int] = field(
        default_factory=list
    )  # of each shard's metadata, however many windows it has
    record_bytes: list[int] = field(default_factory=list)

    def add(self, record: ShardRecord) -> None:
        """A shard more."""
        data = {name: size for name, size in record.sizes.items() if not name.endswith("zarr.json")}
        tokens = sum(size for name, size in data.items() if name.startswith("tokens/"))
        self.labels += record.positions
        self.entries += record.entries
        self.input_bytes += tokens
        self.target_bytes += sum(data.values()) - tokens
        self.fixed_bytes.append(sum(record.sizes.values()) - sum(data.values()))
        self.record_bytes.append(len(record.sealed()))


@dataclass(frozen=True)
class Measured:
    """What the samples say about one plan."""

    seconds: float  # the teacher's
    domains: list[Sizes]
    targets: SparseTargets  # as decoded, at the first temperature; positions with a label


def _measure(job: Job, plan: Plan, teacher: Teacher, samples: list[Sample]) -> Measured:
    """Teacher, codec and writer on all samples."""
    windows = [window for sample in samples for window in sample.windows]
    step = job.manifest.teacher.batch_windows
    teacher.select(windows[:1], plan)  # what is set up once must not count for every position
    began = time.monotonic()
    selected: list[Selected] = []
    for start in range(0, len(windows), step):
        selected += teacher.select(windows[start : start + step], plan)
    seconds = time.monotonic() - began
    sizes, targets = [], []
    for sample in samples:
        mine, selected = selected[: len(sample.windows)], selected[len(sample.windows) :]
        with tempfile.TemporaryDirectory(prefix="ddk-pipe-") as folder:
            domain = _write(replace(job.spec, plan=plan), sample, mine, LocalFolder(Path(folder) / "cache"))
            sizes.append(domain[0])
            targets += domain[1]
    return Measured(seconds, sizes, stack(targets))


def _write(
    like: CacheSpec, sample: Sample, selected: list[Selected], folder: LocalFolder
) -> tuple[Sizes, list[SparseTargets]]:
    """Write each half of a sample as a domain of its own; what that took, and what a reader gets of each window."""
    halves = {f"half{number}": half for number, half in enumerate(sample.halves)}
    domains = {
        name: {TRAIN: SplitSize(half.stop - half.start, half.stop - half.start, "sample")}
        for name, half in halves.items()
    }
    writer = CacheWriter(folder, replace(like, domains=domains))
    sizes, targets = Sizes(), []
    for shard in all_shards(writer.spec):
        half = halves[shard.domain]
        others = [item for number, item in enumerate(selected) if not half.start <= number < half.stop]
        writer.add_ranks(shard.domain, ranks_of(kept_counts(others, like.vocab_size), sample.split))
        windows = sample.windows[half]
        tokens = np.stack([window.tokens for window in windows])
        sizes.add(writer.write(shard, tokens, _loss_mask(windows), selected[half], {}))
    reader = CacheReader(folder, like.plan.temperatures[0])
    for shard in all_shards(writer.spec):
        for number in range(shard.windows):
            window = reader.read(shard.domain, shard.split, number)
            targets.append(window.targets.rows(torch.from_numpy(window.labels != NO_LABEL)))
    return sizes, targets


def _loss_mask(windows: list[Window]) -> NDArray[np.uint8]:
    """Which tokens are labels, [windows, seq_len]: the inverse of labels_of."""
    labels = np.stack([window.labels for window in windows])
    mask = np.zeros(labels.shape, np.uint8)
    mask[:, 1:] = labels[:, :-1] != NO_LABEL
    return mask


# --- added noise ----------------------------------------------------------------------------------


def added_noise(targets: SparseTargets, second: SparseTargets, third: SparseTargets) -> float:
    """Variance of `targets` at the logits over that of a one-hot label drawn from the teacher (module docstring).

    All three describe the same positions, are unbiased and independent of each other; the less the other two leave
    to chance, the smaller the error of the estimate.
    """
    apart = squared_distances(targets, second) + squared_distances(targets, third)
    variance = np.sum(apart - squared_distances(second, third)) / 2
    return float(max(variance, 0.0) / max(np.sum(1.0 - row_products(second, third)), 1e-12))


def squared_distances(one: SparseTargets, other: SparseTargets) -> NDArray[np.float64]:
    """sum_j (w_j - v_j)^2 of each position, float64 [N]."""
    squares = [targets.logprobs.double().mul(2).exp().sum(1).numpy() for targets in (one, other)]
    return np.asarray(squares[0] + squares[1] - 2 * row_products(one, other))


def row_products(one: SparseTargets, other: SparseTargets) -> NDArray[np.float64]:
    """sum_j w_j v_j of each position, float64 [N]."""
    (keys, weights), (other_keys, other_weights) = _entries(one), _entries(other)
    shared, at, at_other = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    shares: NDArray[np.float64] = weights[at] * other_weights[at_other]
    return np.bincount(shared >> 32, shares, one.positions).astype(np.float64)


def _entries(targets: SparseTargets) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A number for each (position, id), and the weights."""
    ids = targets.ids.numpy()
    rows, columns = np.nonzero(ids >= 0)
    keys = (rows.astype(np.int64) << 32) | ids[rows, columns]
    return keys, np.exp(targets.logprobs.numpy()[rows, columns].astype(np.float64))


def _share(plan: Plan) -> float:
    """Weight of one draw, at most: the smaller, the less noise."""
    return 1.0 / plan.draws if plan.scheme == "random" else plan.tau


# --- all of them ----------------------------------------------------------------------------------


def _estimate(
    spec: CacheSpec, plans: list[Plan], measured: list[Measured], samples: list[Sample]
) -> Estimate:
    unbiased = [number for number, plan in enumerate(plans) if not plan.has_tail]
    unbiased.sort(key=lambda number: _share(plans[number]))
    rows = []
    for number, plan in enumerate(plans):
        others = [measured[index].targets for index in unbiased if index != number][:2]
        noise = 0.0 if plan.has_tail else added_noise(measured[number].targets, *others)
        rows.append(_row(spec, plan, measured[number], samples, noise))
    return Estimate(
        rows=rows,
        recommended=_recommended([row for row in rows if row.cache["scheme"] == "pps"]),
        sampled_positions=sum(sizes.labels for sizes in measured[0].domains),
        labels=sum(sample.labels for sample in samples),
        positions=sum(sample.positions for sample in samples),
    )


def _recommended(rows: list[Row]) -> str | None:
    """The largest tau whose noise is small enough, else the smallest there is."""
    rows = sorted(rows, key=lambda row: -row.cache["tau"])
    quiet = [row.name for row in rows if row.added_noise <= MOST_NOISE]
    return next(iter(quiet + [row.name for row in rows[-1:]]), None)


def _row(spec: CacheSpec, plan: Plan, measured: Measured, samples: list[Sample], noise: float) -> Row:
    """From the sample to the whole text: what depends on labels grows with them, metadata with the shards."""
    targets, tokens, entries = 0.0, 0.0, 0.0
    for sizes, sample in zip(measured.domains, samples, strict=True):
        growth = sample.labels / max(sizes.labels, 1)
        targets += sizes.target_bytes * growth
        entries += sizes.entries * growth
        tokens += sizes.input_bytes * sample.positions / (len(sample.windows) * spec.seq_len)
    shards = sum(size.shards for domain in spec.domains.values() for size in domain.values())
    fixed = shards * float(np.mean([size for sizes in measured.domains for size in sizes.fixed_bytes]))
    records = shards * float(np.mean([size for sizes in measured.domains for size in sizes.record_bytes]))
    tables = 4 * spec.vocab_size * len(samples)
    labels = max(sum(sample.labels for sample in samples), 1)
    rate = sum(len(sample.windows) for sample in samples) * spec.seq_len / max(measured.seconds, 1e-9)
    return Row(
        name=name_of(plan),
        cache={"scheme": plan.scheme, **_knobs(plan)},
        entries_per_position=entries / labels,
        bytes_per_position=(targets + fixed) / labels,
        total_bytes=targets + tokens + fixed + records + tables,
        positions_per_second=rate,
        teacher_seconds=sum(sample.positions for sample in samples) / rate,
        added_noise=noise,
    )


def _show(found: Estimate) -> None:
    title = f"estimate for {found.labels:,} positions, from {found.sampled_positions:,} of them; entries, bytes per position"
    out = new_table(title, "setting", "entries", "bytes", "cache", "teacher time", "added noise")
    for row in found.rows:
        biased = row.cache["scheme"] in ("threshold", "topk")
        out.add_row(
            escape(row.name) + (" (yours)" if row is found.rows[0] else ""),
            f"{row.entries_per_position:.1f}",
            f"{row.bytes_per_position:.1f}",
            size_text(row.total_bytes),
            clock(row.teacher_seconds),
            "none, but biased" if biased else f"{100 * row.added_noise:.2f}%",
        )
    terminal().print(out)
    for line in _advice(found):
        print(line)


def _advice(found: Estimate) -> list[str]:
    chosen = next((row for row in found.rows if row.name == found.recommended), None)
    if chosen is None:
        return ["no recommendation: teacher.vllm.capture: prompt_logprobs cannot serve the unbiased schemes"]
    enough = f"the fewest bytes at no more than {100 * MOST_NOISE:g}% of added noise"
    why = enough if chosen.added_noise <= MOST_NOISE else "the least noise of those tried"
    return [
        f"recommended: {chosen.name} ({why}; Random Sampling KD with its 50 draws adds 2%)",
        f"in the manifest: cache: {{scheme: pps, tau: {chosen.cache['tau']:g}}}",
    ]


def size_text(size: float) -> str:
    """Bytes as people read them: 12.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
