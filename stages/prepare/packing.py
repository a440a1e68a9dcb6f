"""One domain's text into the windows of its two splits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Domain, Project, Source
from ddk_pipe.pipeline.text import (
    SPLITS,
    TRAIN,
    VALIDATION,
    Encoder,
    Piece,
    Split,
    SplitWriter,
    open_split,
    tokenizer_size,
)
from ddk_pipe.stages.common import say
from ddk_pipe.stages.prepare.crews import Crew
from ddk_pipe.stages.prepare.parts import Parts, remove_parts
from ddk_pipe.stages.prepare.rules import CHAT_RULES
from ddk_pipe.stages.prepare.split import Candidates, Chosen, DefaultSplit, cut

Facts = dict[str, dict[str, Any]]  # of each split


def pack_domain(
    project: Project, name: str, domain: Domain, encoder: Encoder, record: dict[str, Any], crew: Crew
) -> dict[str, Split]:
    """Pack both splits, say what they hold, and return them. Raises DdkError for a domain that has no text for one."""
    began = time.monotonic()
    parts = Parts(project, name, domain, record, crew)
    packing = Packing(project, name, domain, encoder, parts)
    try:
        if domain.validation is None:
            packing.one_stream()
        else:
            packing.two_streams(domain.validation)
        facts = packing.finish(record)
    finally:
        packing.discard()
    remove_parts(project.tokens / name)
    seconds = time.monotonic() - began
    for split in SPLITS:
        windows, tokens = facts[split]["windows"], facts[split]["tokens"]
        filling = 1 - tokens / (windows * project.manifest.seq_len)
        say(
            f"prepare {name}/{split}: {facts[split]['documents']:,} documents, {tokens:,} tokens,"
            f" {windows:,} windows, {filling:.1%} filling"
        )
    tokens = sum(facts[split]["tokens"] for split in SPLITS)
    say(f"prepare {name}: {tokens / max(seconds, 1e-9):,.0f} tokens/s")
    return {split: open_split(project.tokens / name / split) for split in SPLITS}


class Packing:
    """A domain on its way into windows."""

    def __init__(self, project: Project, name: str, domain: Domain, encoder: Encoder, parts: Parts) -> None:
        self.project, self.name, self.domain, self.encoder = project, name, domain, encoder
        self.parts = parts
        self.writers = {split: self._writer(split) for split in SPLITS}
        self.candidates = Candidates(
            windows=project.manifest.prepare.max_validation_windows, seq_len=project.manifest.seq_len
        )
        self.chosen = Chosen([], [], 0)

    def one_stream(self) -> None:
        """Set documents aside for validation by their marks."""
        split = DefaultSplit(self.candidates, fraction=self.project.manifest.prepare.validation_fraction)
        train = self.writers[TRAIN]

        def finished() -> bool:
            return train.full and self.candidates.filled

        for piece in self._pieces(self.domain.train, f"prepare {self.name}", TRAIN, finished):
            for freed in split.offer(piece):
                train.add(freed.encoded, freed.text_bytes)
        self.chosen = split.close()
        for piece in self.chosen.handed_back:
            train.add(piece.encoded, piece.text_bytes)
        train.facts.left_out = self.chosen.equal
        if self.chosen.given and not train.facts.documents:
            raise DdkError(
                f"domains.{self.name}: one document cannot be both training and validation text",
                hint=f"name files in domains.{self.name}.validation, or split the document",
            )

    def two_streams(self, validation: list[Source]) -> None:
        """Validation text has sources of its own; what of it stands in the training text too is left out there."""
        held_out: set[bytes] = set()  # 16 bytes a document, some 100 in a set of Python's
        for piece in self._pieces(validation, f"prepare {self.name}/{VALIDATION}", VALIDATION, lambda: False):
            held_out.add(piece.digest)
            self.candidates.offer(piece)
        self.chosen = self.candidates.close()
        train, left_out, first = self.writers[TRAIN], 0, ""
        what = f"prepare {self.name}/{TRAIN}"
        for piece in self._pieces(self.domain.train, what, TRAIN, lambda: train.full):
            if piece.digest in held_out:
                first, left_out = first or piece.where, left_out + 1
            else:
                train.add(piece.encoded, piece.text_bytes)
        train.facts.left_out = left_out
        if left_out and not train.facts.documents:
            raise DdkError(
                f"domains.{self.name}: all of its training text is validation text too (first {first})",
                hint=f"name other files in domains.{self.name}.validation, or leave it out: a share is set aside then",
            )
        if left_out:
            say(
                f"prepare {self.name}: {left_out:,} documents of the training text are validation text too (first"
                f" {first}): left out of training"
            )

    def finish(self, record: dict[str, Any]) -> Facts:
        """Write the chosen validation text and close both splits; raises DdkError for one without text or labels."""
        held = self.writers[VALIDATION]
        for piece, tokens in self.chosen.given:
            whole = len(piece.encoded.ids)
            held.add(cut(piece.encoded, tokens), round(piece.text_bytes * tokens / whole))
            held.facts.unused_tokens += whole - tokens
        for split, writer in self.writers.items():
            if not writer.facts.documents:
                raise DdkError(
                    f"domains.{self.name}: no text in its {split} sources",
                    hint="name files that hold documents",
                )
        if not any(writer.facts.chats for writer in self.writers.values()):
            record = {name: value for name, value in record.items() if name != CHAT_RULES}
        facts = {split: asdict(writer.finish(record)) for split, writer in self.writers.items()}
        for split in SPLITS:
            if not facts[split]["labels"]:
                raise DdkError(
                    f"domains.{self.name}: no token of its {split} text is a label",
                    hint="chats need turns of the assistant",
                )
        return facts

    def discard(self) -> None:
        """Remove what was written so far and did not become a split."""
        for writer in self.writers.values():
            writer.discard()

    def _pieces(
        self, sources: list[Source], what: str, split: str, finished: Callable[[], bool]
    ) -> Iterator[Piece]:
        with closing(self.parts.pieces(sources, split, what)) as stream:
            for batch in stream:
                yield from batch
                if finished():
                    return

    def _writer(self, split: str) -> SplitWriter:
        limits = self.project.manifest.prepare
        return SplitWriter(
            self.project.tokens / self.name / split,
            seq_len=self.project.manifest.seq_len,
            vocab_size=tokenizer_size(self.encoder.tokenizer),
            eos=self.encoder.eos,
            max_windows=limits.max_train_windows if split == TRAIN else limits.max_validation_windows,
            attention=self.project.manifest.attention,
            packing=self.domain.packing,
        )
