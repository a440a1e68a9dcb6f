"""A report as one self-contained HTML page: no script, nothing from the network, every text escaped by Jinja."""

from __future__ import annotations

import importlib.resources
import re

import jinja2
from markupsafe import Markup, escape

import ddk_pipe
from ddk_pipe.stages.common import TableData, domain_rows, evaluation_tables
from ddk_pipe.stages.report.data import Report, run_facts, state_of
from ddk_pipe.stages.report.figures import INK, Picture
from ddk_pipe.stages.report.tables import answer, ranking_rows, stopped_rows


def page(report: Report, pictures: list[Picture]) -> str:
    """The whole page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = importlib.resources.files("ddk_pipe.stages.report").joinpath("page.html.j2").read_text("utf-8")
    tables = _tables(report)
    facts = {"asked": report.facts, "cache": report.cache}
    sections = [
        ("ranking", "Ranking", bool(tables["ranking"])),
        ("domains", "Domains", bool(tables["domains"])),
        ("pictures", "Pictures", bool(pictures)),
        ("evaluation", "Evaluation", bool(tables["evaluation"])),
        ("asked", "What was run", bool(report.facts)),
        ("cache", "The cache", bool(report.cache)),
        ("runs", "Every run", report.is_sweep),
    ]
    return environment.from_string(source).render(
        report=report,
        sections=[(name, title) for name, title, there in sections if there],
        states=_states(report),
        answer=answer(report),
        tables=tables,
        facts={**{name: [] for name in tables}, **facts},
        pictures=[
            {"name": picture.name, "title": picture.title, "svg": inline(picture)} for picture in pictures
        ],
        run_facts=run_facts,
        state_of=state_of,
        version=ddk_pipe.__version__,
    )


def _tables(report: Report) -> dict[str, list[TableData]]:
    domains = domain_rows(report.runs[0]) if len(report.runs) == 1 else None
    return {
        "ranking": [table for table in (ranking_rows(report), stopped_rows(report)) if table.rows],
        "domains": [domains] if domains and domains.rows else [],
        "evaluation": evaluation_tables(report.runs),
        "asked": [],
        "cache": [],
    }


def _states(report: Report) -> list[str]:
    """What a reader must know before reading on."""
    lines = []
    failed = [run for run in report.unfinished if run.error]
    unfinished = [run for run in report.unfinished if not run.error]
    if unfinished and not report.is_sweep:
        lines.append(f"Unfinished: this run stands at step {unfinished[0].step:,}.")
    elif unfinished or report.pending:
        lines.append(
            f"Unfinished: {len(unfinished)} runs are under way or were stopped, {report.pending} have not begun."
        )
    if failed:
        lines.append(f"{len(failed)} of {len(report.runs)} runs failed; see “Every run” for the reasons.")
    return lines


def inline(picture: Picture) -> Markup:
    """The SVG for the page: the text's colour is the page's, and it has a title and a description."""
    svg = picture.svg().replace(INK, "currentColor")
    svg = re.sub(r'(<svg\b[^>]*?) (?:height|width)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) (?:height|width)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    name = picture.name
    head = Markup('<title id="{0}-name">{1}</title><desc id="{0}-words">{2}</desc>').format(
        name, picture.title, picture.description
    )
    start, end = svg.split(">", 1)
    labels = f'role="img" aria-labelledby="{escape(name)}-name {escape(name)}-words"'
    return Markup(f"{start} {labels}>{head}{end}")  # matplotlib has escaped its texts
