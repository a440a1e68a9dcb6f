"""Model folders: found, checked and fingerprinted, their tokenizers and configurations read, their weights loaded whole.

Whatever loads a causal language model (teacher, student, evaluate, export) does it here, so that none is made up in part.
"""

from ddk_pipe.pipeline.models.configs import be_quiet, check_length, read_config, text_config
from ddk_pipe.pipeline.models.documents import Documents, hidden_states
from ddk_pipe.pipeline.models.folders import model_folder, model_here, weights_digest, weights_files
from ddk_pipe.pipeline.models.generation import mend_generation
from ddk_pipe.pipeline.models.loading import load_causal_lm
from ddk_pipe.pipeline.models.probes import (
    check_causal,
    decoder_of,
    forward_ends_in,
    head_is_plain,
    keeps_documents_apart,
    probe_logits,
)
from ddk_pipe.pipeline.models.starts import Starts, check_starts, positions_from, spans_from, stack_starts
from ddk_pipe.pipeline.models.tokenizers import load_tokenizer, tokenizer_of_model

__all__ = [
    "Documents",
    "Starts",
    "be_quiet",
    "check_causal",
    "check_length",
    "check_starts",
    "decoder_of",
    "forward_ends_in",
    "head_is_plain",
    "hidden_states",
    "keeps_documents_apart",
    "load_causal_lm",
    "load_tokenizer",
    "mend_generation",
    "model_folder",
    "model_here",
    "positions_from",
    "probe_logits",
    "read_config",
    "spans_from",
    "stack_starts",
    "text_config",
    "tokenizer_of_model",
    "weights_digest",
    "weights_files",
]
