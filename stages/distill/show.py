"""The domain weights as bars, for people at a terminal."""

from __future__ import annotations

from ddk_pipe.stages.common import console, say

WIDTH = 30


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
