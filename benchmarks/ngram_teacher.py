"""A teacher made for the test: interpolated trigrams of a text, for vocabularies that no model at hand has.

Witten-Bell interpolation of trigram, bigram and unigram counts, and a trace of the uniform distribution, then
raised to a power that makes it about as sure of itself as a language model. What it keeps of its tail are
frequent tokens of the text; a model's tail knows the context better.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from teacher_states import END_OF_DOCUMENT, Blocks, Material, documents
from torch import Tensor

UNIFORM = 0.02  # share of the uniform distribution in the unigrams
BLOCK = 128  # positions
PROBES = 16  # places to calibrate at


class NgramTeacher:
    """Counts of `text`, ids below `vocab`; a `power` above 1 sharpens."""

    def __init__(self, text: NDArray[np.integer], vocab: int, power: float) -> None:
        self.power, self.vocab = power, vocab
        unigram = np.bincount(text, minlength=vocab) / len(text) * (1 - UNIFORM) + UNIFORM / vocab
        self.unigram = torch.from_numpy(unigram.astype(np.float32))
        wide = text.astype(np.int64)
        self.tables = [_Table(wide[:-1], wide[1:]), _Table(wide[:-2] * vocab + wide[1:-1], wide[2:])]

    def logprobs(self, window: NDArray[np.integer]) -> Tensor:
        """Log-probabilities float32 [len(window) - 2, V] of the tokens that follow each pair of tokens."""
        wide = window.astype(np.int64)
        contexts = [wide[1:-1], wide[:-2] * self.vocab + wide[1:-1]]
        p = self.unigram.repeat(len(wide) - 2, 1)
        for table, context in zip(self.tables, contexts, strict=True):
            for row, key in enumerate(context):
                ids, counts = table.after(int(key))
                if len(ids):
                    total = counts.sum() + len(
                        ids
                    )  # Witten-Bell: as much mass for new tokens as there were kinds
                    p[row] *= len(ids) / total
                    p[row, torch.from_numpy(ids)] += torch.from_numpy((counts / total).astype(np.float32))
        return torch.log_softmax(p.log_().mul_(self.power), 1)


class _Table:
    """How often each id follows a context."""

    def __init__(self, contexts: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        order = np.lexsort((ids, contexts))
        contexts, ids = contexts[order], ids[order]
        first = np.flatnonzero((np.diff(contexts, prepend=-1) != 0) | (np.diff(ids, prepend=-1) != 0))
        self.contexts, self.ids = contexts[first], ids[first]
        self.counts = np.diff(first, append=len(ids))

    def after(self, context: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        start, end = np.searchsorted(self.contexts, [context, context + 1])
        return self.ids[start:end], self.counts[start:end]


def ngram_materials(
    tokenizer: Path,
    corpus: Path,
    names: tuple[str, ...],
    entropy: dict[str, float],
    pilot: int,
    measured: int,
) -> list[Material]:
    """Domains under that tokenizer, each with a teacher of the mean entropy given, nats."""
    from tokenizers import Tokenizer

    tool = Tokenizer.from_file(str(tokenizer))
    found = []
    for name in names:
        encoded = tool.encode_batch(documents(corpus, name), add_special_tokens=False)
        ids = np.array([id_ for document in encoded for id_ in (*document.ids, END_OF_DOCUMENT)])
        cut, vocab = len(ids) * 3 // 4, tool.get_vocab_size()
        text, other = ids[: cut - pilot - 2], ids[cut : cut + measured + 2]
        teacher = NgramTeacher(text, vocab, 1.0)
        teacher.power = _calibrated(teacher, other, entropy[name])
        before, after = _blocks(teacher, ids[cut - pilot - 2 : cut]), _blocks(teacher, other)
        found.append(Material(name, before, after, np.bincount(text, minlength=vocab) / len(text)))
    return found


def _blocks(teacher: NgramTeacher, window: NDArray[np.int64]) -> Blocks:
    def run() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(window) - 2, BLOCK):
            part = window[start : start + BLOCK + 2]
            yield teacher.logprobs(part), torch.from_numpy(part[2:].copy())

    return run


def mean_entropy(blocks: Blocks) -> float:
    """Nats a position."""
    values = [-(log_p.exp() * log_p).sum(1) for log_p, _ in blocks()]
    return float(torch.cat(values).mean())


def _calibrated(teacher: NgramTeacher, window: NDArray[np.int64], entropy: float) -> float:
    """The power at which the mean entropy is as wanted, by bisection at a few places of the window."""
    places = np.linspace(0, len(window) - 10, PROBES).astype(int)
    low, high = 0.5, 4.0
    for _ in range(12):
        teacher.power = (low + high) / 2
        log_p = torch.cat([teacher.logprobs(window[place : place + 10]) for place in places])
        flat = float(-(log_p.exp() * log_p).sum(1).mean()) > entropy
        low, high = (teacher.power, high) if flat else (low, teacher.power)
    return (low + high) / 2
