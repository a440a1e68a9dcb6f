"""Figures of finished students on windows that no run has seen: neither in training nor for its mixing weights.

For each domain, means over labelled positions of the report windows:

student_ce, teacher_ce   cross-entropy, nats/token; their difference is the gap
kl                       KL(teacher || student) against the teacher's dense distribution, nats
agreement                share of positions where both have the same likeliest token
ece                      expected calibration error of the student's likeliest token, 15 equal bins (Guo et al. 2017)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddk_pipe.pipeline.cache import committed, read_spec
from ddk_pipe.pipeline.losses import sums_by_confidence
from ddk_pipe.pipeline.models import load_tokenizer
from ddk_pipe.pipeline.storage import open_folder
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.pipeline.text import TRAIN, VALIDATION, labels_of, open_split
from ddk_pipe.stages.evaluate.stage import label_bytes

FOR_MIXING = 8  # validation windows that runs look at: distill.validation_windows of the manifest
BATCH = 8  # windows


@dataclass(frozen=True)
class Windows:
    """The report windows of one domain, and what the teacher says of them."""

    tokens: Tensor  # int64 [windows, seq_len]
    labels: Tensor  # int64 [positions], labelled ones
    live: Tensor  # bool [windows, seq_len]
    teacher: Tensor  # log-probabilities, float16 [positions, V]: gigabytes in all where V is large
    natural_share: float  # the domain's, of all training windows
    label_bytes: int  # UTF-8 bytes of the labels' text


class Measure:
    """Reads the windows and runs the teacher once; then measures any number of students."""

    def __init__(self, tokens: Path, domains: list[str], teacher: Path) -> None:
        model, tokenizer = load(teacher), load_tokenizer(str(teacher), field="teacher.model")
        sizes = {domain: open_split(tokens / domain / TRAIN).facts.windows for domain in domains}
        self.domains = {
            domain: _windows(tokens / domain, model, tokenizer, size / sum(sizes.values()))
            for domain, size in sizes.items()
        }

    def student(self, folder: Path) -> list[dict[str, Any]]:
        """One row a domain."""
        model = load(folder)
        return [{"domain": domain, **_figures(model, windows)} for domain, windows in self.domains.items()]


@functools.cache  # every run of a table asks for the few caches of it
def about_cache(cache: Path) -> dict[str, float]:
    """What the targets of a position with a label take, how many there are, and the seconds the teacher took."""
    folder = open_folder(cache)
    records = [record for _, record in committed(folder, read_spec(folder))]
    positions = sum(record.positions for record in records)
    return {
        "bytes_per_position": sum(record.target_bytes for record in records) / positions,
        "cache_positions": positions,
        "cache_seconds": sum(record.seconds for record in records),
    }


def shares_drawn(run: Path) -> dict[str, float]:
    """Of the windows that a run trained on, the share of each domain."""
    rows = pq.read_table(run / "validation.parquet", columns=["step", "domain", "windows_drawn"]).to_pylist()
    last = max(row["step"] for row in rows)
    drawn = {row["domain"]: row["windows_drawn"] for row in rows if row["step"] == last}
    return {domain: windows / sum(drawn.values()) for domain, windows in drawn.items()}


def load(folder: Path) -> torch.nn.Module:
    """A causal language model for evaluation, float32."""
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _windows(folder: Path, teacher: torch.nn.Module, tokenizer: Any, natural_share: float) -> Windows:
    split = open_split(folder / VALIDATION)
    windows, mask = split.window(slice(FOR_MIXING, split.facts.windows))
    marked = labels_of(windows, mask, no_label=NO_LABEL)
    tokens, labels = torch.from_numpy(windows), torch.from_numpy(marked)
    live = labels != NO_LABEL
    return Windows(
        tokens,
        labels[live],
        live,
        _log_probabilities(teacher, tokens, live).half(),
        natural_share,
        sum(label_bytes(tokenizer, window) for window in marked),
    )


@torch.no_grad()
def _log_probabilities(model: torch.nn.Module, tokens: Tensor, live: Tensor) -> Tensor:
    """Of the labelled positions, float32 [positions, V]."""
    parts = []
    for start in range(0, len(tokens), BATCH):
        logits = model(input_ids=tokens[start : start + BATCH]).logits
        parts.append(torch.log_softmax(logits[live[start : start + BATCH]], -1))
    return torch.cat(parts)


def _figures(model: torch.nn.Module, windows: Windows) -> dict[str, float]:
    log_q = _log_probabilities(model, windows.tokens, windows.live)
    log_p = windows.teacher.float()
    confidence, guess = log_q.max(1)
    right = (guess == windows.labels).double()
    kl = torch.where(log_p > -16, log_p.exp() * (log_p - log_q), 0.0).sum(1)

    def mean_nats(log: Tensor) -> float:
        return float(-log.gather(1, windows.labels[:, None]).double().mean())

    return {
        "natural_share": windows.natural_share,
        "positions": len(log_q),
        "label_bytes": windows.label_bytes,
        "student_ce": mean_nats(log_q),
        "teacher_ce": mean_nats(log_p),
        "kl": float(kl.double().mean()),
        "agreement": float((guess == log_p.argmax(1)).double().mean()),
        "ece": _calibration_error(confidence.exp().double(), right),
    }


def _calibration_error(confidence: Tensor, right: Tensor) -> float:
    positions, confident, hits = sums_by_confidence(confidence, right)
    return float((confident - hits).abs().sum() / positions.sum())
