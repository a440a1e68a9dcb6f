"""The demo's material and its whole path on a cut-down manifest; `make demo` runs it in full."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import ddk_pipe
from ddk_pipe.stages import demo_material
from ddk_pipe.stages.cli import app

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


def test_the_whole_demo_small(texts: Path, smollm: Path, tmp_path: Path) -> None:
    """Every stage by its own command, with vLLM where it is there; then once more, which does nothing."""
    folder = tmp_path / "demo"
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
    runner = CliRunner()
    first = runner.invoke(app, ["demo", "--folder", str(folder)])
    assert first.exit_code == 0, first.output
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["domains"]) == set(values["domains"])
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
    assert "mean validation gap" in first.output
    before = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*")}
    second = runner.invoke(app, ["demo", "--folder", str(folder)])
    assert second.exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*")}
    assert json.loads((folder / "summary.json").read_text()) == summary
