"""How intervals begin and end: the student is measured, and the mixing rule makes the next weights of what was found."""

from __future__ import annotations

import numpy as np

from ddk_pipe.pipeline import mixing
from ddk_pipe.stages.common import say
from ddk_pipe.stages.distill.identity import Identity
from ddk_pipe.stages.distill.journal import Journal
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.show import lopsided, show_weights
from ddk_pipe.stages.distill.validation import Outcome

# what a rule's first update starts from, if not from what the first interval was drawn by
FIRST_WEIGHTS: dict[str, mixing.InitialDraw] = {"ddk": "ddk", "ddk_unsmoothed": "ddk", "natural": "natural"}


def begin_first(parts: Parts, journal: Journal, identity: Identity) -> Position:
    """Measure the untrained student and take the first interval's shares from it."""
    outcome = parts.validation.run()
    own = FIRST_WEIGHTS.get(parts.options.mixing)
    drawn_by = parts.options.initial or own or "uniform"
    weights, shares = (
        mixing.initial_weights(
            kind, student_ce=outcome.student_ce, teacher_ce=parts.teacher_ce, sizes=parts.sizes
        )
        for kind in (own or drawn_by, drawn_by)
    )
    position = Position(
        step=0,
        seconds=0.0,
        weights=weights.tolist(),
        shares=shares.tolist(),
        student_ce=outcome.student_ce.tolist(),
        sampler=parts.sampler.state_dict(),
        settings=identity.settings_digest,
        made_of=identity.made_of_digest,
    )
    _write_down(parts, journal, position, outcome)
    _warn_if_lopsided(parts, position, by_gaps=drawn_by == "ddk")
    return position


def end_interval(parts: Parts, journal: Journal, position: Position) -> None:
    """Validate, update the weights, checkpoint; `position` is then that of the next interval."""
    outcome = parts.validation.run()
    position.cut_short(parts.options.steps, parts.options.interval_steps)
    gaps = outcome.student_ce - parts.teacher_ce
    before, position.student_ce = np.array(position.student_ce), outcome.student_ce.tolist()
    position.weights = parts.rule(
        np.array(position.weights), outcome.student_ce, parts.teacher_ce, student_ce_before=before
    ).tolist()
    position.shares, position.gap = position.weights, float(gaps.mean())
    position.sampler = parts.sampler.state_dict()
    threshold = parts.options.stop_gap_nats
    position.finished = threshold is not None and bool((gaps < threshold).all())
    _warn_if_lopsided(parts, position, by_gaps=parts.options.mixing not in ("uniform", "natural"))
    if position.finished or position.step == parts.options.steps:  # what the student is judged by
        outcome = parts.validation.complete(outcome)
        gaps = outcome.student_ce - outcome.teacher_ce
    _write_down(parts, journal, position, outcome)
    journal.publish()
    journal.checkpoint(position)
    say(
        f"distill: step {position.step}/{parts.options.steps}, mean validation gap"
        f" {gaps.mean():.3f} nats/token"
    )
    show_weights(parts.domains, position.shares, gaps.tolist())
    if position.finished:
        say(f"distill: every gap is below {threshold} nats/token, which is what stop_gap_nats asks for")


def _warn_if_lopsided(parts: Parts, position: Position, *, by_gaps: bool) -> None:
    """Tell the user, once a run, of an interval that one domain takes nearly whole without their word for it."""
    if position.warnings or not by_gaps or position.step >= parts.options.steps:
        return
    text = lopsided(parts.options, parts.domains, position.shares, step=position.step)
    if text is not None:
        position.warnings.append(text)
        say(f"distill: warning: {text}")


def _write_down(parts: Parts, journal: Journal, position: Position, outcome: Outcome) -> None:
    drawn = parts.sampler.state_dict()["cursors"]
    for index, domain in enumerate(parts.domains):
        student, teacher = float(outcome.student_ce[index]), float(outcome.teacher_ce[index])
        row = {
            "student_ce": student,
            "teacher_ce": teacher,
            "gap": student - teacher,
            "weight": float(position.shares[index]),
            "windows_drawn": drawn[index],
            **{key: value for key, value in outcome.domains[index].items() if key != "student_ce"},
        }
        journal.validation(position.step, domain, row)
