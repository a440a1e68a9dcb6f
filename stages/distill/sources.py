"""Where windows and targets come from: the cache, or a teacher in memory (`distill.targets: online`, a baseline)."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache import CachedWindow, CacheReader, require_attention
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import DenseTargets
from ddk_pipe.pipeline.manifest import Project, check_tail
from ddk_pipe.pipeline.models import (
    Starts,
    check_length,
    load_tokenizer,
    model_folder,
    read_config,
    text_config,
)
from ddk_pipe.pipeline.storage import is_url
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, SparseTargets
from ddk_pipe.pipeline.text import (
    SPLITS,
    TRAIN,
    VALIDATION,
    Split,
    labels_of,
    open_split,
    predicted_ids,
    tokenizer_digest,
)
from ddk_pipe.stages.distill.batches import Batch

NEAR_READERS, FAR_READERS = 2, 8  # threads that read windows, from a disk and from an object store
ONLINE_VALIDATION_K = 128  # the teacher's tokens kept for validation; the rest is one bucket


class Source(Protocol):
    """What training reads."""

    sizes: list[int]  # training windows of each domain
    validation_sizes: list[int]  # and those for validation
    vocab_size: int  # token ids that occur
    tokenizer_digest: str
    fingerprint: str
    readers: int  # threads worth reading with
    exact: bool  # targets are the whole distribution or have a bucket: CE less entropy is a KL

    def read(self, domain: int, window: int) -> CachedWindow:
        """A training window of the domain of that number; called from several threads."""
        ...

    def validation(self, domain: int, window: int) -> CachedWindow:
        """A validation window, with sparse targets and the teacher's label log-probabilities; called from several threads."""
        ...

    def complete(self, batch: Batch) -> Batch:
        """A batch of training windows on the student's device, with what is only known there."""
        ...


class CacheSource:
    """Windows of the cache; no teacher. Raises DdkError for a cache that does not fit the manifest."""

    def __init__(self, project: Project) -> None:
        options, self.domains = project.manifest.distill, list(project.manifest.domains)
        self.reader = CacheReader(project.cache, options.temperature)
        spec = self.reader.spec
        check_tail(options, spec.plan.scheme, has_tail=spec.plan.has_tail)
        self.renormalise = options.tail == "renormalise"
        if spec.seq_len != project.manifest.seq_len:
            raise DdkError(
                f"seq_len {project.manifest.seq_len}, the cache at {project.cache} has {spec.seq_len}",
                hint="use the cache's seq_len, or set cache.path to a new folder",
            )
        require_attention(self.reader.folder, spec, project.manifest.attention)
        self.reader.require_complete(self.domains)
        self.sizes, self.validation_sizes = (
            [self.reader.size(domain, split).windows for domain in self.domains]
            for split in (TRAIN, VALIDATION)
        )
        self.vocab_size, self.tokenizer_digest = spec.vocab_size, spec.tokenizer_digest
        self.fingerprint, self.exact = spec.fingerprint, spec.plan.has_tail
        self.readers = FAR_READERS if is_url(self.reader.folder.name) else NEAR_READERS

    def read(self, domain: int, window: int) -> CachedWindow:
        found = self.reader.read(self.domains[domain], TRAIN, window)
        return replace(found, targets=found.targets.renormalised()) if self.renormalise else found

    def validation(self, domain: int, window: int) -> CachedWindow:
        return self.reader.read(self.domains[domain], VALIDATION, window)

    def complete(self, batch: Batch) -> Batch:
        return batch


