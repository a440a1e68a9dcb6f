"""What must fit together before training: tokenizers, batch and processes, prior and domains; lopsided weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Distill, Project
from ddk_pipe.pipeline.mixing import FloatArray, Rule, make_rule
from ddk_pipe.pipeline.models import load_tokenizer
from ddk_pipe.pipeline.text import tokenizer_digest

LOPSIDED = 0.8  # a domain's share of an interval from which on the others are as good as left out


def shared_tokenizer(project: Project, digest: str) -> Any:
    """The targets' tokenizer, which the student is saved with; a student's own must mean the same by its ids.

    `digest` is that of the tokenizer that the targets were made with. Raises DdkError naming the one that differs.
    """
    student = project.manifest.student
    names = [("tokenizer", project.tokenizer)]
    if student is not None and student.model is not None:
        names.append(("student.model", project.model(student.model, field="student.model")))
    trust = project.manifest.teacher.trust_remote_code
    loaded = [load_tokenizer(name, field=field, trust_remote_code=trust) for field, name in names]
    for (field, name), tokenizer in zip(names, loaded, strict=True):
        if tokenizer_digest(tokenizer) != digest:
            raise DdkError(
                f"{field}: the tokenizer of {name} is not the one the cache at {project.cache} was made with",
                hint="use a student with the teacher's tokenizer, or make another cache",
            )
    return loaded[0]


def check_tail(options: Distill, scheme: str, *, has_tail: bool) -> None:
    """Raises DdkError for options that want a tail bucket of a cache of a scheme that keeps none."""
    if options.direction == "reverse" and not has_tail:
        raise DdkError(
            f"distill.direction: reverse KL needs a tail bucket, and {scheme} caches have none",
            hint="cache with scheme: threshold or topk, or use direction: forward",
        )
    if options.tail == "renormalise" and not has_tail:
        raise DdkError(
            f"distill.tail: {scheme} caches have no tail to throw away",
            hint="cache with scheme: threshold or topk, or use tail: keep",
        )


def windows_per_step(options: Distill, seq_len: int, world_size: int = 1) -> int:
    """Windows of one optimizer step, over all processes: batch_tokens / seq_len, rounded, at least 1.

    Raises DdkError if they do not divide among the processes.
    """
    windows = max(1, round(options.batch_tokens / seq_len))
    if windows % world_size:
        raise DdkError(
            f"distill.batch_tokens: {windows} windows a step do not divide among {world_size} processes",
            hint=f"set batch_tokens to a multiple of {world_size * seq_len}, or start another number of processes",
        )
    return windows


def mixing_rule(options: Distill, domains: list[str], sizes: list[int]) -> Rule:
    """The rule of distill.mixing with its options; raises DdkError for one that is unknown or does not fit."""
    return make_rule(
        options.mixing,
        alpha=options.alpha,
        sizes=sizes,
        prior=prior_shares(options, domains, sizes),
        largest_ratio=options.largest_ratio,
        options=options.mixing_options,
    )


def prior_shares(options: Distill, domains: list[str], sizes: list[int]) -> FloatArray | None:
    """distill.prior as shares [domains], None for 1/N; raises DdkError for one that does not fit the domains."""
    prior = options.prior
    if prior == "uniform":
        return None
    if prior == "natural":
        return np.array(sizes, dtype=np.float64) / sum(sizes)
    assert isinstance(prior, dict)
    if set(prior) != set(domains):
        odd = sorted(set(prior) ^ set(domains))
        raise DdkError(
            f"distill.prior: {', '.join(odd)} stands in only one of prior and domains",
            hint=f"give a share for each of {', '.join(domains)}",
        )
    values = np.array([prior[name] for name in domains], dtype=np.float64)
    if not values.sum() > 0:
        raise DdkError("distill.prior: all shares are 0", hint="give at least one domain a share")
    shares: FloatArray = values / values.sum()  # relative shares are as good
    return shares


def lopsided(options: Distill, domains: list[str], shares: list[float], *, step: int) -> str | None:
    """A warning if one of several domains gets more than LOPSIDED of the interval after `step` steps, else None.

    Eq. 1 is exp of a ratio of perplexities: of ratios 10 and 8 the first gets exp(2) = 7 times as much.
    """
    most = max(shares)
    if len(domains) == 1 or most <= LOPSIDED:
        return None
    if step == 0:
        cure = "Eq. 1 has no floor; to train on all of them set distill.initial: uniform"
    elif options.mixing == "ddk":
        cure = "to train more on the others set distill.largest_ratio, or lower distill.alpha"
    else:
        cure = "to train more on the others use distill.mixing: ddk, which keeps (1 - alpha) for all alike"
    named = domains[shares.index(most)]
    return f"{named} gets {most:.1%} of the windows of the interval after step {step}; {cure}"
