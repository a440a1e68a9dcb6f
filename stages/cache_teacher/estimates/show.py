"""The estimate as a table and two lines of advice."""

from __future__ import annotations

from rich.markup import escape

from ddk_pipe.stages.cache_teacher.estimates.figures import MOST_NOISE, Estimate
from ddk_pipe.stages.common import clock, new_table, terminal


def show_estimate(found: Estimate) -> None:
    """On standard output."""
    title = f"estimate for {found.labels:,} positions, from {found.sampled_positions:,} of them; entries, bytes per position"
    out = new_table(title, "setting", "entries", "bytes", "cache", "teacher time", "added noise")
    for row in found.rows:
        biased = row.cache["scheme"] in ("threshold", "topk")
        out.add_row(
            escape(row.name) + (" (yours)" if row is found.rows[0] else ""),
            f"{row.entries_per_position:.1f}",
            f"{row.bytes_per_position:.1f}",
            size_text(row.total_bytes),
            clock(row.teacher_seconds),
            "none, but biased" if biased else f"{100 * row.added_noise:.2f}%",
        )
    terminal().print(out)
    for line in _advice(found):
        print(line)


def _advice(found: Estimate) -> list[str]:
    chosen = next((row for row in found.rows if row.name == found.recommended), None)
    if chosen is None:
        return ["no recommendation: teacher.vllm.capture: prompt_logprobs cannot serve the unbiased schemes"]
    enough = f"the fewest bytes at no more than {100 * MOST_NOISE:g}% of added noise"
    why = enough if chosen.added_noise <= MOST_NOISE else "the least noise of those tried"
    return [
        f"recommended: {chosen.name} ({why}; Random Sampling KD with its 50 draws adds 2%)",
        f"in the manifest: cache: {{scheme: pps, tau: {chosen.cache['tau']:g}}}",
    ]


def size_text(size: float) -> str:
    """Bytes as people read them: 12.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
