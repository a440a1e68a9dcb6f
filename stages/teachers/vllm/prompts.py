"""Windows as prompts of vLLM, one a document, and the documents' selections put together again.

A prompt is a document without its last token, whose position has no label: the one token that vLLM always generates takes
its place, and a window may be as long as the model's context. Documents without a label (filling) are not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.models import spans_from
from ddk_pipe.pipeline.targets import Plan, Selected, join, select_logits
from ddk_pipe.stages.teachers.protocol import Window


@dataclass(frozen=True)
class Prompt:
    """A document [first, first + len(tokens)) of the window `key`, which has `positions`: tokens and labels int64."""

    key: str
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    first: int
    positions: int


def prompts_of(window: Window) -> list[Prompt]:
    """Those of its documents that have a label, in order."""
    spans = [slice(0, len(window.tokens))] if window.starts is None else spans_from(window.starts)
    return [
        Prompt(window.key, window.tokens[span], window.labels[span], span.start, len(window.tokens))
        for span in spans
        if (window.labels[span] >= 0).any()
    ]


def put_together(
    window: Window, prompts: Sequence[Prompt], found: Sequence[Selected], plan: Plan
) -> Selected:
    """The selections of its prompts as one of the window; what lies between them says nothing."""
    parts, at = [], 0
    for prompt, selected in zip(prompts, found, strict=True):
        if at < prompt.first:
            parts.append(_silent(prompt.first - at, plan))
        parts.append(selected)
        at = prompt.first + len(prompt.tokens)
    if at < len(window.tokens):
        parts.append(_silent(len(window.tokens) - at, plan))
    return join(parts)


def _silent(positions: int, plan: Plan) -> Selected:
    """As any position without a label is."""
    nothing = torch.empty(len(plan.temperatures), positions, 0)
    return select_logits(torch.zeros(positions, 1), torch.full((positions,), -1), plan, nothing)
