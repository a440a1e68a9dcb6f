"""`ddk-pipe inspect`: what a folder that we wrote holds, in one screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import is_url, open_folder
from ddk_pipe.stages.common import load_run, new_table, perplexity, terminal
from ddk_pipe.stages.inspect.cache import cache_tables


def inspect(place: str) -> None:
    """Print tables about the tokens, caches and runs in a folder, or the cache at a URL.

    Raises DdkError if there is none.
    """
    console = terminal()
    found = False
    for shown in cache_tables(open_folder(place)) if is_url(place) else _tables(Path(place)):
        console.print(shown)
        found = True
    if not found:
        raise DdkError(
            f"{place}: no tokens, cache or run of ddk-pipe", hint="name an output folder or a part of one"
        )


def _tables(path: Path) -> Iterator[Table]:
    if (path / "cache.json").is_file():
        yield from cache_tables(open_folder(path))
    elif (path / "steps.jsonl").is_file():
        yield from _run(path)
    elif splits := _splits(path):
        yield _tokens(path, splits)
    else:
        for part in ("tokens", "cache"):
            if (path / part).is_dir():
                yield from _tables(path / part)
        for run in sorted((path / "distill").glob("*")):
            yield from _tables(run)


def _splits(path: Path) -> list[Path]:
    """Prepared splits in `path`: itself, a domain's two, or all of a tokens folder."""
    candidates = [path, *sorted(path.glob("*")), *sorted(path.glob("*/*"))]
    return [
        folder
        for folder in candidates
        if (folder / "zarr.json").is_file() and (folder / "loss_mask").is_dir()
    ]


def _tokens(path: Path, splits: list[Path]) -> Table:
    from ddk_pipe.pipeline.text import open_split

    out = new_table(
        f"tokens {path}", "split", "documents", "windows", "seq_len", "tokens", "labels", "bytes/token"
    )
    for folder in splits:
        split = open_split(folder)
        facts = split.facts
        out.add_row(
            escape("/".join(folder.parts[-2:])),
            f"{facts.documents:,}",
            f"{facts.windows:,}",
            str(split.tokens.shape[1]),
            f"{facts.tokens:,}",
            f"{facts.labels:,}",
            f"{facts.text_bytes / max(facts.tokens, 1):.2f}",
        )
    return out


def _run(path: Path) -> Iterator[Table]:
    run = load_run(path)
    steps, validation = run.steps, run.validation
    facts = new_table(f"run {path}", "what", "value")
    facts.add_row("state", "finished" if run.finished else "unfinished")
    facts.add_row("steps", f"{steps[-1]['step'] if steps else 0:,}")
    if steps:
        facts.add_row("loss, first and last", f"{steps[0]['loss']:.3f}, {steps[-1]['loss']:.3f} nats/token")
        facts.add_row("tokens/s", f"{sum(row['tokens_per_second'] for row in steps) / len(steps):,.0f}")
    if run.summary:
        facts.add_row("parameters", f"{run.summary['parameters']:,}")
        facts.add_row("student", escape(str(path / "student")))
    yield facts
    if validation:
        yield domain_table("domains: perplexity on validation windows, and weights", summarise(validation))


def summarise(validation: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """First and last row of each domain as teacher_ce, student_ce_*, weight_* (nats/token; shares)."""
    out: dict[str, dict[str, float]] = {}
    for row in validation:
        facts = out.setdefault(
            row["domain"],
            {
                "teacher_ce": row["teacher_ce"],
                "student_ce_first": row["student_ce"],
                "weight_first": row["weight"],
            },
        )
        facts["student_ce_last"], facts["weight_last"] = row["student_ce"], row["weight"]
    return out


def domain_table(title: str, domains: dict[str, dict[str, float]]) -> Table:
    """Perplexities and weights per domain."""
    out = new_table(
        title, "domain", "teacher", "student before", "student after", "first weight", "last weight"
    )
    for name, facts in domains.items():
        out.add_row(
            escape(name),
            *(
                f"{perplexity(facts[key]):,.2f}"
                for key in ("teacher_ce", "student_ce_first", "student_ce_last")
            ),
            *(f"{facts[key]:.3f}" for key in ("weight_first", "weight_last")),
        )
    return out
