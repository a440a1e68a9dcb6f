"""From sources to documents to tokens to packed windows, on disk under a digest of all that they were made from.

Nothing here knows a teacher.
"""

from ddk_pipe.pipeline.text.encoding import (
    Encoded,
    Encoder,
    chat_rules,
    project_tokenizer,
    text_rules,
    tokenizer_digest,
    tokenizer_size,
)
from ddk_pipe.pipeline.text.sources import Document, documents, find_files
from ddk_pipe.pipeline.text.windows import (
    SPLITS,
    TOKENS_VERSION,
    TRAIN,
    VALIDATION,
    Piece,
    Split,
    SplitFacts,
    SplitWriter,
    encode,
    labels_of,
    open_split,
)

__all__ = [
    "SPLITS",
    "TOKENS_VERSION",
    "TRAIN",
    "VALIDATION",
    "Document",
    "Encoded",
    "Encoder",
    "Piece",
    "Split",
    "SplitFacts",
    "SplitWriter",
    "chat_rules",
    "documents",
    "encode",
    "find_files",
    "labels_of",
    "open_split",
    "project_tokenizer",
    "text_rules",
    "tokenizer_digest",
    "tokenizer_size",
]
