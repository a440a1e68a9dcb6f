"""`ddk-pipe verify`: check all of a cache, say what is wrong, and, if asked, make room for what can be made again."""

from __future__ import annotations

import json
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from ddk_pipe.pipeline.cache import Report, SplitReport, all_shards, read_spec, uncommitted
from ddk_pipe.pipeline.cache import verify as verify_cache
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.storage import Folder, is_url, open_folder
from ddk_pipe.stages.common import new_table, say, terminal, track

NAMED = 5  # of many alike, so many are named


def verify(place: str, *, repair: bool = False, as_json: bool = False) -> Report:
    """Verify the cache at `place` and print what was found; raises DdkError where there is none to look at."""
    folder = cache_folder(place)
    spec = read_spec(folder)
    shards = all_shards(spec)
    missing = set(uncommitted(folder, shards))
    windows = sum(shard.windows for shard in shards if shard not in missing)
    with track("verify", windows, "windows") as advance:
        report = verify_cache(folder, repair=repair, advance=advance)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report, repair)
    return report


def cache_folder(place: str) -> Folder:
    """The cache that a URL, a cache folder, an output folder or a manifest names."""
    if is_url(place):
        return open_folder(place)
    path = Path(place)
    if path.suffix in (".yaml", ".yml"):
        return load_project(path).cache
    has_one = not (path / "cache.json").is_file() and (path / "cache" / "cache.json").is_file()
    return open_folder(path / "cache" if has_one else path)


def _show(report: Report, repair: bool) -> None:
    terminal().print(_table(report))
    for line in _lines(report, repair):
        say(line)


def _table(report: Report) -> Table:
    columns = ("split", "shards", "sound", "windows", "positions", "entries", "MB", "nats/token")
    out = new_table(f"cache {report.cache}", *columns)
    total = SplitReport()
    for name, split in report.splits.items():
        out.add_row(*_row(name, split))
        for what, value in vars(split).items():
            setattr(total, what, getattr(total, what) + value)
    if len(report.splits) > 1:
        out.add_section()
        out.add_row(*_row("all", total))
    return out


def _row(name: str, split: SplitReport) -> list[str]:
    return [
        escape(name),
        f"{split.committed:,} of {split.shards:,}",
        f"{split.sound:,}",
        f"{split.windows:,}",
        f"{split.positions:,}",
        f"{split.entries:,}",
        f"{(split.target_bytes + split.input_bytes) / 1e6:,.1f}",
        f"{split.label_nats / split.positions:.3f}" if split.positions else "",
    ]


def _lines(report: Report, repair: bool) -> list[str]:
    """One line for each thing found, then what to do."""
    lines = [*report.tables.values(), *report.bad.values()]
    lines += [f"left over: {item.name} ({item.why})" for item in report.leftovers]
    lines += [f"not part of the cache, stays as it is: {name}" for name in _some(report.foreign)]
    if report.missing:
        some = ", ".join(_some(report.missing))
        lines.append(f"{len(report.missing):,} shards are not committed: {some}")
    return [*lines, _verdict(report, repair)]


def _some(names: list[str]) -> list[str]:
    """The first few of many."""
    more = len(names) - NAMED
    return names if more <= 0 else [*names[:NAMED], f"and {more:,} more"]


def _verdict(report: Report, repair: bool) -> str:
    command = f"`ddk-pipe verify {report.cache} --repair`"
    removable = sum(item.removable for item in report.leftovers)
    if repair:
        done = f"removed {len(report.removed)} files and folders" if report.removed else "nothing to remove"
        again = "; run `ddk-pipe cache-teacher`, it makes again what is missing" if not report.sound else ""
        return f"verify: {done}{again or '; the cache is sound'}"
    if report.sound:
        return "verify: the cache is sound" + (
            f"; {command} removes {removable} leftovers" if removable else ""
        )
    if not report.bad and not report.tables:
        return "verify: what is there is sound; run `ddk-pipe cache-teacher` for the rest"
    lost = len(report.bad) + len(report.undecodable)
    advice = "restore the files from a copy, or " * bool(report.tables)
    return (
        f"verify: {lost:,} shards are damaged or cannot be decoded; {advice}run {command}, which drops exactly"
        " these, then `ddk-pipe cache-teacher`, which makes them again"
    )
