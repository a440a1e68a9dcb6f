"""What a model does, tried on eight tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models.configs import text_config
from ddk_pipe.pipeline.models.documents import Documents, hidden_states, takes_positions

if TYPE_CHECKING:
    from torch import Tensor

PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-3  # relative to the largest logit
ROUNDINGS = 4  # units in the last place that the same sums in another order may differ by


def decoder_of(model: Any) -> Any:
    """The part of a causal language model that gives last hidden states: what stands below its output layer.

    Usually `base_model`; some (Llama 4) name their decoder otherwise than their class says, and are their own base model.
    """
    if model.base_model is not model:
        return model.base_model
    inside = (child for child in model.children() if callable(getattr(child, "get_input_embeddings", None)))
    return next(inside, model)


def head_is_plain(model: Any) -> bool:
    """True if output layer(last hidden state) is what the model's own forward returns.

    Soft-capping or scaling between the two (Gemma, Cohere, Granite) makes it False: such a model's logits
    cannot be formed in blocks by its output layer alone.
    """
    return forward_ends_in(model, model.get_output_embeddings())


def forward_ends_in(model: Any, last: Callable[[Tensor], Tensor]) -> bool:
    """True if `last`(last hidden states [1, N, d]) -> [1, N, V] is what the model's own forward returns.

    Tried on eight tokens, without dropout.
    """
    with _measuring(model):
        tokens = _probe(model)
        whole = model(input_ids=tokens, use_cache=False).logits.float()
        states = getattr(decoder_of(model)(input_ids=tokens, use_cache=False), "last_hidden_state", None)
        if states is None:  # a model that cannot be taken apart
            return False
        parts = last(states).float()
    if whole.shape != parts.shape:
        return False
    return bool((whole - parts).abs().max() <= PROBE_TOLERANCE * whole.abs().max().clamp_min(1))


def probe_logits(model: Any) -> Tensor:
    """The model's logits of eight tokens, float32 [1, PROBE_TOKENS, V], without dropout."""
    with _measuring(model):
        logits: Tensor = model(input_ids=_probe(model), use_cache=False).logits.float()
    return logits


def check_causal(model: Any, *, field: str) -> None:
    """Raises DdkError for a model whose earlier logits move when its last token is another: it sees what it is to
    predict (an encoder such as BERT loads as a causal model without `is_decoder`).

    Earlier logits may move by their own rounding, and by a thousandth of what the last ones move.
    """
    import torch

    with _measuring(model):
        tokens = _probe(model)
        other = tokens.clone()
        other[0, -1] = (tokens[0, -1] + 1) % len(model.get_input_embeddings().weight)
        one, two = (model(input_ids=each, use_cache=False).logits[0] for each in (tokens, other))
        noise = ROUNDINGS * torch.finfo(one.dtype).eps * float(one.abs().max())
        *before, last = (one.float() - two.float()).abs().amax(1).tolist()
    if max(before) > max(noise, PROBE_TOLERANCE * last):  # NaN is told where it is met, with its window
        raise DdkError(
            f"{field}: {type(model).__name__} sees the tokens to come: another last token moves earlier predictions",
            hint="use a decoder (for BERT and its like set is_decoder: true in config.json)",
        )


def keeps_documents_apart(model: Any) -> bool:
    """True if documents in one row, told by position ids, do not see each other: another first document does not move
    the second one's hidden states, and they are those of that document by itself.

    Recurrent layers carry the first document on; older code knows nothing of documents in a row; chunks of attention
    that are counted from the row's beginning cut the second one elsewhere.
    """
    import numpy as np
    import torch

    decoder = decoder_of(model)
    if not takes_positions(decoder) or getattr(text_config(model.config), "attention_chunk_size", None):
        return False
    half = PROBE_TOKENS // 2
    documents = Documents.of(np.arange(PROBE_TOKENS)[None] % half == 0)
    with _measuring(model):
        tokens = _probe(model)
        other = tokens.clone()
        other[:, :half] = (tokens[:, :half] + 1) % len(model.get_input_embeddings().weight)
        assert documents is not None
        documents = documents.to(tokens.device)
        one, two = (hidden_states(decoder, each, documents)[0, half:] for each in (tokens, other))
        alone = hidden_states(decoder, tokens[:, half:])[0]
        eps, largest = torch.finfo(one.dtype).eps, float(alone.abs().max())
        leak, apart = (float((one.float() - each.float()).abs().max()) for each in (two, alone))
    # rows of one shape differ by no more than rounding; of another, by what a model makes of that
    return leak <= ROUNDINGS * eps * largest and apart <= max(PROBE_TOLERANCE, 4 * ROUNDINGS * eps) * largest


def _probe(model: Any) -> Tensor:
    """Token ids int64 [1, PROBE_TOKENS], where the model's embeddings are."""
    import torch

    vectors = model.get_input_embeddings().weight
    return torch.arange(PROBE_TOKENS, device=vectors.device)[None] % len(vectors)


@contextmanager
def _measuring(model: Any) -> Iterator[None]:
    """Inside, the model is in eval mode and takes no gradients; afterwards it is as it was."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
