"""Real vLLM asked a document at a time: targets are those of the document alone, and those of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import select_elsewhere
from tiny import make_model

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Selected
from ddk_pipe.stages.teachers import Window

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports use what torch deprecates
]
VOCAB, SEQ_LEN, BEGIN = 385, 40, 17
TOPK = Plan("topk", 0.02, 8, 64, 20, (1.0,), 0)


def made() -> list[Window]:
    """A window of documents of 1, 2, 14 and 23 tokens; the last alone, after another first one, and seen whole."""
    rng = np.random.default_rng(0)
    tokens, other = rng.integers(0, VOCAB, SEQ_LEN), rng.integers(0, VOCAB, SEQ_LEN)
    other[BEGIN:] = tokens[BEGIN:]
    starts = np.isin(np.arange(SEQ_LEN), [0, 1, 3, BEGIN])
    labels = np.append(np.where(starts[1:], NO_LABEL, tokens[1:]), NO_LABEL)
    others = np.append(np.where(starts[1:], NO_LABEL, other[1:]), NO_LABEL)
    return [
        Window("d/train/0/0", tokens, labels, starts),
        Window("d/train/0/1", other, others, starts),
        Window("d/train/0/2", tokens[BEGIN:], labels[BEGIN:]),
        Window("d/train/0/3", other, others),
    ]


def gap(one: Selected, other: Selected) -> float:
    """Between labels' log-probabilities of the last document, nats."""
    ends = [each.label_logprobs[-(SEQ_LEN - BEGIN) :] for each in (one, other)]
    assert torch.equal(ends[0].isnan(), ends[1].isnan()) and not ends[0].isnan().all()
    return float((ends[0] - ends[1]).nan_to_num().abs().max())


@pytest.mark.parametrize("capture", ["worker", "prompt_logprobs"])
def test_a_document_is_what_it_is_alone(tmp_path: Path, need_vllm: None, capture: str) -> None:
    folder = make_model(tmp_path, vocab_size=VOCAB, hidden_size=128)
    options = manifest.VllmOptions.model_validate({"capture": capture})
    ((first, after_another, alone, seen_whole),) = select_elsewhere(
        folder, manifest.Teacher(model="m", backend="vllm", vllm=options), made(), [TOPK], vocab_size=VOCAB
    )
    ((of_hf, *_),) = select_elsewhere(
        folder, manifest.Teacher(model="m", backend="hf", batch_windows=1), made(), [TOPK], vocab_size=VOCAB
    )
    assert gap(first, alone) <= 1e-5 and gap(after_another, alone) <= 1e-5
    assert gap(first, of_hf) <= 1e-4
    assert gap(seen_whole, alone) > 0.1, "nothing leaks: this test would show nothing"
    inside = first.targets[0].ids[:-1]
    assert torch.equal(inside[:, : of_hf.targets[0].ids.shape[1]], of_hf.targets[0].ids[:-1])
