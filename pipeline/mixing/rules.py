"""Per-domain losses -> domain weights: DDK (arXiv 2407.16154) and its drop-in relatives.

Everything here is a pure function of float64 arrays of shape [domains]:

    student_ce, teacher_ce   mean cross-entropy on each domain's validation windows, nats per token
    weights                  share of the next interval's windows that each domain gets; sums to 1
    gap = student_ce - teacher_ce        nats, positive where the student lags
    ratio = exp(gap)                     the student/teacher perplexity ratio of the paper

Every rule has the signature `rule(weights, student_ce, teacher_ce, **options) -> weights`; one that
names `student_ce_before` also gets the student's losses at the update before. What it returns is
finite, >= 0 and sums to 1. Every rule, also one that does not look at the losses, raises ValueError
for a NaN or infinite loss (naming the domain's index), for a shape that is not [domains], and for
weights that are negative or do not sum to 1.
"""

import numpy as np

from ddk_pipe.pipeline.mixing.arrays import (
    FloatArray,
    Sizes,
    check_mixture,
    check_share,
    check_weights,
    clipped,
    gap_between,
    normalised,
    proportional,
)

BEFORE = "student_ce_before"
_LARGEST_EXPONENT = 700.0  # exp(700) is about 1e304, the last round number before overflow


def ddk_initial(student_ce: FloatArray, teacher_ce: FloatArray) -> FloatArray:
    """Eq. 1 of arXiv 2407.16154: softmax(exp(student_ce - teacher_ce)), float64 [domains].

    This is r_0. No floor holds for it. Exact for any finite losses: where exp(gap) would overflow,
    the result is the limit, in which the domain with the largest gap takes everything.
    Raises ValueError for losses that are not finite (naming the domain) or differ in shape.
    """
    gap_nats = gap_between(student_ce, teacher_ce)
    start = np.ones_like(gap_nats)
    return _tilted(start, _ratio_below_largest(gap_nats, start))


def ddk(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    alpha: float = 0.5,
    prior: FloatArray | None = None,
    largest_ratio: float | None = None,
) -> FloatArray:
    """Eq. 2 of arXiv 2407.16154: alpha * psi / sum(psi) + (1 - alpha) / N.

    Here psi = weights * exp(ratio). All arrays are float64 [domains]; `alpha` in [0, 1] has no
    unit, the paper's is 0.5. Each weight of the result lies in [(1 - alpha)/N, alpha + (1 -
    alpha)/N]. At fixed losses the updates settle in about five intervals; alpha = 1 has no floor
    and collapses onto one domain instead.

    Not in the paper: `prior`, shares [domains] that take the place of 1/N, and `largest_ratio`,
    which clamps the ratios from above (a broken domain of ratio 10 would take all of alpha).
    Raises ValueError as the module says, for alpha outside [0, 1], a prior that `check_weights`
    refuses, and a largest_ratio that is not positive.
    """
    weights, gap_nats = check_mixture(weights, student_ce, teacher_ce)
    if largest_ratio is not None:
        if not largest_ratio > 0:
            raise ValueError(f"largest_ratio must be positive, got {largest_ratio}")
        gap_nats = np.minimum(gap_nats, np.log(largest_ratio))
    psi = _tilted(weights, _ratio_below_largest(gap_nats, weights))
    share = 1.0 - check_share("alpha", alpha)
    if prior is None:
        return _mixed_with_uniform(psi, uniform_share=share)
    return normalised((1.0 - share) * psi + share * check_weights(prior, domains=weights.size))


def ddk_unsmoothed(weights: FloatArray, student_ce: FloatArray, teacher_ce: FloatArray) -> FloatArray:
    """Eq. 1 of arXiv 2407.16154 recomputed: the paper's ablation "without factor smoothing".

    All arrays are float64 [domains]; the values of `weights` are not used. Raises as the module
    says.
    """
    check_mixture(weights, student_ce, teacher_ce)
    return ddk_initial(student_ce, teacher_ce)


def uniform(weights: FloatArray, student_ce: FloatArray, teacher_ce: FloatArray) -> FloatArray:
    """1/N each, whatever the losses: the paper's "equal sampling". Float64 [domains].

    Raises as the module says: a NaN loss stops a uniform run as it stops any other.
    """
    weights, _ = check_mixture(weights, student_ce, teacher_ce)
    return np.full_like(weights, 1.0 / weights.size)


def natural(
    weights: FloatArray, student_ce: FloatArray, teacher_ce: FloatArray, *, sizes: Sizes
) -> FloatArray:
    """Weights in proportion to `sizes`, the number of windows of each domain, shape [domains].

    Raises ValueError as the module says, and for sizes that are negative, not finite, all zero or
    of another length.
    """
    weights, _ = check_mixture(weights, student_ce, teacher_ce)
    return proportional(sizes, domains=weights.size)


