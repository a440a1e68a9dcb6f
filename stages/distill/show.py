"""What people are told of the domain weights: bars, and a warning of an interval that one domain takes nearly whole."""

from __future__ import annotations

from ddk_pipe.pipeline.manifest import Distill
from ddk_pipe.stages.common import console, say

WIDTH = 30
LOPSIDED = 0.8  # a domain's share of an interval from which on the others are as good as left out


def show_weights(domains: list[str], shares: list[float], gaps_nats: list[float]) -> None:
    """A line per domain: share of the next interval, as a bar too, and gap to the teacher. Nothing in logs."""
    if console.is_terminal:
        for line in weight_lines(domains, shares, gaps_nats):
            say(line)


def weight_lines(domains: list[str], shares: list[float], gaps_nats: list[float]) -> list[str]:
    """Bars of `WIDTH` characters for a share of 1."""
    longest = max(map(len, domains))
    return [
        f"  {domain:<{longest}}  {'█' * round(WIDTH * share):<{WIDTH}} {share:6.1%}  gap {gap:+.3f}"
        for domain, share, gap in zip(domains, shares, gaps_nats, strict=True)
    ]


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
