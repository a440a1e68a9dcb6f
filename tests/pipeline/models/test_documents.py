"""A document in a window gives the hidden states that it gives alone, whatever the architecture."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, Architecture, make_teacher
from torch import Tensor
from transformers import AutoModelForCausalLM

from ddk_pipe.pipeline.models import (
    Documents,
    decoder_of,
    hidden_states,
    keeps_documents_apart,
    stack_starts,
)
from ddk_pipe.pipeline.models.documents import _of_like_length

VOCAB, SEQ_LEN = 64, 24
BY_KIND = {"qwen2": Architecture("qwen2"), **{each.name: each for each in ARCHITECTURES}}
APART = ["llama", "qwen2", "mistral", "gemma3_text", "gpt2"]  # by themselves
TOGETHER = ["mamba", "bamba", "bloom", "llama4_text"]  # recurrent, hybrid, older code, chunks of a row


def built(kind: str, folder: Path, **options: Any) -> Any:
    make_teacher(BY_KIND[kind], folder, vocab_size=VOCAB)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def material() -> tuple[Tensor, Documents]:
    """Two windows of several documents, one of them a single token."""
    starts = np.zeros((2, SEQ_LEN), bool)
    starts[0, [0, 5, 6, 17]] = True
    starts[1, [0, 13]] = True
    documents = Documents.of(starts)
    assert documents is not None
    return torch.randint(0, VOCAB, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0)), documents


def furthest(decoder: Any, tokens: Tensor, documents: Documents, found: Tensor) -> float:
    """How far any document's states are from those of the document alone, relative to the largest."""
    apart = 0.0
    for row, start, end in documents.spans:
        alone = hidden_states(decoder, tokens[row : row + 1, start:end])[0]
        apart = max(apart, float((found[row, start:end] - alone).abs().max() / alone.abs().max()))
    return apart


@pytest.mark.parametrize("kind", [*APART, *TOGETHER])
@torch.no_grad()
def test_a_document_gives_what_it_gives_alone(kind: str, tmp_path: Path) -> None:
    model = built(kind, tmp_path)
    decoder, (tokens, documents) = decoder_of(model), material()
    keeps = keeps_documents_apart(model)
    assert keeps == (kind in APART)
    found = hidden_states(decoder, tokens, documents, apart=not keeps)
    assert furthest(decoder, tokens, documents, found) <= 1e-5
    whole = hidden_states(decoder, tokens)
    assert furthest(decoder, tokens, documents, whole) > 0.1, "nothing leaks: this test would show nothing"


@torch.no_grad()
def test_also_with_eager_attention_and_in_rows_of_their_own(tmp_path: Path) -> None:
    decoder = decoder_of(built("llama", tmp_path, attn_implementation="eager"))
    tokens, documents = material()
    for apart in (False, True):
        found = hidden_states(decoder, tokens, documents, apart=apart)
        assert furthest(decoder, tokens, documents, found) <= 1e-5


@torch.no_grad()
def test_what_is_told_is_told_to_one_thread(tmp_path: Path) -> None:
    """A teacher may predict a validation window while the student is trained."""
    decoder, (tokens, documents) = decoder_of(built("llama", tmp_path)), material()
    wanted = hidden_states(decoder, tokens, documents)
    other: list[Tensor] = []
    forward = decoder.forward

    def meanwhile(**inputs: Any) -> Any:
        decoder.forward = forward
        thread = threading.Thread(target=lambda: other.append(hidden_states(decoder, tokens).clone()))
        thread.start()
        thread.join()
        return forward(**inputs)

    decoder.forward = meanwhile
    assert torch.equal(hidden_states(decoder, tokens, documents), wanted)
    assert torch.equal(other[0], hidden_states(decoder, tokens))
    assert not torch.equal(other[0], wanted)


def test_what_is_told_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking, transformers has the host wait for the device; others' calls find what they found."""
    from transformers import masking_utils

    decoder, (tokens, documents) = decoder_of(built("llama", tmp_path)), material()
    looked: list[Tensor] = []
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda position_ids: looked.append(position_ids)
    )
    hidden_states(decoder, tokens, documents)
    hidden_states(decoder, tokens)
    assert not looked
    decoder(input_ids=tokens, position_ids=documents.positions, use_cache=False)
    assert len(looked) == 1


def test_windows_of_one_document_each_need_no_mask() -> None:
    whole = np.arange(SEQ_LEN) == 0
    assert Documents.of(None) is None and Documents.of(np.stack([whole, whole])) is None
    assert stack_starts([None, None], SEQ_LEN) is None
    two = whole.copy()
    two[7] = True
    stacked = stack_starts([None, two], SEQ_LEN)
    assert stacked is not None and np.array_equal(stacked, np.stack([whole, two]))


def test_rows_of_their_own_come_to_no_more_tokens_than_the_windows() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 50)
    spans = tuple((0, 0, int(length)) for length in lengths)
    groups = list(_of_like_length(spans, 100))
    assert sorted(span for group in groups for span in group) == sorted(spans)
    assert all(len(group) * max(end for _, _, end in group) <= 100 for group in groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_is_right_in_16_bits_too_and_leaves_no_trace(dtype: torch.dtype, tmp_path: Path) -> None:
    for kind in ("llama", "mamba"):
        model = built(kind, tmp_path / kind).to(dtype).train()
        before = torch.get_rng_state()
        assert keeps_documents_apart(model) == (kind == "llama")
        assert model.training and torch.equal(torch.get_rng_state(), before)
