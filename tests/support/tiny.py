"""Small worlds for tests: text, a tokenizer and models of random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MakeProject = Callable[..., Path]

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b",
    "Das ist ein kurzer Satz über Wetter und Berge.",
    "To be, or not to be, that is the question.",
    "Permission is hereby granted, free of charge, to any person.",
)


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


def break_weights(teacher: Path, folder: Path) -> Path:
    """A copy of a teacher whose predictions are NaN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(folder)
    return folder


def write_project(folder: Path, teacher: Path, /, **changes: Any) -> Path:
    """Two domains and a manifest in `folder`; keyword arguments replace sections of it."""
    for name, words in (("code", "return value index list"), ("plays", "king queen night crown")):
        rows = [{"text": f"{SENTENCES[i % 5]} {words} {i} {name}" * (1 + i % 3)} for i in range(60)]
        write_jsonl(folder / "text" / f"{name}.jsonl", rows)
    manifest = {
        "output": "out",
        "domains": {name: {"train": f"text/{name}.jsonl"} for name in ("code", "plays")},
        "teacher": {"model": str(teacher), "backend": "hf"},
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
    path = folder / "manifest.yaml"
    path.write_text(json.dumps(manifest), encoding="utf-8")  # JSON is YAML
    return path
