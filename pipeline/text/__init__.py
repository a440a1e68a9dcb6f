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
from ddk_pipe.pipeline.text.pieces import Piece, encode, read_pieces, write_pieces
from ddk_pipe.pipeline.text.sources import (
    Document,
    Part,
    Stretch,
    cut_into_parts,
    dataset_commit,
    documents,
    documents_of,
    find_files,
    kind_by_name,
    resolve_sources,
)
from ddk_pipe.pipeline.text.vocabulary import predicted_ids
from ddk_pipe.pipeline.text.windows import (
    SPLITS,
    TOKENS_VERSION,
    TRAIN,
    VALIDATION,
    Split,
    SplitFacts,
    SplitWriter,
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
    "Part",
    "Piece",
    "Split",
    "SplitFacts",
    "SplitWriter",
    "Stretch",
    "chat_rules",
    "cut_into_parts",
    "dataset_commit",
    "documents",
    "documents_of",
    "encode",
    "find_files",
    "kind_by_name",
    "labels_of",
    "open_split",
    "predicted_ids",
    "project_tokenizer",
    "read_pieces",
    "resolve_sources",
    "text_rules",
    "tokenizer_digest",
    "tokenizer_size",
    "write_pieces",
]
