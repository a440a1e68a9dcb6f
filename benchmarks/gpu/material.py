"""A project drawn at random: a vocabulary of made-up words, text of them, a teacher whose predictions are peaked.

Random weights take the time that trained ones take; what a trained teacher would add is its peaks, on which depends
how many ids a row keeps, so the final norm is scaled until logits have the spread that gives them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row

LOGIT_SPREAD = (
    5.0  # standard deviation: of 131,072 tokens the first has 0.38, and pps at 0.02 keeps 23, computed
)
STANDARD = 0.02  # of random weights, by transformers' default


@dataclass(frozen=True)
class Size:
    """How large everything is. `shape` and `student_shape`: fields of a Llama's configuration but vocabulary and length."""

    vocab: int
    seq_len: int
    windows: int  # of training, a domain
    domains: int
    batch_windows: int  # of a step, and of the teacher's batch
    micro_batch_windows: int
    shape: Row
    student_shape: Row | None = None


def llama(layers: int, width: int, inner: int, heads: int, key_value_heads: int, *, tied: bool = True) -> Row:
    """Fields of its configuration."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "tie_word_embeddings": tied,
    }


def draw_teacher(folder: Path, size: Size, device: str) -> Any:
    """The model in bfloat16 on the device, saved in `folder` with its tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    save_tokenizer(folder, size.vocab)
    config = LlamaConfig(
        vocab_size=size.vocab,
        max_position_embeddings=size.seq_len,
        initializer_range=STANDARD,
        bos_token_id=None,
        eos_token_id=0,
        **size.shape,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(LOGIT_SPREAD / (STANDARD * math.sqrt(config.hidden_size)))
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: Path, vocab: int) -> None:
    """One id a word; the first is the end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, **{f"w{n}": n for n in range(1, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def write_manifest(folder: Path, teacher: Path, size: Size, device: str) -> Path:
    """Text and a manifest of it in `folder`."""
    rng = np.random.default_rng(0)
    names = [f"domain{n}" for n in range(size.domains)]
    for name in names:
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(size.windows * 5 // 4 + 8):
                ids = np.exp(rng.random(size.seq_len) * math.log(size.vocab)).astype(
                    np.int64
                )  # as Zipf's law has it
                file.write(json.dumps({"text": " ".join(f"w{n}" for n in np.maximum(ids, 1))}) + "\n")
    manifest: Row = {
        "output": "out",
        "domains": {name: {"train": f"{name}.jsonl"} for name in names},
        "teacher": {
            "model": str(teacher),
            "backend": "hf",
            "device": device,
            "dtype": "bfloat16",
            "batch_windows": size.batch_windows,
        },
        "seq_len": size.seq_len,
        "prepare": {
            "max_train_windows": size.windows,
            "max_validation_windows": 2,
            "validation_fraction": 0.1,
        },
        "cache": {"shard_windows": 16},
        "distill": {
            "steps": 10_000,
            "interval_steps": 10_000,
            "batch_tokens": size.batch_windows * size.seq_len,
            "micro_batch_windows": size.micro_batch_windows,
            "validation_windows": 1,
            "device": device,
        },
    }
    if size.student_shape is not None:
        manifest["student"] = {
            "config": {"model_type": "llama", "vocab_size": size.vocab, **size.student_shape}
        }
    path = folder / "manifest.yaml"
    path.write_text(json.dumps(manifest), encoding="utf-8")  # JSON is YAML
    return path
