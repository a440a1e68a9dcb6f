"""What a report is about: one run, or a sweep with its ranking."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.cache import committed, read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_sweep
from ddk_pipe.pipeline.storage import Folder
from ddk_pipe.stages.common import RunRecord, is_run, load_run
from ddk_pipe.stages.sweep import STOPPED, note_of, read_note, read_record


@dataclass(frozen=True)
class Group:
    """Runs of a sweep that differ by their seed alone, the finished ones. Gaps in nats per token.

    `difference` is the mean over the seeds that both have of (this group's gap - the best group's), `*_error` the
    standard error over seeds; None where there are too few.
    """

    name: str
    runs: list[RunRecord]
    gap: float
    gap_error: float | None
    difference: float | None = None
    difference_error: float | None = None
    pairs: int = 0

    @property
    def step(self) -> int:
        """That all its runs have reached."""
        return min(run.step for run in self.runs)

    @property
    def by_seed(self) -> dict[int | None, float]:
        return {run.seed: run.gap_nats for run in self.runs if run.gap_nats is not None}


@dataclass(frozen=True)
class Report:
    """One page."""

    title: str
    folder: Path
    runs: list[RunRecord]
    groups: list[Group]  # the best first; empty for a single run
    facts: list[tuple[str, str]]  # what was run, for people
    cache: list[tuple[str, str]]
    pending: int = 0  # runs of the sweep that have not begun
    stopped: list[Group] = field(
        default_factory=list
    )  # early; gaps of where they stopped, the last one first

    @property
    def is_sweep(self) -> bool:
        return bool(self.groups) or len(self.runs) != 1 or self.pending > 0

    @property
    def unfinished(self) -> list[RunRecord]:
        return [run for run in self.runs if not run.finished and not run.stopped_early]

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.domains))


def load_report(place: Path) -> Report:
    """The report of a run's folder, a sweep's, or a sweep's file; raises DdkError for anything else."""
    if place.is_file():
        sweep = load_sweep(place)
        return _of_sweep(sweep.output / "sweeps" / sweep.name)
    if (place / "sweep.json").is_file():
        return _of_sweep(place)
    if is_run(place):
        run = load_run(place)
        return Report(f"Run {run.name}", place, [run], [], run_facts(run), _cache_facts([run]))
    found = sorted((place / "sweeps").glob("*/sweep.json")) + sorted(
        (place / "distill").glob("*/steps.jsonl")
    )
    hint = (
        f"name one of its parts, for example {found[0].parent}" if found else "run `ddk-pipe distill` first"
    )
    raise DdkError(f"{place}: neither a run nor a sweep", hint=hint)


def _of_sweep(folder: Path) -> Report:
    record = read_record(folder)
    output = folder.absolute().parent.parent
    runs, pending = [], 0
    for entry in record["runs"]:
        place = output / "distill" / entry["name"]
        if not is_run(place):
            pending += 1
            continue
        command = shlex.join(
            ["ddk-pipe", "distill", record["manifest"]]
            + [part for override in entry["overrides"] for part in ("--set", override)]
        )
        note = read_note(note_of(folder, entry["name"]))
        runs.append(
            load_run(
                place,
                group=entry["group"],
                seed=entry["seed"],
                command=command,
                error=note.get("error") or None,
                stopped_early=note.get("status") == STOPPED and not (place / "run.json").is_file(),
            )
        )
    done = [run for run in runs if run.finished]
    stopped = stopped_groups(runs)
    early = {run.name for group in stopped for run in group.runs}
    facts = [
        ("sweep file", record["file"]),
        ("command", record["command"]),
        ("runs", f"{len(done)} of {len(record['runs'])} finished{_and_stopped(runs)}"),
        ("versions", ", ".join(f"{name} {value}" for name, value in record["versions"].items())),
    ]
    return Report(
        f"Sweep {record['name']}",
        folder,
        runs,
        rank(run for run in done if run.name not in early),
        facts,
        _cache_facts(runs),
        pending=pending,
        stopped=stopped,
    )


def _and_stopped(runs: list[RunRecord]) -> str:
    count = sum(run.stopped_early for run in runs)
    return f", {count} stopped early" if count else ""


