"""What a few windows tell before the teacher sees all of them: which ids it keeps, and what a cache would cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Ranks, Selected
from ddk_pipe.pipeline.text import Split, labels_of
from ddk_pipe.stages.teachers import Teacher, Window

SAMPLE_TOKENS = 16_384  # of a domain: more no longer changes its rank table much
SAMPLE_SHARE = 32  # and at most one window in so many, so that a small cache does not pay twice
TEXT_SHARE = 0.1  # weight of the training text beside what the teacher keeps


def sample_windows(name: str, split: Split, count: int) -> list[Window]:
    """`count` windows (all, if there are fewer) spread evenly over a split."""
    numbers = np.unique(np.linspace(0, split.facts.windows - 1, count).round().astype(int))
    windows = []
    for number in numbers.tolist():
        tokens, loss_mask = split.window(slice(number, number + 1))
        labels = labels_of(tokens, loss_mask, no_label=NO_LABEL)
        windows.append(Window(f"sample/{name}/{number}", tokens[0], labels[0], split.starts(number)))
    return windows


def fit_ranks(
    teacher: Teacher, name: str, split: Split, plan: Plan, *, vocab_size: int, batch_windows: int
) -> Ranks:
    """A domain's rank table: ids in falling order of how often the teacher keeps them on a few training windows.

    Ids it kept nowhere follow in the order of the training text, which counts a tenth. Against a table of the text
    alone this saves 2 to 3% of the ids' bytes where the text is long, more where it is short.
    """
    share = -(-split.facts.windows // SAMPLE_SHARE)
    windows = sample_windows(name, split, max(1, min(SAMPLE_TOKENS // split.tokens.shape[1], share)))
    kept = np.zeros(vocab_size)
    for start in range(0, len(windows), batch_windows):
        kept += kept_counts(teacher.select(windows[start : start + batch_windows], plan), vocab_size)
    return ranks_of(kept, split)


def ranks_of(kept: NDArray[np.float64], split: Split) -> Ranks:
    """The rank table from how often each id was kept, float64 [vocab_size], and from the training text."""
    text = np.zeros(len(kept))
    known = min(len(kept), len(split.token_counts))  # a tokenizer may have more ids than its teacher
    text[:known] = split.token_counts[:known]
    return Ranks.fit(kept + TEXT_SHARE * max(kept.sum(), 1.0) * text / max(text.sum(), 1.0))


def kept_counts(selected: list[Selected], vocab_size: int) -> NDArray[np.float64]:
    """How often each id is among the targets, float64 [vocab_size]."""
    counts = np.zeros(vocab_size)
    for targets in (targets for window in selected for targets in window.targets):
        ids = targets.ids.cpu().numpy()
        counts += np.bincount(ids[ids >= 0], minlength=vocab_size)
    return counts
