"""Learning rate and gamma as pure functions of the step: nothing of them is in a checkpoint."""

from __future__ import annotations

import math

from ddk_pipe.pipeline.manifest import Distill


def learning_rate(options: Distill, step: int) -> float:
    """Rate of the step after `step` done ones: linear warm-up, then cosine, linear or WSD to final_ratio, or
    constant.

    WSD (warm-up, stable, decay) stays at the peak until the last decay_fraction of the steps, then falls linearly.
    """
    peak, schedule = options.optimizer.learning_rate, options.schedule
    warmup = round(schedule.warmup_fraction * options.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    first = warmup
    if schedule.name == "wsd":
        first = max(warmup, options.steps - round(schedule.decay_fraction * options.steps))
    progress = max(0.0, (step - first) / max(1, options.steps - first))
    height = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * height)


def gamma_at(options: Distill, step: int) -> float:
    """Weight of the KL in the step after `step` done ones."""
    schedule = options.gamma_schedule
    if schedule.name == "constant":
        return options.gamma
    progress = step / max(1, options.steps - 1)
    height = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return options.gamma * (schedule.final_ratio + (schedule.first_ratio - schedule.final_ratio) * height)
