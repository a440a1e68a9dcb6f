"""Model folders: found, checked and fingerprinted without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable

if TYPE_CHECKING:
    from torch import Tensor

PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-3  # relative to the largest logit
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def be_quiet() -> None:
    """No progress bars of transformers between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def model_folder(name: str, *, field: str, revision: str | None = None) -> Path:
    """The local folder of a model: `name` itself, or a snapshot of that hub id (downloaded if it must be).

    Raises DdkError if there is none, or if it holds no configuration or no safetensors weights.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith(("/", "./", "../", "~")):
            raise DdkError(f"{field}: no folder {name}", hint="mend the path")
        folder = _snapshot(name, field=field, revision=revision)
    if not (folder / "config.json").is_file():
        raise DdkError(f"{field}: {folder} holds no config.json", hint="name a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise DdkError(
            f"{field}: {folder} holds no weights (*.safetensors)",
            hint="download the weights, or save them with save_pretrained",
        )
    return folder


def _snapshot(name: str, *, field: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except Exception as problem:  # noqa: BLE001 - unknown id, no network, gated: the library has many kinds
        reason = str(problem).split("\n")[0]
        raise DdkError(
            f"{field}: {name} is neither a folder nor to be had from the Hugging Face hub ({reason})",
            hint="mend the path or id",
        ) from None


def load_tokenizer(name: str, *, field: str, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a folder or hub id; raises DdkError if there is none."""
    from transformers import AutoTokenizer

    be_quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as problem:  # noqa: BLE001 - missing files, wrong JSON, no network
        reason = str(problem).strip().split("\n")[0]
        raise DdkError(
            f"{field}: no tokenizer at {name} ({reason})", hint="set tokenizer in the manifest"
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
                hint=f"read its .py files, then set {section}.trust_remote_code: true",
            ) from None
        reason = str(problem).strip().split("\n")[0]
        raise DdkError(f"{field}: {folder}/config.json cannot be used ({reason})", hint="mend it") from None


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


def weights_digest(folder: Path) -> str:
    """Fingerprint of a model: the content of its configuration, of every weight file and of its own code.

    Code is every *.py in the folder and below it (`trust_remote_code` runs it: it says what the weights mean); hidden
    folders (.git, .cache) are no part of the model. Models without code have the digests they had before.
    """
    code = (path for path in folder.rglob("*.py") if not _is_hidden(path.relative_to(folder)))
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *sorted(code)]
    return durable.digest(
        json.dumps(
            [[path.relative_to(folder).as_posix(), durable.file_digest(path)] for path in files]
        ).encode()
    )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def head_is_plain(model: Any) -> bool:
    """True if output layer(last hidden state) is what the model's own forward returns.

    Soft-capping or scaling between the two (Gemma, Cohere, Granite) makes it False: such a model's logits
    cannot be formed in blocks by its output layer alone.
    """
    return forward_ends_in(model, model.get_output_embeddings())


def forward_ends_in(model: Any, last: Callable[[Tensor], Tensor]) -> bool:
    """True if `last`(last hidden states [1, N, d]) -> [1, N, V] is what the model's own forward returns.

    Tried on eight tokens.
    """
    import torch

    vectors = model.get_input_embeddings().weight
    with torch.inference_mode():
        tokens = torch.arange(PROBE_TOKENS, device=vectors.device)[None] % len(vectors)
        whole = model(input_ids=tokens, use_cache=False).logits.float()
        parts = last(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state).float()
    if whole.shape != parts.shape:
        return False
    return bool((whole - parts).abs().max() <= PROBE_TOLERANCE * whole.abs().max().clamp_min(1))
