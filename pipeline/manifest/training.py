"""What the section `distill` comes to in windows, and what it may not ask of a cache: arithmetic on its fields alone."""

from __future__ import annotations

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest.fields import Distill


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


def windows_per_domain(options: Distill, seq_len: int, domains: int) -> int:
    """Validation windows of each domain: validation_windows, or fewer where validation_budget says so, at least 1."""
    if options.validation_budget is None:
        return options.validation_windows
    trained = options.interval_steps * options.batch_tokens
    affordable = int(options.validation_budget * trained / (seq_len * domains))
    return max(1, min(options.validation_windows, affordable))


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
