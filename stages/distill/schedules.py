"""Learning rate and gamma as pure functions of the step: nothing of them is in a checkpoint."""

from __future__ import annotations

import math

from ddk_pipe.pipeline.manifest import Distill


def warmup_steps(options: Distill) -> int:
    """Steps before the learning rate has reached its peak."""
    return round(options.schedule.warmup_fraction * options.steps)


def _decay_begins(options: Distill) -> int:
    """The step after which WSD falls."""
    return max(warmup_steps(options), options.steps - round(options.schedule.decay_fraction * options.steps))


def learning_rate(options: Distill, step: int) -> float:
    """Rate of the step after `step` done ones: linear warm-up, then cosine, linear or WSD to final_ratio, or
    constant.

    WSD (warm-up, stable, decay) stays at the peak until the last decay_fraction of the steps, then falls linearly.
    """
    peak, schedule = options.optimizer.learning_rate, options.schedule
    warmup = warmup_steps(options)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    first = _decay_begins(options) if schedule.name == "wsd" else warmup
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


def stable_steps(options: Distill) -> int:
    """First steps of the run that a longer one with this warm-up takes alike: what it can be extended from."""
    if options.gamma_schedule.name != "constant":
        return 0
    if options.schedule.name == "wsd":
        return _decay_begins(options)
    return options.steps if options.schedule.name == "constant" else 0


def steps_alike(one: Distill, other: Distill) -> int:
    """First steps that two runs take at the same learning rates and gammas."""
    both = min(one.steps, other.steps)
    differ = (
        step
        for step in range(both)
        if learning_rate(one, step) != learning_rate(other, step)
        or gamma_at(one, step) != gamma_at(other, step)
    )
    return next(differ, both)
