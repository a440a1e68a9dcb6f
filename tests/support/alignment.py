"""The truth about alignment: feed prefixes one by one, and look at what the model says about the next token."""

from __future__ import annotations

from typing import Any

import torch

from ddk_pipe.pipeline.targets import Selected

STEP = 1e-4  # float32 models: one pass over a window against one pass per prefix


def prefix_logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Row t: log-probabilities of token t+1, from the prefix that ends with token t and nothing after it."""
    rows = []
    with torch.inference_mode():
        for end in range(1, len(tokens) + 1):
            logits = model(input_ids=torch.tensor([tokens[:end]])).logits[0, -1].float()
            rows.append(torch.log_softmax(logits, 0))
    return torch.stack(rows)


def assert_aligned(
    selected: Selected, truth: torch.Tensor, labels: list[int], *, tau: float, tolerance: float
) -> None:
    """Label log-probabilities and the kept head of every position are those of the prefixes.

    Within `tolerance` of tau an entry may be in the head or not.
    """
    targets = selected.targets[0]
    for position, label in enumerate(labels):
        kept = {int(i) for i in targets.ids[position] if i >= 0}
        if label < 0:
            assert not kept and bool(selected.label_logprobs[position].isnan())
            continue
        assert abs(float(selected.label_logprobs[position] - truth[position, label])) <= tolerance, position
        p = truth[position].exp()
        surely = {int(i) for i in (p >= tau + tolerance).nonzero()}
        assert surely <= kept, position
        for token, weight in zip(
            targets.ids[position].tolist(), targets.logprobs[position].exp().tolist(), strict=True
        ):
            if token in surely:
                assert abs(weight - float(p[token])) <= 2 * tolerance, position
