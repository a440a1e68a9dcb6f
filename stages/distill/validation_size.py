"""How many windows a validation reads; apart, because it needs no torch."""

from __future__ import annotations

from ddk_pipe.pipeline.manifest import Distill


def windows_per_domain(options: Distill, seq_len: int, domains: int) -> int:
    """Validation windows of each domain: validation_windows, or fewer where validation_budget says so, at least 1."""
    if options.validation_budget is None:
        return options.validation_windows
    trained = options.interval_steps * options.batch_tokens
    affordable = int(options.validation_budget * trained / (seq_len * domains))
    return max(1, min(options.validation_windows, affordable))
