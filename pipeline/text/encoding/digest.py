"""Two fingerprints of a tokenizer: what its ids mean, and how it turns text into them.

A teacher, its cache and a student must share the first. Prepared tokens depend on the second: other merges or another
chat template give other windows of the same ids.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.text.encoding.encoder import Encoder
from ddk_pipe.pipeline.text.encoding.template import asks_for_date


def tokenizer_digest(tokenizer: Any) -> str:
    """Fingerprint of what token ids mean: every id with its token, and the special ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([vocabulary, special]).encode()).hexdigest()[:32]


def tokenizer_size(tokenizer: Any) -> int:
    """Smallest vocabulary that holds every id of the tokenizer."""
    return int(max(tokenizer.get_vocab().values())) + 1


def text_rules(encoder: Encoder) -> str:
    """Fingerprint of all that turns plain text into ids.

    Normalizer, pre-tokenizer, model with its merges, post-processor, added tokens with their flags, which of them are
    control tokens, and the EOS that closes a document. How a tokenizer is asked to cut or pad is no part of it.
    """
    values = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    values["truncation"] = values["padding"] = None
    merges = values["model"].get("merges") or []  # pairs, or "a b" in files of old versions
    if merges:
        values["model"]["merges"] = [
            merge.split(" ") if isinstance(merge, str) else merge for merge in merges
        ]
    values.pop("version", None)
    return _digest([values, sorted(encoder.controls.ids.items()), encoder.eos])


def chat_rules(encoder: Encoder) -> str:
    """Fingerprint of what a chat is rendered by, beside `text_rules`: templates, special tokens, the day if it shows."""
    tokenizer = encoder.tokenizer
    day = encoder.date if asks_for_date(tokenizer) else None
    return _digest([getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map, day])


def _digest(value: Any) -> str:
    return durable.digest(json.dumps(value, sort_keys=True, ensure_ascii=True).encode())
