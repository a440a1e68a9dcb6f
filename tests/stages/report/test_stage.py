"""The report of runs and sweeps: its figures, its words, and the page in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.metrics import Record
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.report import report
from ddk_pipe.stages.report.data import load_report, standard_error
from ddk_pipe.stages.report.tables import answer

EVIL = "<script>alert(1)</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    domains: tuple[str, ...] = ("code", "plays"),
    steps: int = 20,
    gap: float = 1.0,
) -> Path:
    """A finished run's record, as distill writes it; the numbers are made up."""
    record = Record(folder, last_step=-1)
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 64 * step, "loss": 9 - step / steps, "ce": 8 - step / steps}
        record.add(
            "steps", {**row, "target_ce": 5.0, "learning_rate": 1e-3, "tokens_per_second": 100.0 + step}
        )
    for step in range(0, steps + 1, 5):
        for place, domain in enumerate(domains):
            ours = gap + place / 10 + seed / 100 + (steps - step) / steps
            values = {"student_ce": 2 + ours, "teacher_ce": 2.0, "gap": ours, "weight": 1 / len(domains)}
            record.add("validation", {"step": step, "domain": domain, **values})
    record.publish()
    summary: dict[str, Any] = {
        "settings": "5e77",
        "steps": steps,
        "tokens": 64 * steps,
        "seconds": 2.0,
        "tokens_per_second": 100.0,
    }
    summary |= {"parameters": 1000, "cache_fingerprint": "f1", "versions": {"ddk_pipe": "0"}}
    (folder / "run.json").write_text(json.dumps(summary))
    return folder


def write_sweep(output: Path, groups: dict[str, float], seeds: int = 2, **options: Any) -> Path:
    """A sweep's folder: each group's gap, the same for all seeds but for a hundredth."""
    runs = [
        {"name": f"run{place}-s{seed}", "group": group, "seed": seed, "overrides": [f"distill.seed={seed}"]}
        for place, group in enumerate(groups)
        for seed in range(seeds)
    ]
    for run in runs:
        folder = output / "distill" / str(run["name"])
        write_run(folder, seed=int(str(run["seed"])), gap=groups[str(run["group"])], **options)
    record = {
        "name": "rules",
        "file": "rules.yaml",
        "manifest": "m.yaml",
        "command": "ddk-pipe sweep rules.yaml",
    }
    place = output / "sweeps" / "rules"
    place.mkdir(parents=True)
    (place / "sweep.json").write_text(json.dumps({**record, "runs": runs, "versions": {"ddk_pipe": "0"}}))
    return place


