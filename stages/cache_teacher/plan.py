"""What a cache will hold, known and checked before a weight of the teacher is loaded: its spec, its shards, its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import ddk_pipe
from ddk_pipe.pipeline.cache import (
    SCHEMA_VERSIONS,
    CacheSpec,
    Shard,
    read_spec,
    require_attention,
    split_size,
)
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.models import (
    check_length,
    load_tokenizer,
    model_folder,
    read_config,
    text_config,
    tokenizer_of_model,
    weights_digest,
)
from ddk_pipe.pipeline.targets import Plan
from ddk_pipe.pipeline.text import Split, predicted_ids, tokenizer_digest, tokenizer_size
from ddk_pipe.stages.cache_teacher.maker import Job
from ddk_pipe.stages.common import pick_device, pick_dtype
from ddk_pipe.stages.prepare import prepare, rules_of
from ddk_pipe.stages.teachers import check_capture, check_head, choose_backend, open_teacher, widens

# Bytes per position to expect, by scheme: for the check of free space only. Entries cost 1.4 to 2.3 bytes.
EXPECTED_BYTES = {"pps": 40.0, "threshold": 120.0, "topk": 150.0, "random": 60.0}


def only_domains(project: Project, names: tuple[str, ...]) -> Project:
    """The project with these domains only (all, if none is named); raises DdkError for unknown ones."""
    known = project.manifest.domains
    for name in names:
        if name not in known:
            raise DdkError(f"--domains: no domain {name}", hint=f"the manifest has {', '.join(known)}")
    if not names:
        return project
    chosen = {name: domain for name, domain in known.items() if name in names}
    return Project(project.manifest.model_copy(update={"domains": chosen}), project.root)


def plan_job(project: Project) -> Job:
    """Everything about the cache that can be known and checked before a weight is loaded; prepares the text."""
    options = project.manifest.teacher
    backend = choose_backend(options)
    plan = Plan.of(project.manifest.cache)
    folder = model_folder(project.teacher_model, field="teacher.model", revision=options.revision)
    config = read_config(folder, field="teacher.model", trust_remote_code=options.trust_remote_code)
    check_length(config, project.manifest.seq_len, field="teacher.model")
    check_plan(project, plan, backend)
    if project.cache.exists("cache.json"):  # before `prepare` makes tokens again in the place of that cache's
        require_attention(project.cache, read_spec(project.cache), project.manifest.attention)
    splits = prepare(project)
    head_size = int(text_config(config).vocab_size)
    spec = make_spec(project, splits, plan, folder, head_size)
    if backend == "vllm":
        check_head(options, head_size, spec.vocab_size)
    return Job(project.manifest, project.root, spec, folder, backend, open_teacher)


def check_plan(project: Project, plan: Plan, backend: str) -> None:
    """Raises DdkError for a plan that the backend or the student's loss cannot serve, before anything is loaded."""
    if backend == "vllm":
        check_capture(project.manifest.teacher, plan)


def make_spec(
    project: Project, splits: dict[str, dict[str, Split]], plan: Plan, folder: Path, head_size: int
) -> CacheSpec:
    """What cache.json will say. `head_size`: rows of the teacher's output layer; those beyond the tokenizer's ids
    are padding, and the distributions are cut to the ids.

    Raises DdkError if the tokenizer is not the teacher's, or a window holds an id that the teacher does not know.
    """
    options = project.manifest.teacher
    tokenizer = load_tokenizer(
        project.tokenizer, field="tokenizer", trust_remote_code=options.trust_remote_code
    )
    own = tokenizer_of_model(folder, trust_remote_code=options.trust_remote_code)
    if own is not None and tokenizer_digest(own) != tokenizer_digest(tokenizer):
        raise DdkError(
            f"tokenizer: {project.tokenizer} is not the teacher's ({tokenizer_difference(tokenizer, own)})",
            hint="leave tokenizer out of the manifest",
        )
    dtype = pick_dtype(options.dtype, torch.device(pick_device(options.device)))
    shard_windows = project.manifest.cache.shard_windows
    return CacheSpec(
        teacher={
            "weights_digest": weights_digest(folder),
            "dtype": str(dtype).removeprefix("torch."),
            **({"logits": "float32"} if widens(options, dtype) else {}),  # else none: as in older caches
        },
        tokenizer_digest=tokenizer_digest(tokenizer),
        vocab_size=predicted_ids(splits, tokenizer, head_size),
        seq_len=project.manifest.seq_len,
        plan=plan,
        attention=project.manifest.attention,
        schema_version=SCHEMA_VERSIONS[project.manifest.attention],
        domains={
            name: {split: split_size(opened, shard_windows) for split, opened in domain.items()}
            for name, domain in splits.items()
        },
        about={
            "model": options.model,
            "head_size": head_size,
            "ddk_pipe": ddk_pipe.__version__,
            "encoding": {name: rules_of(domain) for name, domain in splits.items()},
        },
    )


def tokenizer_difference(one: Any, other: Any) -> str:
    """How two tokenizers differ, in numbers: "385 ids, the teacher's has 400; id 301 is 'a' and 'b'"."""
    names, others = (
        {index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (one, other)
    )
    sizes = f"{tokenizer_size(one):,} ids, the teacher's has {tokenizer_size(other):,}"
    first = min((index for index in {*names, *others} if names.get(index) != others.get(index)), default=None)
    if first is None:
        return f"{sizes}; other special tokens"
    return f"{sizes}; id {first:,} is {names.get(first)!r} there and {others.get(first)!r} here"


def count_positions(spec: CacheSpec, shards: list[Shard]) -> int:
    """Positions the teacher predicts in these shards: windows * seq_len."""
    return sum(shard.windows for shard in shards) * spec.seq_len


def expected_bytes(spec: CacheSpec, shards: list[Shard]) -> int:
    """Disk space to reckon with for these shards, on the safe side: targets, tokens and labels."""
    per_position = EXPECTED_BYTES[spec.plan.scheme] * len(spec.plan.temperatures) + 6
    return int(count_positions(spec, shards) * per_position)
