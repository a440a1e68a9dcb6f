"""Documents -> token ids and label masks: plain text, chats through their template, and what only mentions control tokens.

`Encoder` is the way in; the digests say what its ids mean and what it turns text into them by.
"""

from ddk_pipe.pipeline.text.encoding.digest import chat_rules, text_rules, tokenizer_digest, tokenizer_size
from ddk_pipe.pipeline.text.encoding.encoder import BATCH_DOCUMENTS, Encoded, Encoder, batches
from ddk_pipe.pipeline.text.encoding.tokenizer import project_tokenizer

__all__ = [
    "BATCH_DOCUMENTS",
    "Encoded",
    "Encoder",
    "batches",
    "chat_rules",
    "project_tokenizer",
    "text_rules",
    "tokenizer_digest",
    "tokenizer_size",
]
