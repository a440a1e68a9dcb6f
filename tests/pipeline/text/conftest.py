from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ddk_pipe.pipeline.text import Encoder


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_teacher)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, name="tiny")