class OnlineSource:
    """Windows of tokens/, which are there by now, and the teacher's whole distribution, predicted in the step.

    Its validation windows have the teacher's ONLINE_VALIDATION_K largest probabilities and a bucket, predicted once.
    """

    def __init__(self, project: Project, device: torch.device) -> None:
        from ddk_pipe.stages.teachers import open_hf

        manifest = project.manifest
        folder = model_folder(
            project.teacher_model, field="teacher.model", revision=manifest.teacher.revision
        )
        trust = manifest.teacher.trust_remote_code
        config = read_config(folder, field="teacher.model", trust_remote_code=trust)
        check_length(config, manifest.seq_len, field="teacher.model")
        tokenizer = load_tokenizer(project.tokenizer, field="tokenizer", trust_remote_code=trust)
        self.domains = list(manifest.domains)
        splits = {
            name: {split: open_split(project.tokens / name / split) for split in SPLITS}
            for name in self.domains
        }
        self.vocab_size = predicted_ids(splits, tokenizer, int(text_config(config).vocab_size))
        self.tokenizer_digest = tokenizer_digest(tokenizer)
        named = manifest.teacher.device
        where = named if named in ("balanced", "sequential") else str(device)
        self.teacher = open_hf(
            folder,
            manifest.teacher.model_copy(update={"device": where}),
            vocab_size=self.vocab_size,
        )
        self.splits = {
            (name, split): opened for name, parts in splits.items() for split, opened in parts.items()
        }
        self.sizes, self.validation_sizes = (
            [self.splits[name, split].facts.windows for name in self.domains] for split in (TRAIN, VALIDATION)
        )
        self._predicted: dict[tuple[int, int], CachedWindow] = {}
        self._one_at_a_time = threading.Lock()
        self.temperature = manifest.distill.temperature
        self.fingerprint, self.readers, self.exact = "online", NEAR_READERS, True

    def read(self, domain: int, window: int) -> CachedWindow:
        return _bare(self.splits[self.domains[domain], TRAIN], window)

    def validation(self, domain: int, window: int) -> CachedWindow:
        with self._one_at_a_time:
            if (domain, window) not in self._predicted:
                self._predicted[domain, window] = self._predict(self.domains[domain], window)
            return self._predicted[domain, window]

    def _predict(self, name: str, number: int) -> CachedWindow:
        from ddk_pipe.stages.teachers import Window

        bare = _bare(self.splits[name, VALIDATION], number)
        plan = Plan("topk", 0.5, min(ONLINE_VALIDATION_K, self.vocab_size), 1, 1, (self.temperature,), 0)
        (chosen,) = self.teacher.select(
            [Window(f"{name}/{VALIDATION}/{number}", bare.tokens, bare.labels, bare.starts)], plan
        )
        return replace(bare, label_logprobs=chosen.label_logprobs.numpy(), targets=chosen.targets[0])

    def complete(self, batch: Batch) -> Batch:
        head = self.teacher.head
        service = replace(self.teacher.service, batch="distill.micro_batch_windows")
        with torch.no_grad(), service.one_line("cannot serve"):
            states = head.states(self.teacher.to_model(batch.tokens), batch.documents)
        states = states.flatten(0, 1).to(batch.tokens.device)
        return replace(batch, dense=DenseTargets(states, head.logits, head.vocab_size))


def _bare(split: Split, index: int) -> CachedWindow:
    tokens, mask = split.window(index)
    return _without_targets(tokens, labels_of(tokens, mask, no_label=NO_LABEL), split.starts(index))


def silent_window(seq_len: int) -> CachedWindow:
    """A window without a label: for a process that must take part in a forward pass and has nothing to add."""
    return _without_targets(np.zeros(seq_len, np.int64), np.full(seq_len, NO_LABEL))


def _without_targets(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], starts: Starts | None = None
) -> CachedWindow:
    positions = len(tokens)
    nothing = SparseTargets(
        ids=torch.empty(positions, 0, dtype=torch.int32),
        logprobs=torch.empty(positions, 0),
        tail=torch.full((positions,), float("-inf")),
    )
    return CachedWindow(tokens, labels, np.full(positions, np.nan, np.float32), nothing, starts)


def teacher_ce(windows: list[CachedWindow]) -> float:
    """The teacher's CE on these windows, nats per token: the mean of the cached label log-probabilities."""
    labelled = np.concatenate([window.label_logprobs[window.labels != NO_LABEL] for window in windows])
    return float(-labelled.astype(np.float64).mean())