def doremi(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    eta: float = 1.0,
    floor: float = 1e-4,
) -> FloatArray:
    """DoReMi's step: w' = w * exp(eta * max(0, gap)) / sum, then (1 - floor) * w' + floor/N.

    All arrays are float64 [domains]; `eta` is per nat; `floor` is the share spread evenly, so each
    weight is at least floor/N. The defaults are those of sangmichaelxie/doremi. Two differences:
    the reference model is the teacher, and the gap is clipped at 0 per domain, not per token.
    Raises ValueError as the module says, for eta < 0 and for floor outside [0, 1].
    """
    weights, gap_nats = check_mixture(weights, student_ce, teacher_ce)
    return _multiplicative(weights, np.maximum(gap_nats, 0.0), eta=eta, floor=floor)


def sheared(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    eta: float = 1.0,
    floor: float = 1e-4,
) -> FloatArray:
    """Sheared-LLaMA's dynamic loading: softmax(log w + eta * gap), then (1 - floor) * w' + floor/N.

    `doremi` without the clip: a domain where the student leads loses weight. All arrays are float64
    [domains]; `eta` is per nat; each weight is at least floor/N. The defaults are those of
    princeton-nlp/LLM-Shearing; the target loss is the teacher's.
    Raises ValueError as the module says, for eta < 0 and for floor outside [0, 1].
    """
    weights, gap_nats = check_mixture(weights, student_ce, teacher_ce)
    return _multiplicative(weights, gap_nats, eta=eta, floor=floor)


def gap_softmax(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    temperature: float = 1.0,
) -> FloatArray:
    """softmax(gap / temperature): one exponential where DDK has two, and no memory.

    All arrays are float64 [domains]; `temperature` is in nats; the values of `weights` are not
    used.
    Raises ValueError as the module says, and for a temperature that is not positive and finite.
    """
    weights, gap_nats = check_mixture(weights, student_ce, teacher_ce)
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    with np.errstate(over="ignore"):
        scores = clipped(gap_nats / temperature)
    return _tilted(np.ones_like(weights), scores)


def learnability(
    weights: FloatArray,
    student_ce: FloatArray,
    teacher_ce: FloatArray,
    *,
    student_ce_before: FloatArray | None = None,
    floor: float = 0.5,
) -> FloatArray:
    """(1 - floor) in proportion to what a window of each domain took off its gap in the last interval, + floor/N.

    All arrays are float64 [domains]; `student_ce_before` are the student's losses before that interval, which was
    drawn by `weights`. The teacher's losses do not change, so that a gap falls by what the student's loss falls; a
    loss that rose counts as 0. A domain whose gap does not close, however large, is left with floor/N: no rule that
    looks at the gaps alone can tell (docs/study.md, "A gap that cannot be closed"). The mix is even where there is
    no interval before, and where no loss fell.
    Not in the DDK paper: the learning progress of curricula (Graves et al. 2017, arXiv 1704.03003), per window.
    Raises ValueError as the module says, for student_ce_before too, and for floor outside [0, 1].
    """
    weights, _ = check_mixture(weights, student_ce, teacher_ce)
    share = check_share("floor", floor)
    even = np.full_like(weights, 1.0 / weights.size)
    if student_ce_before is None:
        return even
    with np.errstate(over="ignore"):
        fallen = np.maximum(gap_between(student_ce_before, student_ce, names=(BEFORE, "student_ce")), 0.0)
        slope = np.divide(fallen, weights, out=np.zeros_like(weights), where=weights > 0)
    return _mixed_with_uniform(normalised(clipped(slope)), uniform_share=share) if slope.any() else even


def _ratio_below_largest(gap_nats: FloatArray, weights: FloatArray) -> FloatArray:
    """ratio - (largest ratio of a domain with weight), [domains], without forming a ratio.

    exp(g) - exp(top) = exp(top) * expm1(g - top): at most 0, so only the factor exp(top) can
    overflow. Capping it there changes nothing: it already pushes every lesser domain to weight 0.
    """
    top = gap_nats[weights > 0].max()
    with np.errstate(over="ignore"):
        below = np.minimum(gap_nats - top, 0.0)
    difference: FloatArray = np.exp(min(top, _LARGEST_EXPONENT)) * np.expm1(below)
    return difference


def _tilted(weights: FloatArray, scores: FloatArray) -> FloatArray:
    """weights * exp(scores), scaled to sum to 1, in log space; a weight of 0 stays 0. [domains]"""
    live = weights > 0
    logits = np.log(weights[live]) + scores[live]
    tilted = np.zeros_like(weights)
    with np.errstate(over="ignore"):
        tilted[live] = np.exp(logits - logits.max())
    return normalised(tilted)


def _multiplicative(weights: FloatArray, gap_nats: FloatArray, *, eta: float, floor: float) -> FloatArray:
    if not (np.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be at least 0 and finite, got {eta}")
    with np.errstate(over="ignore"):
        scores = clipped(eta * gap_nats)
    return _mixed_with_uniform(_tilted(weights, scores), uniform_share=check_share("floor", floor))


def _mixed_with_uniform(weights: FloatArray, *, uniform_share: float) -> FloatArray:
    return normalised((1.0 - uniform_share) * weights + uniform_share / weights.size)
