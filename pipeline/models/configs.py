"""What a model's configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, reason


def be_quiet() -> None:
    """No progress bars of transformers between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def read_config(folder: Path, *, field: str, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model folder; raises DdkError if it cannot be read."""
    from transformers import AutoConfig

    be_quiet()
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as problem:  # noqa: BLE001 - wrong JSON, unknown architecture, refused remote code
        if not trust_remote_code and "trust_remote_code" in str(problem):
            section = field.rpartition(".")[0]
            raise DdkError(
                f"{field}: {folder} needs code that comes with it, and that is not run unasked",
                hint=f"read its .py files, then set {section}.trust_remote_code: true"
                if section
                else "use a model of an architecture that transformers knows",
            ) from None
        raise DdkError(
            f"{field}: {folder}/config.json cannot be used ({reason(problem)})", hint="mend it"
        ) from None


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model (multi-modal ones nest it)."""
    return config.get_text_config()


def check_length(config: Any, seq_len: int, *, field: str) -> None:
    """Raises DdkError if the model cannot take windows of seq_len tokens."""
    longest = getattr(text_config(config), "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise DdkError(
            f"seq_len {seq_len} is beyond {field}'s {longest} positions", hint=f"set seq_len <= {longest}"
        )