def rank(runs: Iterable[RunRecord]) -> list[Group]:
    """Groups by their mean gap, the smallest first, each compared with the best one seed by seed."""
    by_name: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.gap_nats is not None:
            by_name.setdefault(run.group, []).append(run)
    groups = []
    for name, members in by_name.items():
        gaps = [run.gap_nats for run in members if run.gap_nats is not None]
        groups.append(Group(name, members, statistics.fmean(gaps), standard_error(gaps)))
    groups.sort(key=lambda group: group.gap)
    return [group if group is groups[0] else _compared(group, groups[0]) for group in groups]


def stopped_groups(runs: list[RunRecord]) -> list[Group]:
    """Groups of which a run was stopped early, all their runs at the step of the first stop."""
    groups = []
    for name in dict.fromkeys(run.group for run in runs if run.stopped_early):
        members = [run for run in runs if run.group == name and (run.stopped_early or run.finished)]
        step = min(run.step for run in members)
        gaps = [run.gap_at(step) for run in members]
        groups.append(Group(name, members, statistics.fmean(gaps), standard_error(gaps)))
    return sorted(groups, key=lambda group: (-group.step, group.gap))


def _compared(group: Group, best: Group) -> Group:
    mine, theirs = group.by_seed, best.by_seed
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    return Group(
        group.name,
        group.runs,
        group.gap,
        group.gap_error,
        statistics.fmean(differences) if differences else None,
        standard_error(differences),
        len(differences),
    )


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def run_facts(run: RunRecord) -> list[tuple[str, str]]:
    """What a run was, in (name, text) pairs."""
    summary: dict[str, Any] = run.summary or {}
    facts = [
        ("folder", str(run.folder)),
        ("state", state_of(run)),
    ]
    if run.command:
        facts.append(("command", run.command))
    for key, text in (
        ("steps", "{:,}"),
        ("tokens", "{:,}"),
        ("seconds", "{:,.0f}"),
        ("parameters", "{:,}"),
        ("peak_memory_bytes", "{:,}"),
    ):
        if isinstance(summary.get(key), int | float):
            facts.append((key.replace("_", " "), text.format(summary[key])))
    for key in ("settings", "cache_fingerprint"):
        if summary.get(key):
            facts.append((f"{key.replace('_', ' ')} (digest)", str(summary[key])))
    if versions := summary.get("versions"):
        facts.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items())))
    if manifest := summary.get("manifest"):
        options = manifest.get("distill", {})
        shown = ("mixing", "gamma", "temperature", "alpha", "interval_steps", "batch_tokens", "seed")
        facts.append(("settings", ", ".join(f"{key} {options[key]}" for key in shown if key in options)))
    return facts


def state_of(run: RunRecord) -> str:
    """How a run stands, in words."""
    if run.finished:
        return "finished"
    if run.error:
        return f"failed: {run.error}"
    return f"{'stopped early' if run.stopped_early else 'unfinished'}, at step {run.step:,}"


def _cache_facts(runs: list[RunRecord]) -> list[tuple[str, str]]:
    """Of the first cache that is at hand; a report does not need one."""
    for run in runs[:1]:
        try:
            folder = run.cache()
            return _facts_of_cache(folder)
        except (DdkError, OSError) as problem:
            return [("cache", f"not at hand: {' '.join(str(problem).split())}")]
    return []


def _facts_of_cache(folder: Folder) -> list[tuple[str, str]]:
    spec = read_spec(folder)
    records = [record for _, record in committed(folder, spec)]
    positions = sum(record.positions for record in records)
    size = sum(record.target_bytes for record in records)
    settings = ", ".join(f"{name} {value}" for name, value in spec.plan.settings().items())
    each, shards = size / max(positions, 1), len(records)
    windows = sum(size.windows for sizes in spec.domains.values() for size in sizes.values())
    about = spec.about.get("teacher") or spec.about.get("model")
    return [
        ("cache", folder.name),
        ("fingerprint", spec.fingerprint),
        *([("teacher", str(about))] if about else []),
        ("selection", settings),
        ("windows", f"{windows:,} of {spec.seq_len:,} tokens, in {shards:,} shards"),
        ("positions", f"{positions:,} with a label, {each:.1f} bytes each"),
        ("vocabulary", f"{spec.vocab_size:,} ids"),
    ]
