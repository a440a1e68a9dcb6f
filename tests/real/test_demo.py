"""The demo's material and its whole path on a cut-down manifest; `make demo` runs it in full."""

from __future__ import annotations

import importlib.util
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from sweeps import SMALL, VARYING, start, wait_for
from transformers import AutoTokenizer
from typer.testing import CliRunner

import ddk_pipe
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.demo import material as demo_material
from ddk_pipe.stages.report.data import load_report

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    demo_material.write_texts(folder)
    return folder


def test_material_is_plentiful_different_and_the_same_every_time(texts: Path, tmp_path: Path) -> None:
    assert len(demo_material.DOMAINS) >= 5
    seen: set[str] = set()
    for domain in demo_material.DOMAINS:
        rows = [json.loads(line)["text"] for line in (texts / f"{domain}.jsonl").read_text().splitlines()]
        assert sum(map(len, rows)) > 60_000 and max(map(len, rows)) <= demo_material.DOCUMENT_CHARACTERS
        assert not seen & set(rows)
        seen |= set(rows)
    demo_material.write_texts(tmp_path)
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in texts.iterdir())


def test_converted_teacher_is_sane(smollm: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    for text in ("It's 10:45, isn't it?", "今天天气很好", "def f(x: int) -> list[int]:\n    return [x]\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@dataclass(frozen=True)
class Demo:
    """What `ddk-pipe demo` made of a cut-down manifest, and what it said."""

    folder: Path
    domains: list[str]
    said: str


@pytest.fixture(scope="module")
def demo(texts: Path, smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Every stage by its own command, with vLLM where it is there."""
    folder = tmp_path_factory.mktemp("small") / "demo"
    folder.mkdir()
    (folder / "text").symlink_to(texts)
    (folder / "teacher").symlink_to(smollm)
    shipped = Path(ddk_pipe.__file__).parent / "manifests" / "demo.yaml"
    values = yaml.safe_load(shipped.read_text())
    values["domains"] = dict(list(values["domains"].items())[:3])
    values["seq_len"] = 64
    values["prepare"] |= {"max_train_windows": 12, "max_validation_windows": 2}
    values["student"] = {"keep_layers": [0, 1, 29]}
    values["distill"] |= {"steps": 6, "batch_tokens": 256, "interval_steps": 3}
    values["teacher"]["model"] = str(smollm)
    values["cache"]["shard_windows"] = 128
    for domain in values["domains"]:
        values["domains"][domain] = {"train": str(texts / f"{domain}.jsonl")}
    (folder / "manifest.yaml").write_text(yaml.safe_dump(values))
    first = CliRunner().invoke(app, ["demo", "--folder", str(folder)])
    assert first.exit_code == 0, first.output
    return Demo(folder, list(values["domains"]), first.output)


def test_the_whole_demo_small(demo: Demo) -> None:
    """Its numbers; then once more, which does nothing."""
    summary = json.loads((demo.folder / "summary.json").read_text())
    assert set(summary["domains"]) == set(demo.domains)
    for facts in summary["domains"].values():
        assert set(facts) == {
            "teacher_ce",
            "student_ce_first",
            "student_ce_last",
            "weight_first",
            "weight_last",
        }
    assert summary["gap_last"] < summary["gap_first"]
    assert summary["cache"]["bytes_per_position"] > 0
    assert set(summary["seconds"]) == {"prepare", "cache_teacher", "distill"}
    if importlib.util.find_spec("vllm"):
        assert summary["cache"]["backend"] == "vllm"
    assert "mean validation gap" in demo.said
    before = {path: path.stat().st_mtime_ns for path in (demo.folder / "cache").rglob("*")}
    second = CliRunner().invoke(app, ["demo", "--folder", str(demo.folder)])
    assert second.exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (demo.folder / "cache").rglob("*")}
    assert json.loads((demo.folder / "summary.json").read_text()) == summary


def test_four_students_from_the_demos_cache(demo: Demo, smollm: Path) -> None:
    """Two rules times two seeds, with the teacher's folder out of reach and the import guard on; one sweep is killed."""
    manifest = without_teacher(demo.folder, smollm)
    grid = {"grid": {"distill.mixing": ["ddk", "uniform"]}, "seeds": [0, 1]}
    undisturbed, killed = (write_sweep(manifest, name=name, **grid) for name in ("undisturbed", "killed"))
    finish(undisturbed)
    expected = rows_of(demo.folder, "undisturbed")
    assert [row["status"] for row in expected] == ["finished"] * 4
    assert len({row["gap_nats"] for row in expected}) == 4

    child = start("sweep", killed, OMP_NUM_THREADS="2")
    wait_for(lambda: list((demo.folder / "distill").glob("killed.*/run.json")))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = {path: path.stat().st_mtime_ns for path in (demo.folder / "distill").glob("killed.*/run.json")}
    assert 1 <= len(done) < 4
    said = finish(killed)
    assert f"{len(done)} of 4 runs are finished" in said
    assert {path: path.stat().st_mtime_ns for path in done} == done  # not repeated
    assert rows_of(demo.folder, "killed") == expected

    assert CliRunner().invoke(app, ["report", str(killed)]).exit_code == 0
    page = (demo.folder / "sweeps/killed/report.html").read_text()
    assert [group.name for group in load_report(killed).groups] == ranked(expected)
    assert f"Best: {ranked(expected)[0]}, mean validation gap" in page and "4 of 4 finished" in page


def without_teacher(folder: Path, smollm: Path) -> Path:
    """A manifest over the demo's cache that knows no teacher but its tokenizer; small students of fresh weights."""
    AutoTokenizer.from_pretrained(smollm).save_pretrained(folder / "tokenizer")
    values = yaml.safe_load((folder / "manifest.yaml").read_text())
    values["teacher"]["model"] = "/nowhere"
    values["tokenizer"] = "tokenizer"
    values["student"] = {"config": SMALL}
    values["distill"] |= {"steps": 4, "interval_steps": 2, "batch_tokens": 128}
    (folder / "students.yaml").write_text(yaml.safe_dump(values))
    return folder / "students.yaml"


def write_sweep(manifest: Path, *, name: str, **values: Any) -> Path:
    path = manifest.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump({"manifest": manifest.name, **values}))
    return path


def finish(file: Path) -> str:
    """Run a sweep to its end; returns what it said."""
    child = start("sweep", file, OMP_NUM_THREADS="2")
    out, err = child.communicate(timeout=400)
    assert child.returncode == 0, err
    return out + err


def rows_of(output: Path, name: str) -> list[dict[str, Any]]:
    """A sweep's table without its runs' names and what clocks say."""
    rows = pq.read_table(output / "sweeps" / name / "results.parquet").to_pylist()
    return [{key: value for key, value in row.items() if key not in ("run", *VARYING)} for row in rows]


def ranked(rows: list[dict[str, Any]]) -> list[str]:
    """Groups by their mean gap."""
    gaps: dict[str, list[float]] = {}
    for row in rows:
        gaps.setdefault(row["group"], []).append(row["gap_nats"])
    return sorted(gaps, key=lambda group: sum(gaps[group]))
