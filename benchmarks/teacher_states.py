"""A real teacher's last hidden states over real text, computed once and kept in a scratch folder.

The cache benchmarks want dense log-probabilities of many positions. One forward pass of SmolLM2-135M takes longer
than all that is measured on its outcome, and a hidden state is 1.2 kB where a distribution is 197 kB, so the states
are kept, rounded to float16, and the output layer is applied again where a distribution is wanted: that is the
teacher, exactly. Text: the first 3/4 of a domain's documents for fitting and training, the last 1/4 for measuring.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT
from numpy.typing import NDArray
from torch import Tensor

from ddk_pipe.pipeline.targets import head_rows
from ddk_pipe.stages.demo.material import write_teacher

CORPUS = ROOT.parent / "shared" / "data" / "corpus"
SCRATCH = ROOT / "runs" / "cache_codec"
DOMAINS = ("code_python", "tech_docs_en", "encyclopedia_en", "speeches_en", "de_docs", "legal_en")
WINDOW = 1024  # tokens
PILOT_WINDOWS = 8  # a domain, for fitting and training
END_OF_DOCUMENT = 0


Blocks = Callable[
    [], Iterator[tuple[Tensor, Tensor]]
]  # log-probabilities [n, V] and labels [n] of runs of positions


@dataclass(frozen=True)
class Material:
    """What a domain offers to a cache: distributions to fit tables on, others to measure, and the token frequencies
    float64 [V] of all its text but the quarter that is measured."""

    name: str
    pilot: Blocks
    measured: Blocks
    frequencies: NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """W windows: tokens int64 [W, WINDOW + 1], the last a label only; hidden float16 [W, WINDOW, d]."""

    tokens: NDArray[np.int64]
    hidden: NDArray[np.float16]


@dataclass(frozen=True)
class Domain:
    """pilot: windows to fit on, measured: others; text u16 [tokens]: all but the quarter that is measured."""

    name: str
    pilot: Part
    measured: Part
    text: NDArray[np.uint16]


def logprobs(hidden: NDArray[np.float16], head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The teacher's log-probabilities float32 [n, V] of runs of positions, 2^k long; hidden [N, d]."""
    rows = 1 << (head_rows(len(head)).bit_length() - 1)
    for start in range(0, len(hidden), rows):
        states = torch.from_numpy(hidden[start : start + rows]).float()
        yield slice(start, start + len(states)), torch.log_softmax(states @ head.t(), 1)


def materials(domains: list[Domain], head: Tensor, pilot: int, measured: int) -> list[Material]:
    """At most so many positions a domain."""

    def blocks(part: Part, positions: int) -> Blocks:
        labels = torch.from_numpy(part.tokens[:, 1:].reshape(-1)[:positions].copy())
        hidden = part.hidden.reshape(-1, part.hidden.shape[2])[:positions]
        return lambda: ((log_p, labels[rows]) for rows, log_p in logprobs(hidden, head))

    return [
        Material(
            domain.name,
            blocks(domain.pilot, pilot),
            blocks(domain.measured, measured),
            np.bincount(domain.text, minlength=len(head)) / len(domain.text),
        )
        for domain in domains
    ]


def load(
    scratch: Path, teacher: Path, corpus: Path, domains: tuple[str, ...] = DOMAINS, measured_windows: int = 4
) -> tuple[list[Domain], Tensor]:
    """The domains, and the output layer's weight float32 [V, d]; whatever is missing is computed first."""
    missing = [name for name in domains if not (scratch / f"{name}.npz").exists()]
    if missing or not (scratch / "head.npy").exists():
        write_teacher(teacher)
        _compute(scratch, teacher, corpus, missing, measured_windows)
    head = torch.from_numpy(np.load(scratch / "head.npy").astype(np.float32))
    return [_read(scratch / f"{name}.npz") for name in domains], head


def _read(path: Path) -> Domain:
    with np.load(path) as file:
        pilot, measured = (
            Part(file[f"{part}_tokens"].astype(np.int64), file[f"{part}_hidden"])
            for part in ("pilot", "measured")
        )
        return Domain(path.stem, pilot, measured, file["text"])


def documents(corpus: Path, domain: str) -> list[str]:
    with gzip.open(corpus / f"{domain}.jsonl.gz", "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


@torch.inference_mode()
def _compute(scratch: Path, teacher: Path, corpus: Path, names: list[str], measured_windows: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scratch.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    np.save(scratch / "head.npy", model.lm_head.weight.half().numpy())
    for name in names:
        texts = documents(corpus, name)
        ids = np.array(
            [
                id_
                for document in tokenizer(texts, verbose=False)["input_ids"]
                for id_ in (*document, END_OF_DOCUMENT)
            ]
        )
        windows = np.lib.stride_tricks.sliding_window_view(ids, WINDOW + 1)[::WINDOW]
        cut, rng = len(windows) * 3 // 4, np.random.default_rng(1)
        chosen = {
            "pilot": rng.permutation(cut)[:PILOT_WINDOWS],
            "measured": cut + 1 + rng.permutation(len(windows) - cut - 1)[:measured_windows],
        }
        arrays: dict[str, Any] = {"text": ids[: cut * WINDOW].astype(np.uint16)}
        for part, which in chosen.items():
            arrays[f"{part}_tokens"] = windows[which].astype(np.int32)
            states = [
                model.model(torch.from_numpy(windows[i][None, :-1].copy())).last_hidden_state for i in which
            ]
            arrays[f"{part}_hidden"] = torch.cat(states).half().numpy()
        unfinished = scratch / f"{name}.partial.npz"
        np.savez(unfinished, **arrays)
        os.replace(unfinished, scratch / f"{name}.npz")
        print(f"{name}: teacher run over {sum(map(len, chosen.values())) * WINDOW:,} positions", flush=True)
