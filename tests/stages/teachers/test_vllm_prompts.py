"""Windows as prompts, and back: the selection of a window is that of its documents, each at its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.targets import NO_LABEL, Plan, select_logits
from ddk_pipe.stages.teachers import Window
from ddk_pipe.stages.teachers.vllm.prompts import prompts_of, put_together
from ddk_pipe.stages.teachers.vllm.worker import Collector, pack, unpack

VOCAB, LENGTH = 70, 20
HEAD = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
HIDDEN = torch.randn(LENGTH, 8, generator=torch.Generator().manual_seed(1))


def make_window(begins: set[int], silent: set[int] | None = None) -> Window:
    """Documents at these places; without a label at `silent` ones."""
    starts = np.isin(np.arange(LENGTH), [0, *begins])
    tokens = np.arange(LENGTH) + 5
    labels = np.append(np.where(starts[1:], NO_LABEL, tokens[1:]), NO_LABEL)
    labels[sorted(silent or set())] = NO_LABEL
    return Window("d/train/0/3", tokens, labels, starts)


@given(st.sets(st.integers(1, LENGTH - 1)), st.sets(st.integers(0, LENGTH - 1)))
@settings(max_examples=40, deadline=None)
def test_documents_put_together_are_what_the_whole_window_would_give(
    begins: set[int], silent: set[int]
) -> None:
    """Byte for byte, with the draws of each place: what tells rows apart is their hidden states alone."""
    plan, window = Plan("pps", 0.05, 8, 64, 20, (1.0, 2.0), 0), make_window(begins, silent)
    collector, found = Collector(plan, VOCAB), []
    prompts = prompts_of(window)
    for number, prompt in enumerate(prompts):
        assert (prompt.labels >= 0).any()
        inside = slice(prompt.first, prompt.first + len(prompt.tokens))
        assert prompt.tokens.tolist() == window.tokens[inside].tolist()
        collector.expect(str(number), prompt.key, prompt.labels.tobytes(), prompt.first, prompt.positions)
        collector.add(f"{number}-0123abcd", 0, HIDDEN[inside][:-1], lambda hidden: hidden @ HEAD)
        found.append(unpack(collector.take()["done"][str(number)]))
    together = put_together(window, prompts, found, plan)
    uniforms = torch.from_numpy(plan.uniforms(window.key, LENGTH))
    whole = select_logits(HIDDEN @ HEAD, torch.from_numpy(window.labels), plan, uniforms)
    assert torch.allclose(together.label_logprobs, whole.label_logprobs, atol=1e-5, equal_nan=True)
    assert all(a.ids.equal(b.ids) for a, b in zip(together.targets, whole.targets, strict=True))
    assert all(a.head.equal(b.head) for a, b in zip(together.kept, whole.kept, strict=True))


def test_what_has_no_label_is_not_asked() -> None:
    window = make_window({3, 4, 15}, silent=set(range(15, LENGTH)))
    assert [(prompt.first, len(prompt.tokens)) for prompt in prompts_of(window)] == [(0, 3), (4, 11)]


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk", "random"])
def test_a_window_that_is_seen_whole_is_one_prompt_and_one_without_labels_none(scheme: str) -> None:
    plan = Plan(scheme, 0.05, 8, 6, 20, (1.0,), 0)
    window = make_window(set())
    (prompt,) = prompts_of(Window(window.key, window.tokens, window.labels))
    assert (prompt.first, prompt.positions, len(prompt.tokens)) == (0, LENGTH, LENGTH)
    nothing = make_window({5}, silent=set(range(LENGTH)))
    assert prompts_of(nothing) == []
    uniforms = torch.from_numpy(plan.uniforms("k", LENGTH))
    silent = select_logits(torch.zeros(LENGTH, VOCAB), torch.full((LENGTH,), NO_LABEL), plan, uniforms)
    assert pack(put_together(nothing, [], [], plan)) == pack(silent)
