"""Windows as long as the model's context, through real vLLM: no position beyond it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import select_elsewhere, select_here

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Selected
from ddk_pipe.stages.teachers import Window

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports use what torch deprecates
]

VOCAB, CONTEXT = 385, 40
PLAN = Plan("topk", 0.05, 8, 16, 20, (1.0,), 0)


def make_model(folder: Path, kind: str) -> Path:
    """Random weights, positions of three kinds: rotary, learned, learned with an offset of 2."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "llama": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
        "opt": {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
        },
    }
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, max_position_embeddings=CONTEXT, **tokens, **sizes[kind]
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def make_windows() -> list[Window]:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCAB, CONTEXT) for _ in range(3)]
    labels = [np.append(tokens[1:], NO_LABEL) for tokens in texts]
    labels[1][-2] = NO_LABEL  # the last token is filling there
    return [Window(f"d/train/0/{at}", tokens, labels[at]) for at, tokens in enumerate(texts)]


def selected_by(folder: Path, backend: str, capture: str = "worker") -> list[Selected]:
    options = manifest.Teacher(
        model="m", backend=backend, dtype="float32", vllm=manifest.VllmOptions(capture=capture)
    )
    select = select_here if backend == "hf" else select_elsewhere
    return select(folder, options, make_windows(), [PLAN], vocab_size=VOCAB)[0]


@pytest.mark.parametrize(
    ("kind", "capture"),
    [("llama", "worker"), ("llama", "prompt_logprobs"), ("gpt2", "worker"), ("opt", "prompt_logprobs")],
)
def test_windows_of_the_whole_context(need_vllm: None, tmp_path: Path, kind: str, capture: str) -> None:
    """The last labelled position too: its label is the token that is not in the prompt."""
    folder = make_model(tmp_path, kind)
    for window, ours, theirs in zip(
        make_windows(), selected_by(folder, "hf"), selected_by(folder, "vllm", capture), strict=True
    ):
        labelled = torch.from_numpy(window.labels >= 0)
        assert torch.equal(ours.label_logprobs.isnan(), ~labelled)
        assert torch.allclose(ours.label_logprobs, theirs.label_logprobs, atol=5e-4, equal_nan=True)
        one, other = ours.targets[0], theirs.targets[0]
        same = (one.ids == other.ids).all(1)
        assert same.float().mean() > 0.9, "but for ties at the edge of the 16 largest"
        assert torch.allclose(one.logprobs[same], other.logprobs[same], atol=5e-4)
        assert torch.equal((other.ids >= 0).any(1), labelled)