class Tags(HTMLParser):
    """Names of all elements, and what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href") and not str(value).startswith("#"):
                self.loads.append(str(value))


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = report(write_run(tmp_path / "out/distill/student"))
    text = path.read_text()
    for expected in ("2.050 → 1.050 nats/token after 20 steps", "Domain weights", "f1", "5e77", "20.09"):
        assert expected in text, expected
    assert "not at hand" in text  # the cache: a report needs none
    shown = capsys.readouterr().out
    assert "2.050 → 1.050" in shown and "code" in shown
    tags = Tags(text)
    assert tags.loads == [] and "script" not in tags.seen and tags.seen.count("svg") == 8
    assert len(tags.ids) == len(set(tags.ids))
    assert text.count('role="img"') == 8 and text.count("<desc") == 8


def test_ranking_is_by_mean_with_errors_and_pairs(tmp_path: Path) -> None:
    found = load_report(write_sweep(tmp_path / "out", {"worse": 1.0, "best": 0.5, "worst": 2.0}, seeds=3))
    assert [group.name for group in found.groups] == ["best", "worse", "worst"]
    best, worse, _ = found.groups
    assert best.gap == pytest.approx(0.56) and best.difference is None
    assert best.gap_error == pytest.approx(0.01 / 3**0.5)
    assert worse.difference == pytest.approx(0.5) and worse.pairs == 3
    assert worse.difference_error == pytest.approx(0, abs=1e-9)  # seed by seed they differ by the same
    assert standard_error([1.0]) is None


def test_says_when_seeds_cannot_tell(tmp_path: Path) -> None:
    place = write_sweep(tmp_path / "out", {"a": 1.0, "b": 1.01})
    assert "worse (2 pairs)." in answer(load_report(place))
    validation = tmp_path / "out/distill/run1-s0/validation.jsonl"
    rows = [json.loads(line) for line in validation.read_text().splitlines()]
    validation.write_text("".join(json.dumps({**row, "gap": row["gap"] + 0.1}) + "\n" for row in rows))
    assert "which these seeds cannot tell from nothing" in answer(load_report(place))


@pytest.mark.slow
def test_fifty_runs_stay_small_and_names_are_text(tmp_path: Path) -> None:
    groups = {f"{EVIL} $x$ & {place}": place / 10 for place in range(25)}
    domains = (EVIL, "b" * 64, *"cdefgh")
    place = write_sweep(tmp_path / "out", groups, domains=domains, steps=500)
    (path,) = report(place)
    text = path.read_text()
    assert len(text.encode()) < 5_000_000
    assert EVIL not in text and "&lt;script&gt;" in text
    assert "script" not in Tags(text).seen
    assert text.count("<details>") == 50 and "--set distill.seed=1" in text


def test_unfinished_failed_and_pending(tmp_path: Path) -> None:
    run = write_run(tmp_path / "out/distill/student")
    (run / "run.json").unlink()
    assert "Unfinished: this run stands at step 20." in report(run)[0].read_text()
    (run / "validation.jsonl").write_text("")
    assert "No validation has been recorded yet." in report(run)[0].read_text()
    (run / "steps.jsonl").write_text("")
    assert "stands at step 0" in report(run)[0].read_text()

    sweep = write_sweep(tmp_path / "two/out", {"a": 1.0, "b": 2.0})
    distill = tmp_path / "two/out/distill"
    shutil.rmtree(distill / "run0-s1")
    (distill / "run1-s0/run.json").unlink()
    (sweep / "runs").mkdir()
    (sweep / "runs/run1-s0.json").write_text(json.dumps({"status": "failed", "error": f"{EVIL} broke"}))
    text = report(sweep)[0].read_text()
    assert (
        "1 have not begun" in text and "1 of 3 runs failed" in text and "broke" in text and EVIL not in text
    )


def test_pictures_as_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "out/distill/student")
    files = report(run, kind="png", out=tmp_path / "png")
    assert len(files) == 8 and all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    files = report(run, kind="svg")
    assert {path.parent for path in files} == {run / "pictures"}
    assert all(path.read_text().startswith("<svg") for path in files)


def test_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "out/distill/student")
    with pytest.raises(DdkError, match="--format pdf: unknown; use one of html, png, svg"):
        report(run, kind="pdf")
    with pytest.raises(
        DdkError, match=r"neither a run nor a sweep; name one of its parts, .*distill/student"
    ):
        report(tmp_path / "out")
    (run / "run.json").write_text("{")
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 2 and "damaged" in done.stderr


# --- in a real browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, of the system; it needs no network."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `make setup`")
    with sync_api.sync_playwright() as play:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = write_run(
        folder / "a/out/distill/student",
        gap=8.0,
        domains=(EVIL, "plays", "a_domain_with_a_long_name_of_40_letters"),
    )
    groups = {
        "mixing=ddk": 0.5,
        "mixing=near": 0.5001,
        f"mixing={EVIL}": 0.7,
        "mixing=uniform, keep_layers=[0, 1, 2, 3, 4, 5, 6, 7]": 1.0,
    }
    sweep = write_sweep(folder / "b/out", groups, seeds=3)
    return {"run": report(run)[0], "sweep": report(sweep)[0]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "sweep"])
@pytest.mark.parametrize(("width", "scheme"), [(380, "dark"), (1600, "light")])
def test_page_in_chromium(
    browser: Any, pages: dict[str, Path], kind: str, width: int, scheme: str, request: pytest.FixtureRequest
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append("a dialog opened"))
    wanted: list[str] = []
    page.on("request", lambda asked: wanted.append(asked.url))
    page.goto(pages[kind].as_uri())
    assert said == [] and wanted == [pages[kind].as_uri()]

    figures = page.query_selector_all("figure")
    assert len(figures) >= 4
    for figure in figures:
        drawn = figure.evaluate(MARKS)
        assert drawn and max(drawn) > 4, figure.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # no sideways scrolling of the page
    smallest = page.evaluate(SMALLEST_TEXT)
    assert smallest >= 9, f"text of {smallest} px in a picture"
    assert page.evaluate(CONTRAST) >= 4.5
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(OVERLAPPING) == []
    focused = walk(page)
    assert focused[0].startswith("A#main") and any(name.startswith("DIV") for name in focused)
    if kind == "sweep":
        assert focused.count("SUMMARY") == 12
        page.focus("summary")
        page.keyboard.press("Enter")
        assert page.locator("details[open] code").first.is_visible()
    if folder := os.environ.get("DDK_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{kind}-{width}-{scheme}.png", full_page=True)
    page.close()


def walk(page: Any) -> list[str]:
    """What Tab reaches, in order."""
    names: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "(e => e === document.body ? '' : e.tagName + (e.hash || ''))(document.activeElement)"
        )
        if not name:
            break
        names.append(name)
    return names


MARKS = """figure => [...figure.querySelectorAll('g[id*="mark-"]')].map(mark => {
    const box = mark.getBoundingClientRect(); return Math.max(box.width, box.height); })"""
SMALLEST_TEXT = """() => Math.min(...[...document.querySelectorAll('figure svg text')].map(text => {
    const scale = text.getScreenCTM(); return parseFloat(getComputedStyle(text).fontSize) * Math.abs(scale.a || scale.b); }))"""
OVERLAPPING = """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    return boxes.flatMap(([name, a], place) => boxes.slice(place + 1).filter(([_, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
        .map(([other]) => [name, other])); })"""
CUT_OFF = """() => [...document.querySelectorAll('figure svg text')].filter(text => {
    const box = text.getBoundingClientRect(), all = text.ownerSVGElement.getBoundingClientRect();
    return box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1;
    }).map(text => text.textContent)"""
CONTRAST = """() => {
    const light = colour => { const part = colour.match(/[0-9.]+/g).slice(0, 3).map(v => { v /= 255;
        return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
        return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2]; };
    const ground = light(getComputedStyle(document.querySelector('figure')).backgroundColor);
    return Math.min(...[...document.querySelectorAll('figure svg text, figcaption')].map(text => {
        const style = getComputedStyle(text);
        const ink = light(text.tagName === 'text' ? style.fill : style.color);
        return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05); })); }"""
