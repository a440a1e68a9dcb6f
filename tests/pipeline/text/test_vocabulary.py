from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text import Split, SplitFacts, predicted_ids, tokenizer_size


def splits_with(size: int, **counts: int) -> dict[str, dict[str, Split]]:
    """One domain whose validation split holds only these ids so often, written id7=2."""
    found = np.zeros(size, np.int64)
    for name, count in counts.items():
        found[int(name.removeprefix("id"))] = count
    none = np.zeros(size, np.int64)
    return {
        "letters": {
            name: Split(Path(), None, None, which, SplitFacts())
            for name, which in (("train", none), ("validation", found))
        }
    }


def test_the_smaller_of_tokenizer_and_head(tokenizer: Any) -> None:
    size = tokenizer_size(tokenizer)
    splits = splits_with(size, id0=3, id300=1)
    assert predicted_ids(splits, tokenizer, size + 63) == size
    assert predicted_ids(splits, tokenizer, size) == size
    assert predicted_ids(splits, tokenizer, 301) == 301


@pytest.mark.parametrize(("count", "often"), [(1, "once"), (1200, "1,200 times")])
def test_an_id_beyond_the_head_is_named_with_its_domain(tokenizer: Any, count: int, often: str) -> None:
    splits = splits_with(tokenizer_size(tokenizer), id300=count, id310=5)
    token = tokenizer.convert_ids_to_tokens(300)
    with pytest.raises(DdkError) as problem:
        predicted_ids(splits, tokenizer, 300)
    assert problem.value.message == (
        f"domains.letters: its validation text holds {token!r} (id 300) {often}, the teacher knows 300 ids only"
    )
