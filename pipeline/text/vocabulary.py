"""Which of a tokenizer's ids a model must know to read the prepared text."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text.encoding import tokenizer_size
from ddk_pipe.pipeline.text.windows import Split


def predicted_ids(splits: dict[str, dict[str, Split]], tokenizer: Any, head_size: int) -> int:
    """Length of the teacher's distributions over the tokenizer's ids: all of them, or those its head has.

    `head_size`: rows of the teacher's output layer. A tokenizer may have more ids (tokens that were added and the
    model never learnt): no harm where no window holds one, in or out of the loss. `splits`: by domain, then by split.
    Raises DdkError naming domain and token where a window does.
    """
    for domain, parts in splits.items():
        for split, opened in parts.items():
            counts = opened.token_counts[head_size:]
            if not counts.any():
                continue
            found = int(np.flatnonzero(counts)[0])
            token = tokenizer.convert_ids_to_tokens(head_size + found)
            raise DdkError(
                f"domains.{domain}: its {split} text holds {token!r} (id {head_size + found:,}) {_times(counts[found])}, the"
                f" teacher knows {head_size:,} ids only",
                hint="take the token out of the text, or use a teacher whose vocab_size holds it",
            )
    return min(tokenizer_size(tokenizer), head_size)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
