"""What a run is made of, put together from the manifest: targets, student, optimizer, sampler, validation, checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Distill, Project, windows_per_step
from ddk_pipe.pipeline.mixing import DomainSampler, mixing_rule
from ddk_pipe.stages.common import pick_device, pick_dtype
from ddk_pipe.stages.distill.batches import BatchMaker
from ddk_pipe.stages.distill.checkpoints import Checkpoints
from ddk_pipe.stages.distill.optimizer import make_optimizer
from ddk_pipe.stages.distill.schedules import stable_steps
from ddk_pipe.stages.distill.sharding import fill, taken_apart
from ddk_pipe.stages.distill.sources import CacheSource, OnlineSource, Source
from ddk_pipe.stages.distill.step import Stepper
from ddk_pipe.stages.distill.students import (
    DistillStudent,
    build_student,
    needs_rows_apart,
    origin,
    prove_saved,
    shared_tokenizer,
)
from ddk_pipe.stages.distill.validation import Validation
from ddk_pipe.stages.distill.world import World, Wrapped, wrap


class Parts:
    """The parts of one run on this process of its world. Raises DdkError for those that do not fit together."""

    def __init__(self, project: Project, world: World | None = None, *, prove: bool = False) -> None:
        """`prove`: where the run starts, hold first that its student is saved as the one that is trained."""
        self.project, self.world, self.prove = project, world or World(), prove
        self.options: Distill = project.manifest.distill
        self.domains = list(project.manifest.domains)
        self.device = self.world.device(pick_device(self.options.device))
        if self.options.gradient_skip is not None and self.device.type != "cpu":
            raise DdkError(
                f"distill.gradient_skip: works on a CPU only, and the student is on {self.device}",
                hint="leave it out, or set distill.device: cpu",
            )
        self.windows_per_step = windows_per_step(self.options, project.manifest.seq_len, self.world.size)
        self.tokens_per_step = self.windows_per_step * project.manifest.seq_len
        self.source = self._source()
        self.sizes = self.source.sizes
        self.rule = mixing_rule(self.options, self.domains, self.sizes)
        self.tokenizer = shared_tokenizer(project, self.source.tokenizer_digest)
        self.apart = False  # documents in rows of their own
        self.wrapped = self._wrapped()
        self.student = self.wrapped.student
        self.optimizer = make_optimizer(self.student, self.options)
        self.sampler = DomainSampler(
            self.sizes, seed=self.options.seed, reshuffle=self.options.exhausted == "reshuffle"
        )
        self.validation = Validation(project, self.source, self.wrapped, self._autocast)
        self.teacher_ce = self.validation.teacher_ce
        self.make_batch = BatchMaker.of(
            self.student,
            direction=self.options.direction,
            sparse=self.options.targets == "cache",
            pin=self.device.type == "cuda",
        )
        self.stepper = Stepper(
            self.options,
            self.source,
            self.make_batch,
            self.wrapped,
            self.optimizer,
            self._autocast,
            self.domains,
        )
        self.checkpoints = Checkpoints(
            project.run / "checkpoints",
            self.wrapped,
            self.optimizer,
            keep_last=self.options.keep_last,
            keep_best=self.options.keep_best,
            stable_steps=stable_steps(self.options),
        )

    def _source(self) -> Source:
        if self.options.targets == "cache":
            return CacheSource(self.project)
        return OnlineSource(self.project, self.device)

    def _wrapped(self) -> Wrapped:
        parallel, dtype = self.options.parallel, self.compute_dtype()
        if not self.world.distributed or parallel != "fsdp":
            lm = self._built()
            if self.prove:
                self.world.of_leader(lambda: self._prove_saved(lm))
            return wrap(self._student(lm.to(self.device)), self.world, parallel=parallel, dtype=dtype)
        lm, tensors = taken_apart(self.world, self._built_and_proven)
        student = self._student(lm if tensors is not None else lm.to(self.device))
        wrapped = wrap(student, self.world, parallel=parallel, dtype=dtype, device=self.device)
        if tensors is not None:
            fill(student, self.device, self.world, tensors, prefix="lm.")
        return wrapped

    def _built(self) -> Any:
        lm = build_student(self.project, vocab_size=self.source.vocab_size, seed=self.options.seed)
        sharded = self.world.distributed and self.options.parallel == "fsdp"
        self.apart = needs_rows_apart(lm, self.project.manifest, sharded=sharded)
        return lm

    def _built_and_proven(self) -> Any:
        lm = self._built()
        if self.prove:
            self._prove_saved(lm)
        return lm

    def _student(self, lm: Any) -> DistillStudent:
        student = DistillStudent(lm, apart=self.apart)
        if self.options.activation_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.options.compile:
            for block in student.blocks:  # in place: names stay, and FSDP2 wraps the compiled layers
                block.compile()
        return student

    def _prove_saved(self, lm: Any) -> None:
        """Once a run, where it starts; for one process."""
        manifest, run = self.project.manifest, self.project.run
        assert manifest.student is not None
        field, trust = origin(manifest.student, manifest.teacher)
        if not any((run / "checkpoints").glob("step-*")):
            prove_saved(lm, self.tokenizer, run, field=field, trust_remote_code=trust)

    def compute_dtype(self) -> torch.dtype:
        """Of the student's products; its weights are float32."""
        return pick_dtype(self.options.precision, self.device)

    def _autocast(self) -> Any:
        dtype = self.compute_dtype()
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)
