"""Tokenizers: the fast one of a folder or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, reason
from ddk_pipe.pipeline.models.configs import be_quiet
from ddk_pipe.pipeline.models.files import check_pointers


def load_tokenizer(name: str, *, field: str, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a folder or hub id; raises DdkError if there is none."""
    from transformers import AutoTokenizer

    be_quiet()
    if Path(name).is_dir():
        check_pointers(Path(name), ["*.json", "*.model", "*.jinja", "*.txt"], field=field)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as problem:  # noqa: BLE001 - missing files, wrong JSON, no network
        raise DdkError(
            f"{field}: no tokenizer at {name} ({reason(problem)})", hint="set tokenizer in the manifest"
        ) from None
    if not tokenizer.is_fast:
        raise DdkError(
            f"{field}: {name} has no fast tokenizer", hint="convert it with the tokenizers library"
        )
    return tokenizer


def tokenizer_of_model(folder: Path, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer beside a model's weights, None if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return load_tokenizer(str(folder), field="teacher.model", trust_remote_code=trust_remote_code)
