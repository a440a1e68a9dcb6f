"""Figures for people."""

from __future__ import annotations

from ddk_pipe.stages.cache_teacher.estimates.show import size_text


def test_sizes_for_people() -> None:
    assert [size_text(size) for size in (999.0, 1.5e3, 2.5e9, 3e15)] == [
        "999 B",
        "1.5 kB",
        "2.5 GB",
        "3e+03 TB",
    ]
